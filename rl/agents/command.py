"""Any program as an agent: it finds its endpoint in the environment, and a folder to work in.

The program sees

    OPENAI_BASE_URL, OPENAI_API_BASE, OPENAI_API_KEY      …/v1 and a key
    ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY                 the same endpoint; their clients add /v1
    MODEL, TASK_ID, DEADLINE_S, PROMPT                    a name, the task, seconds, the words

and runs until it ends or the deadline comes; then everything that it started is ended and its
folder is graded. At the deadline the status is `timeout` and the reward 0, whatever lies there.

With isolation `bubblewrap` the program runs in MLE-bench's container contract
(`agent_tools.mle_agent.container`): /home/data read-only, /home/agent to work in (of tasks of your
own it holds the files), /home/submission, /home/code, /home/logs; the only way out is the model.
With `none` it is a process group on this machine.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent_tools.mle_agent.bridge import Bridge, Validate
from agent_tools.mle_agent.container import PORT, Container, collect
from agent_tools.mle_agent.foreign import INSTRUCTIONS
from agent_tools.mle_bench.grading import grade
from agent_tools.sandbox import Limits
from rl.agents.graders import Grader, Submission
from rl.agents.host import run_group
from rl.envs.mle.env import scored_rows
from rl.envs.mle.prompts import one_line
from rl.errors import ConfigError, InfraError
from rl.types import EpisodeStatus, RewardRecord, Task

_NOT_STARTED = (126, 127)
"""What a shell answers for a program that cannot be run: no doing of the model's."""


@dataclass(frozen=True)
class Place:
    """Where and within which limits a program runs. `python` None: the script environment's."""

    isolation: str = "bubblewrap"
    python: Path | None = None
    memory_mb: int = 2048
    processes: int = 256
    disk_mb: int = 512
    keep: Path | None = None


@dataclass(frozen=True)
class _Ended:
    status: EpisodeStatus
    stdout: str = ""
    stderr: str = ""


class CommandAgent:
    """Runs a program on tasks (`rl.types.AgentEnv`); for any number of threads.

    command   program and arguments; `{prompt}`, `{model}` and `{task}` are filled in
    env       variables of the program besides those above
    """

    def __init__(
        self,
        command: tuple[str, ...],
        grader: Grader,
        *,
        model: str,
        place: Place | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._command = command
        self._grader = grader
        self._model = model
        self._place = place or Place()
        self._env = dict(env or {})

    def run(self, task: Task, base_url: str, api_key: str, deadline_s: float) -> RewardRecord:
        """One episode. ConfigError where the program does not exist; InfraError where the sandbox
        or the grader fails, or the endpoint did at the agent's last request."""
        started = time.monotonic()
        prompt = self._prompt(task, deadline_s)
        with tempfile.TemporaryDirectory(prefix="agent-") as name:
            folder = Path(name) / "work"
            folder.mkdir()
            if self._place.isolation == "none":
                ended = self._on_host(task, prompt, folder, base_url, api_key, deadline_s)
            else:
                ended = self._in_sandbox(task, prompt, folder, base_url, api_key, deadline_s)
            wall = time.monotonic() - started
            self._keep(task, ended)
            outcome = 0.0
            if ended.status == "done":
                outcome = self._grader(task, folder)
        return RewardRecord(task.episode, outcome, t_wall=wall, status=ended.status)

    # ---------------------------------------------------------- on this machine

    def _on_host(
        self, task: Task, prompt: str, folder: Path, base_url: str, api_key: str, deadline_s: float
    ) -> _Ended:
        if task.files.is_dir():
            shutil.copytree(task.files, folder, dirs_exist_ok=True)
        variables = self._variables(task, prompt, base_url, api_key, deadline_s)
        done = run_group(self._argv(task, prompt), folder, variables, deadline_s)
        return _ended(done.exit_code, done.timed_out, done.stdout, done.stderr)

    # ---------------------------------------------------------- in the sandbox

    def _in_sandbox(
        self, task: Task, prompt: str, folder: Path, base_url: str, api_key: str, deadline_s: float
    ) -> _Ended:
        place, competition = self._place, self._is_competition
        inside = f"http://127.0.0.1:{PORT}/v1"
        limits = Limits(
            cpu_seconds=deadline_s,
            wall_seconds=deadline_s,
            memory_mb=place.memory_mb,
            processes=place.processes,
            disk_mb=place.disk_mb,
            open_files=1024,
            output_bytes=100_000,
        )
        empty = folder.parent / "empty"
        empty.mkdir()
        files = task.files if task.files.is_dir() else empty
        end = time.monotonic() + deadline_s
        with Bridge(self._validator(task), base_url, api_key) as bridge:
            container = Container(
                files,
                limits,
                files={"instructions.txt": prompt},
                folder=None if competition else files,
                environment=self._variables(task, prompt, inside, "none", deadline_s),
                bridge=bridge.folder,
                python=place.python,
            )
            with container as opened:
                command = " ".join(shlex.quote(part) for part in self._argv(task, prompt))
                try:
                    done = opened.run(command, wall_seconds=max(0.1, end - time.monotonic()))
                    # at a deadline nothing is graded
                    kept = ("submission", "code", "logs") if competition else ("agent", "logs")
                    left = {} if done.status == "timeout" else collect(opened, kept)
                except InfraError as error:  # it opened, so this is the agent's doing
                    return _Ended("done", stderr=str(error))
        top = "" if competition else "agent/"  # what is graded
        for path, data in left.items():
            if path.startswith(top):
                _write(folder, path.removeprefix(top), data)
            if place.keep is not None and path.startswith("logs/"):
                _write(place.keep / (task.episode or task.id), path, data)
        if done.status == "infra":
            raise InfraError(f"the agent's sandbox failed: {one_line(done.stderr)}")
        if bridge.failed:
            raise InfraError("the endpoint failed at the agent's last request")
        return _ended(done.exit_code, done.status == "timeout", done.stdout, done.stderr)

    # ---------------------------------------------------------- what the program is told

    @property
    def _is_competition(self) -> bool:
        return isinstance(self._grader, Submission)

    def _prompt(self, task: Task, deadline_s: float) -> str:
        if isinstance(self._grader, Submission):
            competition = self._grader.competition(task)
            return INSTRUCTIONS.format(
                hours=deadline_s / 3600,
                steps="any number of",
                competition=competition.id,
                description=competition.description,
            )
        return "\n\n".join(str(message["content"]) for message in task.prompt)

    def _argv(self, task: Task, prompt: str) -> tuple[str, ...]:
        known = {"{prompt}": prompt, "{model}": self._model, "{task}": task.id}
        return tuple(_filled(part, known) for part in self._command)

    def _variables(
        self, task: Task, prompt: str, base_url: str, api_key: str, deadline_s: float
    ) -> dict[str, str]:
        return {
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_BASE": base_url,
            "OPENAI_API_KEY": api_key,
            "ANTHROPIC_BASE_URL": base_url.removesuffix("/").removesuffix("/v1"),
            "ANTHROPIC_API_KEY": api_key,
            "MODEL": self._model,
            "TASK_ID": task.id,
            "DEADLINE_S": f"{deadline_s:.0f}",
            "PROMPT": prompt,
            **self._env,
        }

    def _validator(self, task: Task) -> Validate:
        def validate(data: bytes) -> str:
            if not isinstance(self._grader, Submission):
                return "there is no submission to validate"
            report = grade(self._grader.competition(task), data, scored_rows(task.split))
            return "valid" if report.valid else f"not valid: {one_line(report.error or '')}"

        return validate

    def _keep(self, task: Task, ended: _Ended) -> None:
        if self._place.keep is None:
            return
        folder = self._place.keep / (task.episode or task.id)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("stdout.txt", ended.stdout), ("stderr.txt", ended.stderr)):
            (folder / name).write_text(text, encoding="utf-8", errors="replace")


def _write(folder: Path, path: str, data: bytes) -> None:
    """A file of an archive that was checked: its path stays inside."""
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def _ended(exit_code: int | None, timed_out: bool, stdout: str, stderr: str) -> _Ended:
    if exit_code in _NOT_STARTED:
        raise ConfigError(f"agent command cannot be run: {one_line(stderr) or 'no reason given'}")
    return _Ended("timeout" if timed_out else "done", stdout, stderr)


def _filled(part: str, known: Mapping[str, str]) -> str:
    """Each name once; braces that are no name stay, and what was filled in is not read again."""
    return re.sub(r"\{(?:prompt|model|task)\}", lambda match: known[match[0]], part)
