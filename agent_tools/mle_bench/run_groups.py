"""Run groups in MLE-bench's layout, and the JSONL that its grading command reads.

``<runs>/<UTC timestamp>_run-group_<agent>/<competition>_<uuid>/{submission,logs,code}`` beside
``metadata.json``. Each competition and seed is one run; the seed is a label of ours that agents
are not told.
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError
from agent_tools.mle_bench.folders import check_id
from agent_tools.mle_bench.reports import timestamp

METADATA = "metadata.json"
PARTS = ("submission", "logs", "code")
SUBMISSION = Path("submission/submission.csv")
AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Run:
    """One run's folder; its name begins with the competition's id."""

    path: Path
    competition_id: str

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def submission(self) -> Path:
        """The only file that is graded; may not exist."""
        return self.path / SUBMISSION


@dataclass(frozen=True)
class RunGroup:
    """A folder of runs of one agent."""

    path: Path

    def add(self, competition_id: str) -> Run:
        """A new run with empty ``submission``, ``logs`` and ``code`` folders.

        Raises `UserError` for an id with an underscore.
        """
        check_id(competition_id)
        run = Run(self.path / f"{competition_id}_{uuid.uuid4()}", competition_id)
        for part in PARTS:
            (run.path / part).mkdir(parents=True)
        return run

    def finish(self, runs: dict[str, dict[str, Any]]) -> Path:
        """Write ``metadata.json``: each run's id with what is known of it, ``success`` at least.

        The order of ``runs`` is the order of grading, and so of seeds. May be called again as more
        runs end. Raises `UserError` for a run that has no folder here.
        """
        for run_id in runs:
            if not (self.path / run_id).is_dir():
                raise UserError(f"{self.path}: holds no run {run_id!r}: add it first")
        data = {"run_group": self.path.name, "created_at": timestamp(), "runs": runs}
        scratch = self.path / f".{METADATA}.new"
        scratch.write_text(json.dumps(data, indent=4, default=str) + "\n", encoding="utf-8")
        return scratch.rename(self.path / METADATA)


def new_run_group(runs_dir: Path, agent: str) -> RunGroup:
    """Make ``<runs>/<timestamp>_run-group_<agent>``; `UserError` if it exists or is unusable."""
    if not AGENT.fullmatch(agent):
        raise UserError(f"agent name {agent!r}: use letters, digits, dots, hyphens, underscores")
    path = runs_dir / f"{timestamp()}_run-group_{agent}"
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{path} exists: wait a second, or name the agent otherwise") from None
    return RunGroup(path)


def read_run_group(path: Path) -> list[Run]:
    """Runs of a group in the order of ``metadata.json``; takes the folder or that file.

    Raises `UserError` for a group without metadata, or a run without a folder.
    """
    metadata = path if path.name == METADATA else path / METADATA
    try:
        data = json.loads(metadata.read_text(encoding="utf-8"))
        names = list(data["runs"])
    except FileNotFoundError:
        raise UserError(f"no {metadata}: name a run group that has ended") from None
    except (KeyError, TypeError, ValueError, NotADirectoryError) as error:
        raise UserError(f"{metadata}: is no run group's metadata ({error}): mend it") from None
    runs = []
    for name in names:
        folder = metadata.parent / str(name)
        if folder.parent != metadata.parent or not folder.is_dir():
            raise UserError(f"{metadata}: run {name!r} has no folder beside it: restore it")
        runs.append(Run(folder, str(name).partition("_")[0]))
    return runs


def grading_lines(
    runs: list[Run], *, logs: Path = Path("logs/agent.log"), code: Path = Path("code/train.py")
) -> list[dict[str, str | None]]:
    """Lines for the grading command; paths are None where a run has no such file.

    ``logs`` and ``code`` are relative to a run; only MLE-bench's detectors read them. A submission
    that leaves its run's folder by a link counts as none: a run is an agent's work.
    """
    return [
        {
            "competition_id": run.competition_id,
            "submission_path": _inside(run, SUBMISSION),
            "logs_path": _inside(run, logs),
            "code_path": _inside(run, code),
        }
        for run in runs
    ]


def write_grading_lines(lines: list[dict[str, str | None]], path: Path) -> None:
    """Write the JSONL file."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another") from None


def _inside(run: Run, relative: Path) -> str | None:
    path = run.path / relative
    if not path.exists() or not path.resolve().is_relative_to(run.path.resolve()):
        return None
    return path.as_posix()
