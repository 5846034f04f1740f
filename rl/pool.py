"""The data pool: every call and every reward of a run, append-only (M2 report §6.2.2, Fig. 4).

SQLite by path, PostgreSQL by URL (`postgresql://…`, extra `postgres`). A record is written in one
transaction and never changed: triggers refuse it. Each carries the SHA-256 of its content, so that
a damaged file is noticed (`verify`); token ids and log-probs are stored as the exact numbers. With
the records alone a run's updates can be computed again, without engine or environment.

`python -m rl.pool stats|export|verify POOL`. Exit codes: 0, 2 unusable argument, 3 damaged records.
No torch here.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rl.errors import ConfigError, InfraError
from rl.pool_database import Database, is_postgres
from rl.types import CallRecord, RewardRecord, ScriptOutcome


class DamagedError(InfraError):
    """A record is not what was written."""


@dataclass(frozen=True)
class Stats:
    """Counts of a pool, and what is wrong with it."""

    calls: int
    rewards: int
    episodes: int
    response_tokens: int
    statuses: dict[str, int]
    damaged: tuple[str, ...]
    steps: int = 0


@dataclass(frozen=True)
class GroupRecord:
    """A group as it was trained on: its task, the domain of its reward, its episodes in order."""

    task: str
    domain: str
    episodes: tuple[str, ...]


@dataclass(frozen=True)
class StepRecord:
    """What an optimiser step (from 1) trained on."""

    step: int
    groups: tuple[GroupRecord, ...]


def pool_at(name: str, run_dir: Path) -> str:
    """URL or path of the pool that a run's configuration names; paths begin at its directory."""
    return name if is_postgres(name) else str(run_dir / name)


class Pool:
    """Thread-safe; several processes may write to one pool. `InfraError` when it cannot be used,
    `DamagedError` where a record that is read is not what was written."""

    def __init__(self, url: str | Path, *, create: bool = True) -> None:
        self.url = str(url)
        self._db = Database(self.url, create=create)

    # ---------------------------------------------------------- writing

    def add_call(self, call: CallRecord) -> None:
        """Append one call. InfraError if the pool has another one of this episode and index."""
        self.add_calls([call])

    def add_calls(self, calls: Sequence[CallRecord]) -> None:
        """Append several calls, all or none of them: one transaction costs as much as one call."""
        rows = [(call, _call_row(call)) for call in calls]
        self._db.insert(
            "calls",
            "episode, member, prompt, response, logprobs, meta, digest",
            [(c.episode, c.index, *row, _digest(c.episode, c.index, *row)) for c, row in rows],
        )

    def add_reward(self, reward: RewardRecord) -> None:
        """Append an episode's reward: the episode is then complete."""
        meta = json.dumps(
            {
                "outcome": reward.outcome,
                "process": reward.process,
                "t_wall": reward.t_wall,
                "t_tool": reward.t_tool,
                "status": reward.status,
                "scripts": [asdict(script) for script in reward.scripts],
            }
        )
        self._db.insert(
            "rewards",
            "episode, meta, digest",
            [(reward.episode, meta, _digest(reward.episode, meta))],
        )

    def add_step(self, step: StepRecord) -> None:
        """Append what an optimiser step trains on. A step that is done again (after a crash before
        its checkpoint) is appended again: the last record of a step counts."""
        meta = json.dumps([[g.task, g.domain, g.episodes] for g in step.groups])
        self._db.insert(
            "steps",
            "step, meta, digest",
            [(step.step, meta, _digest(step.step, meta))],
        )

    # ---------------------------------------------------------- reading

    def calls(self, episode: str) -> list[CallRecord]:
        """The calls of an episode in order."""
        return list(self._calls("WHERE episode = ? ORDER BY member", (episode,)))

    def next_index(self, episode: str) -> int:
        """One more than the highest index that a call of the episode has; 0 without calls."""
        found = self._db.select("SELECT MAX(member) FROM calls WHERE episode = ?", (episode,))
        return 0 if found[0][0] is None else int(found[0][0]) + 1

    def all_calls(self) -> Iterator[CallRecord]:
        """Every call, in the order of writing."""
        return self._calls("ORDER BY id", ())

    def reward(self, episode: str) -> RewardRecord | None:
        """An episode's reward, or None while it runs (or was never finished)."""
        columns = "episode, meta, digest"
        found = self._db.select(f"SELECT {columns} FROM rewards WHERE episode = ?", (episode,))
        return _reward(*self._whole("reward of {0}", found[0])) if found else None

    def rewards(self) -> list[RewardRecord]:
        """Every reward, in the order of writing."""
        rows = self._db.select("SELECT episode, meta, digest FROM rewards ORDER BY id")
        return [_reward(*self._whole("reward of {0}", row)) for row in rows]

    def steps(self) -> list[StepRecord]:
        """What every optimiser step trained on, in the order of the steps."""
        rows = self._db.select("SELECT step, meta, digest FROM steps ORDER BY id")
        last = {int(step): meta for step, meta in (self._whole("step {0}", row) for row in rows)}
        return [StepRecord(step, _groups(last[step])) for step in sorted(last)]

    def episodes(self) -> set[str]:
        """Names of all episodes that have a call or a reward."""
        query = "SELECT episode FROM calls UNION SELECT episode FROM rewards"
        return {str(name) for (name,) in self._db.select(query)}

    def stats(self) -> Stats:
        """Counts, and the records whose content is not what was written."""
        damaged: list[str] = []
        statuses: dict[str, int] = {}
        episodes: set[str] = set()
        calls = tokens = rewards = 0
        columns = "episode, member, prompt, response, logprobs, meta, digest"
        for *values, digest in self._db.select(f"SELECT {columns} FROM calls ORDER BY id"):
            calls += 1
            tokens += len(values[3]) // 4
            episodes.add(values[0])
            if _digest(*values) != digest or len(values[3]) * 2 != len(values[4]):
                damaged.append(f"call {values[1]} of {values[0]}")
        for episode, meta, digest in self._db.select(
            "SELECT episode, meta, digest FROM rewards", ()
        ):
            rewards += 1
            episodes.add(episode)
            if _digest(episode, meta) != digest:
                damaged.append(f"reward of {episode}")
                continue
            status = json.loads(meta)["status"]
            statuses[status] = statuses.get(status, 0) + 1
        steps = 0
        for step, meta, digest in self._db.select("SELECT step, meta, digest FROM steps"):
            steps += 1
            if _digest(step, meta) != digest:
                damaged.append(f"step {step}")
        return Stats(calls, rewards, len(episodes), tokens, statuses, tuple(damaged), steps)

    def _calls(self, where: str, values: Sequence[Any]) -> Iterator[CallRecord]:
        columns = "episode, member, prompt, response, logprobs, meta, digest"
        for row in self._db.select(f"SELECT {columns} FROM calls {where}", values):
            yield _call(*self._whole("call {1} of {0}", row))

    def _whole(self, name: str, row: Sequence[Any]) -> Sequence[Any]:
        """A row without its digest; DamagedError where it is not what was written."""
        *values, digest = row
        if _digest(*values) != digest:
            raise DamagedError(
                f"{self.url}: {name.format(*values)} is damaged; `python -m rl.pool verify` names "
                "all that are"
            )
        return values

    def close(self) -> None:
        """Let go of the database."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _call_row(call: CallRecord) -> tuple[bytes, bytes, bytes, str]:
    if len(call.logprobs) != len(call.response_ids):
        raise ValueError(
            f"call {call.index} of {call.episode}: {len(call.response_ids)} ids but "
            f"{len(call.logprobs)} log-probs"
        )
    meta = {
        "group": call.group,
        "versions": call.versions,
        "finish_reason": call.finish_reason,
        "t_start": call.t_start,
        "t_end": call.t_end,
        "temperature": call.temperature,
        "constrained": call.constrained,
        "tokenizer_hash": call.tokenizer_hash,
        "routed_experts": call.routed_experts,
    }
    ids = (array("i", call.prompt_ids).tobytes(), array("i", call.response_ids).tobytes())
    return (*ids, array("d", call.logprobs).tobytes(), json.dumps(meta))


def _call(
    episode: str, index: int, prompt: bytes, response: bytes, logprobs: bytes, meta: str
) -> CallRecord:
    found = json.loads(meta)
    routed = found["routed_experts"]
    return CallRecord(
        episode=episode,
        group=found["group"],
        index=index,
        prompt_ids=tuple(array("i", bytes(prompt))),
        response_ids=tuple(array("i", bytes(response))),
        logprobs=tuple(array("d", bytes(logprobs))),
        versions=tuple((a, b, version) for a, b, version in found["versions"]),
        finish_reason=found["finish_reason"],
        t_start=found["t_start"],
        t_end=found["t_end"],
        temperature=found["temperature"],
        constrained=found["constrained"],
        tokenizer_hash=found["tokenizer_hash"],
        routed_experts=None if routed is None else tuple(tuple(row) for row in routed),
    )


def _reward(episode: str, meta: str) -> RewardRecord:
    found = json.loads(meta)
    process = tuple((int(index), float(value)) for index, value in found.pop("process"))
    scripts = tuple(ScriptOutcome(**values) for values in found.pop("scripts", ()))
    return RewardRecord(episode=episode, process=process, scripts=scripts, **found)


def _groups(meta: str) -> tuple[GroupRecord, ...]:
    return tuple(GroupRecord(task, domain, tuple(ids)) for task, domain, ids in json.loads(meta))


def _digest(*values: Any) -> str:
    whole = hashlib.sha256()
    for value in values:
        part = bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode()
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    import argparse
    import os
    import sys

    parser = argparse.ArgumentParser(prog="python -m rl.pool", description=__doc__)
    parser.add_argument("what", choices=["stats", "export", "verify"])
    parser.add_argument("pool", help="file or postgresql:// URL")
    options = parser.parse_args(arguments)
    try:
        with closing(Pool(options.pool, create=False)) as pool:
            code = _command(pool, options.what)
            sys.stdout.flush()
            return code
    except (ConfigError, InfraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, DamagedError) else error.exit_code
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(pool: Pool, what: str) -> int:
    if what == "export":
        for call in pool.all_calls():
            print(json.dumps({"kind": "call", **asdict(call)}))
        for reward in pool.rewards():
            print(json.dumps({"kind": "reward", **asdict(reward)}))
        for step in pool.steps():
            print(json.dumps({"kind": "step", **asdict(step)}))
        return 0
    stats = pool.stats()
    if what == "stats":
        print(json.dumps(asdict(stats)))
        return 0
    for name in stats.damaged:
        print(f"damaged: {name}")
    print(f"{stats.calls} calls and {stats.rewards} rewards, {len(stats.damaged)} damaged")
    return 3 if stats.damaged else 0


if __name__ == "__main__":
    raise SystemExit(main())
