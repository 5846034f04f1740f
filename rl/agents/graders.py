"""What an agent's folder earns, judged after the agent and all its processes have ended."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from agent_tools.mle_bench.registry import Competition
from agent_tools.sandbox import Limits, ScriptResult, open_shell
from rl.agents.host import run_group
from rl.agents.options import CommandGrader, MleGrader, PythonGrader
from rl.agents.tasks import tests_folder
from rl.envs.mle.env import scored_rows
from rl.envs.mle.verifier import SUBMISSION, VerifierProtocol
from rl.errors import ConfigError, InfraError
from rl.rewards import percentile_reward
from rl.types import Task

Section = MleGrader | CommandGrader | PythonGrader


class Grader(Protocol):
    """(task, folder that the agent left) → reward in [0, 1]. InfraError: no fault of the agent."""

    def __call__(self, task: Task, folder: Path) -> float: ...


def make_grader(section: Section, verifier: VerifierProtocol, isolation: str) -> Grader:
    """The grader of an options section."""
    if isinstance(section, PythonGrader):
        return PythonCall(load_call(section.call), section.call)
    if isinstance(section, CommandGrader):
        return GraderCommand(section, isolation)
    return Submission(verifier)


class Submission:
    """Percentile / 100 of `submission.csv` (or `submission/submission.csv`) in the folder."""

    def __init__(self, verifier: VerifierProtocol) -> None:
        self._verifier = verifier

    def competition(self, task: Task) -> Competition:
        """The competition that a task is."""
        return self._verifier.competition(task.id)

    def __call__(self, task: Task, folder: Path) -> float:
        places = (folder / "submission" / SUBMISSION, folder / SUBMISSION)
        data = next((p.read_bytes() for p in places if p.is_file() and not p.is_symlink()), None)
        files = {} if data is None else {SUBMISSION: data}
        result = ScriptResult("ok", 0, "", "", files, 0.0, 0.0)
        outcome = self._verifier.score(task.id, "", result, scored_rows(task.split))
        return percentile_reward(outcome.percentile, valid=outcome.valid)


class PythonCall:
    """A function of the user's."""

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self._call = call
        self._name = name

    def __call__(self, task: Task, folder: Path) -> float:
        return _checked(self._call(task, folder), self._name)


class GraderCommand:
    """A command on a copy of the folder with the task's tests laid over it."""

    def __init__(self, section: CommandGrader, isolation: str) -> None:
        self._section = section
        self._isolation = isolation

    def __call__(self, task: Task, folder: Path) -> float:
        with tempfile.TemporaryDirectory(prefix="grade-") as name:
            staging = Path(name) / "folder"
            shutil.copytree(folder, staging, symlinks=True)
            tests = tests_folder(task)
            if tests is not None:
                lay_over(tests, staging)
            exit_code, printed = self._run(staging)
        if not self._section.number:
            return 1.0 if exit_code == 0 else 0.0
        lines = printed.strip().splitlines()
        if exit_code != 0 or not lines:
            return 0.0
        try:
            value = float(lines[-1])
        except ValueError:
            return 0.0  # what the agent left may print too
        return value if 0.0 <= value <= 1.0 else 0.0

    def _run(self, staging: Path) -> tuple[int | None, str]:
        section = self._section
        if self._isolation == "none":
            done = run_group(section.command, staging, {}, section.seconds)
            return done.exit_code, done.stdout
        limits = Limits(cpu_seconds=section.seconds, wall_seconds=section.seconds)
        with open_shell("bubblewrap", inputs=staging, limits=limits) as shell:
            made = shell.run(" ".join(shlex.quote(part) for part in section.command))
        if made.status == "infra":
            raise InfraError(f"the grader's sandbox failed: {made.stderr.strip()[-160:]}")
        return made.exit_code, made.stdout


def lay_over(source: Path, target: Path) -> None:
    """Copy a folder over another one; a link of the target's is replaced, never followed."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if place.is_symlink() or (place.is_file() and path.is_dir()):
            place.unlink()
        elif place.is_dir() and path.is_file():
            shutil.rmtree(place)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, place)


def load_call(name: str) -> Callable[..., Any]:
    """`module:function` → the function. ConfigError where there is none."""
    if not re.match(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", name):
        raise ConfigError(f"{name!r} is not of the form module:function")
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(f"{name}: {error}; install it, or put it on PYTHONPATH") from error
    if not callable(found):
        raise ConfigError(f"{name}: the module has no function {function!r}")
    call: Callable[..., Any] = found
    return call


def _checked(value: Any, name: str) -> float:
    reward = float(value)
    if not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
        raise ConfigError(f"grader {name} returned {value!r}; return a number from 0 to 1")
    return reward
