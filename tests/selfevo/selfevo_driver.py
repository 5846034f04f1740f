"""Runs or resumes campaigns in processes of their own, and kills them where it is told to.

`python selfevo_driver.py start|resume LAB AGENT [KIND before|after]`: one session, SIGKILL to
itself before or after the first event of KIND is written. `python selfevo_driver.py serve`: orders
as JSON lines on standard input, each run in a fork (imports are paid once); the exit status of
each is printed. `Sessions` is the other end of that pipe.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from agent_tools import git_safe
from agent_tools.errors import InfraError, UserError
from agent_tools.launcher import local
from selfevo import campaign, cli, loop, snapshot
from selfevo.arms import Commands
from selfevo.campaign import RunOptions
from selfevo.store import Store

DOUBLE = str(Path(__file__).with_name("selfevo_double.py"))
Visit = Callable[[str], None]
#: Git commands that change nothing: a kill beside one is like a kill beside its neighbours.
READING = (
    "cat-file",
    "check-ref-format",
    "config",
    "diff",
    "diff-tree",
    "for-each-ref",
    "log",
    "ls-files",
    "ls-tree",
    "merge-base",
    "rev-parse",
    "show-ref",
    "status",
    "symbolic-ref",
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, label: Callable[..., str | None], visit: Visit) -> None:
    """Call `visit` before and after every call of `owner.name` that has a label."""
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        point = label(*args, **kwargs)
        if point is None:
            return real(*args, **kwargs)
        visit(f"{point} before")
        found = real(*args, **kwargs)
        visit(f"{point} after")
        return found

    setattr(owner, name, wrapped)


def every_point(visit: Visit) -> None:
    """Visit the edges of every event, blob, snapshot, git command, job start and checkpoint."""
    from langgraph.checkpoint.sqlite import SqliteSaver

    def spawned(argv: Any, *args: Any, **kwargs: Any) -> str | None:
        return "supervisor" if isinstance(argv, list) and "supervisor" in str(argv[-1]) else None

    around(Store, "append", _event_point, visit)
    around(Store, "blob", lambda self, content: f"blob in {_caller()}", visit)
    around(snapshot, "keep", lambda *args: "snapshot", visit)
    around(git_safe, "execute", _git_point, visit)
    around(local, "write_json", lambda path, *a, **k: f"launcher {_kind(path)}", visit)
    around(subprocess, "Popen", spawned, visit)
    around(SqliteSaver, "put", lambda *a, **k: "checkpoint", visit)


def _event_point(store: Store, kind: str, data: Any = None, **more: Any) -> str:
    return f"event phase to {data['to']}" if kind == "phase" else f"event {kind}"


def _git_point(args: Sequence[str], *more: Any) -> str | None:
    return None if args[0] in READING else f"git {args[0]} in {_caller()}"


def _kind(path: Path) -> str:
    return "key" if path.parent.name == ".keys" else path.name


def _caller() -> str:
    """`file.function` of the innermost frame of the loop's own code."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        ours = path.parent.name in ("selfevo", "nodes")
        if ours and not path.name.startswith(("selfevo_", "store", "campaign")):
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "nowhere"


def die_once_a_point(record: Path) -> Visit:
    """Die at the first point that `record` does not hold yet, after adding it."""
    known = set(record.read_text().splitlines()) if record.exists() else set()

    def visit(point: str) -> None:
        if point not in known:
            with record.open("a") as file:
                file.write(point + "\n")
            die()

    return visit


def die_at_number(number: int) -> Visit:
    """Die at the `number`-th point of this session."""
    left = number

    def visit(point: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    return visit


def die_at_event(kind: str, when: str) -> Visit:
    def visit(point: str) -> None:
        if point == f"event {kind} {when}":
            die()

    return visit


def double_commands() -> Commands:
    """`DOUBLE_TRAIN=real`: the trainer itself, beside the second plane's evaluation."""
    real = os.environ.get("DOUBLE_TRAIN") == "real"
    train = ("-m", "rl.train") if real else (DOUBLE, "train")
    return Commands(
        (sys.executable, *train), (sys.executable, DOUBLE, "evaluate"), check_machine=False
    )


def session(order: dict[str, Any], visit: Visit | None = None) -> int:
    """One session of a campaign; its exit code."""
    campaign.POLL_S = 0.02
    snapshot.EVERY, snapshot.SHARE = 1, 0.0  # one after every node
    commands = double_commands()
    if visit is not None:
        every_point(visit)

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    lab = Path(order["lab"])
    if order["action"] == "start":
        options = RunOptions(
            agent=order["agent"], rounds=order.get("rounds"), seed=order.get("seed", 0)
        )
        return loop.start(lab, options, say, commands)[0]
    return loop.resume(lab, None, say, commands)[0]


# ------------------------------------------------------------------ many sessions


def serve() -> int:
    """Run the orders of standard input one after the other, each in a fork."""
    import scipy.special  # noqa: F401

    from agent_tools import wandb_logs  # noqa: F401
    from selfevo import graph, report  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(order)
        status = _wait(pid, order.get("kill_after_s"))
        print(json.dumps({"status": status}), flush=True)
    return 0


def _child(order: dict[str, Any]) -> None:
    """Run one order in this fork, told in its log; does not return."""
    visit, code = None, 1
    if "record" in order:
        visit = die_once_a_point(Path(order["record"]))
    elif "number" in order:
        visit = die_at_number(order["number"])
    log = Path(order["log"]).open("a", buffering=1)  # noqa: SIM115 - as long as the process
    os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stderr = log
    try:
        if "clock" in order:
            jumping_clock(order["clock"])
        if "file_bytes" in order:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
        code = session(order, visit)
    except (UserError, InfraError) as error:
        print(f"error: {error}", file=log)
        code = error.exit_code
    except OSError as error:
        print(f"error: {error}", file=log)
        code = 5
    finally:
        if code == 1:
            traceback.print_exc(file=log)
        os._exit(code)


def jumping_clock(offsets: Sequence[float]) -> None:
    """Every look at the clock shows another of these offsets, in turn."""
    real, looks = time.time, itertools.count()
    time.time = lambda: real() + offsets[next(looks) % len(offsets)]


def _wait(pid: int, kill_after_s: float | None) -> int:
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def end(processes: Sequence[subprocess.Popen[str]], seconds: float) -> None:
    """Kill what still runs, with its children, and wait for all."""
    for process in processes:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.communicate(timeout=seconds)


class Sessions:
    """A serving driver; `run` gives it one order and returns the session's exit status."""

    def __enter__(self) -> Sessions:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "DOUBLE_STEP_S": os.environ.get("DOUBLE_STEP_S", "0")},
        )
        return self

    def run(self, lab: Path, action: str, **order: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"agent": "rules", "log": str(lab.with_suffix(".log")), **order}
        order = {**order, "lab": str(lab), "action": action}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return int(json.loads(answer)["status"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> int:
    action, *rest = sys.argv[1:]
    if action == "serve":
        return serve()
    if action == "cli":
        campaign.Commands = double_commands  # type: ignore[assignment,misc]
        sys.argv = ["selfevo", *rest]
        cli.main()
    lab, agent, *point = rest
    visit = die_at_event(*point) if point else None
    return session({"action": action, "lab": lab, "agent": agent}, visit)


if __name__ == "__main__":
    sys.exit(main())
