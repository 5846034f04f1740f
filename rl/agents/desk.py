"""The tools of a script competition for an agent that calls them from its own code.

`run_script` tries a script in the sandbox and says what came of it, `submit` hands one in; the
last one handed in decides, else the last one tried. Both are plain functions `str → str` with
docstrings, which is what agent frameworks make tools of.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from rl.agents.deadline import Deadline
from rl.envs.mle.env import episode_status
from rl.envs.mle.prompts import extract_script
from rl.rewards import percentile_reward
from rl.types import RewardRecord, ScriptOutcome, Task


class ScriptEnv(Protocol):
    """What the desk needs of an environment (`rl.envs.mle.env.MleEnv`)."""

    def attempt(self, task: Task, script: str, last: bool) -> ScriptOutcome: ...

    def feedback(self, task: Task, outcome: ScriptOutcome) -> str: ...


class Desk:
    """The tools of one episode, for any number of threads; `reward` comes after them.

    scripts   how many the agent may have executed; one may be handed in even after that
    """

    def __init__(self, env: ScriptEnv, task: Task, scripts: int, deadline: Deadline) -> None:
        self._env = env
        self._task = task
        self._left = scripts
        self._deadline = deadline
        self._lock = threading.Lock()
        self._tried: str | None = None
        self._final: ScriptOutcome | None = None
        self._infra: ScriptOutcome | None = None
        self._scripts: list[ScriptOutcome] = []
        self.tool_s = 0.0

    def run_script(self, code: str) -> str:
        """Run a Python script on the competition's data and return its score or its error.

        The script must write submission.csv.
        """
        script = extract_script(code)
        if not self._take():
            return "error: no scripts left; submit one"
        outcome = self._run(script, last=False)
        with self._lock:
            self._tried = script
        return self._env.feedback(self._task, outcome)

    def submit(self, code: str) -> str:
        """Hand in the final Python script. Only the last one handed in counts."""
        if not self._take() and self._final is not None:
            return "error: no scripts left; the last one handed in counts"
        outcome = self._run(extract_script(code), last=True)
        with self._lock:
            self._final = outcome
        return "submitted"

    def reward(self, t_wall: float) -> RewardRecord:
        """What the episode earned; runs the last tried script if nothing was handed in."""
        if self._infra is None and self._final is None and self._tried is not None:
            self._final = self._run(self._tried, last=True)
        final = self._infra or self._final
        if final is None:
            return RewardRecord(self._task.episode, 0.0, t_wall=t_wall, t_tool=self.tool_s)
        others = [script for script in self._scripts if script is not final]
        return RewardRecord(
            episode=self._task.episode,
            outcome=percentile_reward(final.percentile, valid=final.valid),
            t_wall=t_wall,
            t_tool=self.tool_s,
            status=episode_status(final),
            scripts=(*others, final),
        )

    def timeout(self, t_wall: float) -> RewardRecord:
        """The record of an episode that did not end in time, whatever was handed in."""
        with self._lock:
            scripts = tuple(self._scripts)
        return RewardRecord(
            self._task.episode,
            0.0,
            t_wall=t_wall,
            t_tool=self.tool_s,
            status="timeout",
            scripts=scripts,
        )

    def _take(self) -> bool:
        self._deadline.check()
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _run(self, script: str, last: bool) -> ScriptOutcome:
        started = time.monotonic()
        outcome = self._env.attempt(self._task, script, last)
        with self._lock:
            self.tool_s += time.monotonic() - started
            self._scripts.append(outcome)
            if outcome.status == "infra":
                self._infra = outcome
        return outcome
