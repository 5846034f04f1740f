"""Tasks from a suite, and the episode: description → script → tool result → better script.

What an episode earns is decided by its *last* script: percentile / 100 on the scored rows, 0 if
it is invalid. Earlier scripts only buy information, so a good early attempt that is then spoilt
pays nothing; an agent that is content must submit the same script again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.mle_bench.registry import Competition, Which, load_competition, load_suite
from agent_tools.sandbox.types import Limits, ScriptJob, ScriptPool, ScriptResult
from rl.envs.mle.prompts import (
    Scaffold,
    extract_script,
    result_text,
    task_messages,
    turn_message,
)
from rl.envs.mle.verifier import SUBMISSION, Verifier, VerifierProtocol
from rl.rewards import percentile_reward
from rl.types import (
    CallRecord,
    ChatClient,
    ChatReply,
    Episode,
    EpisodeStatus,
    Message,
    RewardRecord,
    ScriptOutcome,
    Task,
)

SPLITS = ("dev", "train", "val")
_QUEUE_S = 900.0
"""Longest wait for a script: its own limit, and all the scripts before it in the queue."""


def scored_rows(split: str) -> Which:
    """Rows a split is scored on. Only `dev` may be trained on.

    `dev`: rows carved from the public training rows of the train competitions. `train` and `val`:
    the private tests of the train and of the held-out competitions, for evaluation.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    return "dev" if split == "dev" else "private"


class MleTaskset:
    """The competitions of one split of a suite, as tasks in the suite's order.

    Raises `UserError` for an unknown suite, split or id, or data that is not prepared.
    """

    def __init__(
        self,
        suite: str,
        split: str,
        data_dir: Path | None = None,
        *,
        scaffold: Scaffold | None = None,
        turns: int | None = None,
    ) -> None:
        self.split = split
        self._which = scored_rows(split)
        self._suite = load_suite(suite)
        self._data_dir = data_dir
        self._scaffold = scaffold or Scaffold()
        self._turns = turns or self._scaffold.turns or 1
        self._tasks: dict[str, Task] = {}

    def ids(self) -> tuple[str, ...]:
        """Competition ids of the split."""
        return self._suite.ids("val" if self.split == "val" else "train")

    def task(self, task_id: str) -> Task:
        """The task of one competition; loads its facts when first asked for."""
        if task_id not in self.ids():
            raise UserError(
                f"competition {task_id!r} is not in split {self.split} of suite "
                f"{self._suite.name}: choose one of {', '.join(self.ids())}"
            )
        if task_id not in self._tasks:
            competition = load_competition(task_id, self._data_dir, suite=self._suite)
            self._tasks[task_id] = make_task(
                competition, self.split, scaffold=self._scaffold, turns=self._turns
            )
        return self._tasks[task_id]

    def __iter__(self) -> Iterator[Task]:
        return (self.task(task_id) for task_id in self.ids())

    def __len__(self) -> int:
        return len(self.ids())


def make_task(
    competition: Competition, split: str, *, scaffold: Scaffold | None = None, turns: int = 1
) -> Task:
    """One competition as a task of `split`."""
    return Task(
        id=competition.id,
        prompt=tuple(task_messages(competition.facts, scaffold)),
        files=competition.public(scored_rows(split)),
        split=split,
        turns=turns,
        facts=competition.facts,
    )


class MleEnv:
    """Runs attempts: talks to the model through a chat client, to scripts through the pool.

    `turns` None takes each task's own number. Between turns the model is told the dev score of
    its script; where the competition has no dev rows (val) only whether the submission was valid,
    so that no held-out score ever enters a prompt. The last script of an episode runs on the
    split's own rows.
    """

    def __init__(
        self,
        pool: ScriptPool,
        limits: Limits | None = None,
        turns: int | None = None,
        *,
        verifier: VerifierProtocol | None = None,
        scaffold: Scaffold | None = None,
        data_dir: Path | None = None,
    ) -> None:
        if turns is not None and turns < 1:
            raise UserError(f"turns = {turns}: an episode needs at least 1")
        self._pool = pool
        self._limits = limits or Limits()
        self._turns = turns
        self._verifier = verifier or Verifier(data_dir=data_dir)
        self._scaffold = scaffold or Scaffold()

    def run(self, task: Task, client: ChatClient) -> Episode:
        """One episode of `task.turns` scripts, each from one call of `client`.

        Infrastructure faults of the sandbox end the episode with status `env_error`; whatever is
        wrong with a script is an outcome, never an exception.
        """
        turns = self._turns or task.turns
        messages: list[Message] = [dict(message) for message in task.prompt]
        calls: list[CallRecord] = []
        outcomes: list[ScriptOutcome] = []
        started = time.monotonic()
        tool_s = 0.0
        for turn in range(turns):
            reply = client.chat(
                messages,
                temperature=task.sampling.temperature,
                max_tokens=task.sampling.max_tokens,
                seed=task.sampling.seed + turn,
            )
            calls.append(_record(task, turn, reply))
            last = turn == turns - 1
            tool_started = time.monotonic()
            outcome = self.attempt(task, extract_script(reply.text), last)
            tool_s += time.monotonic() - tool_started
            outcomes.append(outcome)
            if outcome.status == "infra":
                break
            if not last:
                messages.append({"role": "assistant", "content": reply.text})
                messages.append(turn_message(self._scaffold, self.feedback(task, outcome)))
        final = outcomes[-1]
        reward = RewardRecord(
            episode=task.episode,
            outcome=percentile_reward(final.percentile, valid=final.valid),
            t_wall=time.monotonic() - started,
            t_tool=tool_s,
            status=episode_status(final),
        )
        return Episode(
            id=task.episode,
            task=task.id,
            group=task.group,
            index=task.index,
            calls=tuple(calls),
            scripts=tuple(outcomes),
            reward=reward,
        )

    def attempt(self, task: Task, script: str, last: bool) -> ScriptOutcome:
        """Run and grade one script; between turns on dev rows wherever there are any."""
        which = scored_rows(task.split)
        files = task.files
        if not last and task.split == "train":
            which, files = "dev", self._verifier.competition(task.id).public("dev")
        result = self._execute(ScriptJob(code=script, inputs=files, limits=self._limits))
        outcome = self._verifier.score(task.id, script, result, which)
        if not last and task.split == "val" and outcome.valid:
            # nothing about held-out answers is kept for a script that was only a trial
            return replace(
                ScriptOutcome(script, outcome.status, True, None, 0.0),
                cpu_s=outcome.cpu_s,
                wall_s=outcome.wall_s,
            )
        return outcome

    def _execute(self, job: ScriptJob) -> ScriptResult:
        try:
            return self._pool.submit(job).result(timeout=_QUEUE_S + job.limits.wall)
        except FutureTimeoutError:
            return ScriptResult("infra", None, "", "the sandbox did not answer", {}, 0.0, 0.0)

    def feedback(self, task: Task, outcome: ScriptOutcome) -> str:
        """What an agent is told of a script that was a trial."""
        if task.split == "val" and outcome.valid:
            return f"{SUBMISSION} is valid"
        return result_text(outcome.score, outcome.percentile, outcome.message)


def _record(task: Task, turn: int, reply: ChatReply) -> CallRecord:
    return CallRecord(
        episode=task.episode,
        group=task.group,
        index=turn,
        prompt_ids=reply.prompt_ids,
        response_ids=reply.response_ids,
        logprobs=reply.logprobs,
        versions=reply.versions,
        finish_reason=reply.finish_reason,
        t_start=reply.t_start,
        t_end=reply.t_end,
        temperature=task.sampling.temperature,
        constrained=reply.constrained,
        tokenizer_hash=reply.tokenizer_hash,
    )


def episode_status(final: ScriptOutcome) -> EpisodeStatus:
    """How an episode ended whose last script is `final`."""
    if final.status == "infra":
        return "env_error"
    return "timeout" if final.status == "timeout" else "done"
