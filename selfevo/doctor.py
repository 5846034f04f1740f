"""`selfevo doctor`: try each part of a real run on this machine, and name what repairs it.

Every check uses the code that a campaign uses: the lab's own checks, a commit in a worktree, a
script in the sandbox, a grader call, a chat request with the agent's tools, and one optimiser step
by the trainer. What cannot work without something that failed before is skipped.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent_tools.errors import InfraError, UserError
from selfevo import doctor_checks as checks
from selfevo.arms import Commands
from selfevo.doctor_checks import Bench, FaultError
from selfevo.memory import clean

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Result:
    """One line: what was tried, how it went, and for a failure what mends it."""

    name: str
    status: Status
    detail: str
    repair: str
    seconds: float


@dataclass(frozen=True)
class Check:
    """A check by name; `needs` are checks without which it says nothing new."""

    name: str
    run: Callable[[Bench], str]
    repair: str
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("lab", checks.lab, "make a lab with `selfevo init LAB`, or mend the file named above"),
    Check("disk", checks.disk, "free some space, or move the lab to a larger disk"),
    Check("git", checks.git, "install git 2.31 or newer"),
    Check("identity", checks.identity, checks.IDENTITY_REPAIR),
    Check("torch", checks.torch, "run `make setup`, or `.venv/bin/pip install 'torch==2.13.0'`"),
    Check("environments", checks.environments, "run `make setup`"),
    Check("data", checks.data, "run `make setup`"),
    Check("grader", checks.grader, "run `make setup`", needs=("data",)),
    Check("sandbox", checks.sandbox, "run `apt-get install bubblewrap`", needs=("environments",)),
    Check("port", checks.port, "bring the loopback interface up: `ip link set lo up`"),
    Check("model", checks.model, checks.MODEL_REPAIR, needs=("disk",)),
    Check(
        "engine",
        checks.engine,
        "run `make setup-vllm`, or set forge.engine to own in configs/train.yaml",
        needs=("torch",),
    ),
    Check(
        "trainer",
        checks.trainer,
        "see the message; `python -m rl.train RUN.yaml --dry-run` checks a configuration",
        needs=("disk", "torch", "data", "sandbox", "engine"),
    ),
)


def examine(
    lab: Path | None, commands: Commands | None = None, only: Sequence[str] = ()
) -> Iterator[Result]:
    """Run every check (or those named in `only`), and yield its line when it is known.

    Leaves nothing behind. Raises `UserError` for an unknown name.
    """
    names = [check.name for check in CHECKS]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: choose from {', '.join(names)}")
    status: dict[str, Status] = {}
    with _bench(lab, commands or Commands()) as bench:
        for check in CHECKS:
            if only and check.name not in only:
                continue
            broken = [name for name in check.needs if status.get(name) == "failed"]
            if check.name == "model" and bench.served and status.get("torch") == "failed":
                broken.append("torch")
            if broken:
                result = Result(check.name, "skipped", f"needs {broken[0]}", "", 0.0)
            else:
                result = _try(check, bench)
            status[check.name] = result.status
            yield result


def _try(check: Check, bench: Bench) -> Result:
    began = time.monotonic()

    def done(status: Status, detail: str, repair: str = "") -> Result:
        return Result(check.name, status, detail, repair, round(time.monotonic() - began, 2))

    try:
        return done("ok", clean(check.run(bench), 300))
    except FaultError as error:
        return done("failed", clean(str(error), 300), clean(error.repair or check.repair, 300))
    except (UserError, InfraError) as error:
        return done("failed", clean(str(error), 300), check.repair)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return done("failed", clean(f"{where}{error.strerror or error}", 300), check.repair)


@contextlib.contextmanager
def _bench(lab: Path | None, commands: Commands) -> Iterator[Bench]:
    """A scratch folder beside the lab's campaigns (or in the temporary folder), removed after."""
    lab = lab.absolute() if lab is not None else None
    runs = lab / "runs" if lab is not None and lab.is_dir() else None
    made = runs is not None and not runs.exists()
    try:
        if runs is not None:
            runs.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".doctor-", dir=runs))
    except OSError as error:
        raise InfraError(
            f"cannot write in {runs or tempfile.gettempdir()}: {error.strerror}; free some space "
            "or make it writable"
        ) from error
    try:
        yield Bench(lab, scratch, commands)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if made and runs is not None:
            with contextlib.suppress(OSError):
                runs.rmdir()


def record(results: list[Result]) -> dict[str, Any]:
    """`selfevo doctor --json`."""
    rows: list[Mapping[str, Any]] = [vars(result) for result in results]
    return {"ok": all(result.status == "ok" for result in results), "checks": rows}


def lines(result: Result) -> list[str]:
    """One check for people."""
    word = {"ok": "ok", "failed": "FAILED", "skipped": "skipped"}[result.status]
    found = [f"{word:8} {result.name:13} {result.detail}"]
    if result.repair:
        found.append(f"{'':8} {'':13} repair: {result.repair}")
    return found


def verdict(results: list[Result]) -> str:
    """The last line."""
    failed = [result.name for result in results if result.status == "failed"]
    if not failed:
        whole = len(results) == len(CHECKS)
        return "everything works: `selfevo run LAB` will start" if whole else "this works"
    return f"{len(failed)} of {len(results)} checks failed: {', '.join(failed)}"
