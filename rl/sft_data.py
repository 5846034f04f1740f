"""Supervised data: generated ahead of time in many processes, then packed in sorted batches.

An example is prompt ids followed by reply ids; the loss is on the reply. Everything is rendered by
`model.chat_format`, exactly as the server and the rollout render it. No torch here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent_tools.mle_bench.facts import TaskFacts
from model.chat_format import ChatFormatError, render_ids, render_reply_ids
from model.tokenizer import Tokenizer
from rl.envs.mle.grammar import invented_facts, sample_script
from rl.envs.mle.prompts import Scaffold, task_messages
from rl.errors import ConfigError
from rl.sft_config import PolicySource
from rl.splits import held_out_ids, refuse_held_out_text
from rl.types import Message

Ids = NDArray[np.int32]
CHUNK = 500

Job = TypeVar("Job")


@dataclass(frozen=True)
class Examples:
    """Many examples in one flat array: example i is `flat[start[i]:start[i+1]]`, of which the first
    `prompt[i]` ids are prompt (no loss)."""

    flat: Ids
    start: NDArray[np.int64]
    prompt: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.start)

    @property
    def trained_tokens(self) -> int:
        return int(self.lengths.sum() - self.prompt.sum())


@dataclass(frozen=True)
class MicroBatch:
    """Padded rows of one backward pass: `ids` (B, T), true `lengths` (B,), `prompt` (B,) lengths,
    `weight` (B,) per-token loss weight of the row's source."""

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    prompt: NDArray[np.int64]
    weight: NDArray[np.float32]

    @property
    def denominator(self) -> float:
        return float(((self.lengths - self.prompt) * self.weight).sum())


def pack(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], max_length: int) -> Examples:
    """(prompt ids, reply ids) pairs in one `Examples`; pairs over `max_length` are left out."""
    rows, prompts = [], []
    for prompt_ids, reply_ids in pairs:
        if len(prompt_ids) + len(reply_ids) <= max_length:
            rows.append(np.asarray([*prompt_ids, *reply_ids], dtype=np.int32))
            prompts.append(len(prompt_ids))
    lengths = np.asarray([len(row) for row in rows], dtype=np.int64)
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    return Examples(flat, start, np.asarray(prompts, dtype=np.int64))


def join(parts: Sequence[Examples]) -> Examples:
    """Concatenation, in order."""
    lengths = np.concatenate([part.lengths for part in parts])
    start = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Examples(
        np.concatenate([part.flat for part in parts]),
        start,
        np.concatenate([part.prompt for part in parts]),
    )


def in_processes(make: Callable[[Job], Examples], jobs: Sequence[Job], workers: int) -> Examples:
    """`make` of every job, joined in the order of `jobs`; 0 workers = one a core."""
    workers = min(len(jobs), workers or os.cpu_count() or 1)
    if workers <= 1:
        return join([make(job) for job in jobs])
    # spawn: a fork of a process that has started CUDA is not usable
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return join(list(pool.map(make, jobs)))


# ------------------------------------------------------------------ policy scripts


@dataclass(frozen=True)
class PolicyJob:
    """One chunk of grammar scripts for a worker process."""

    seed: str
    count: int
    invented: float
    facts: tuple[TaskFacts, ...]
    scaffold: Scaffold
    tokenizer_json: str
    max_length: int


def policy_messages(rng: random.Random, job: PolicyJob) -> list[Message]:
    """System, user (description) and assistant (script) of one random example."""
    if job.facts and rng.random() >= job.invented:
        facts = rng.choice(job.facts)
    else:
        facts = invented_facts(rng)
    script = sample_script(facts, rng)
    return [*task_messages(facts, job.scaffold), {"role": "assistant", "content": script}]


def policy_chunk(job: PolicyJob) -> Examples:
    """Runs in a worker process; the same job gives the same examples."""
    tokenizer = _tokenizer(job.tokenizer_json)
    rng = random.Random(job.seed)

    def pairs() -> Iterator[tuple[list[int], list[int]]]:
        for _ in range(job.count):
            *prompt, reply = policy_messages(rng, job)
            yield render_ids(prompt, None, tokenizer), render_reply_ids(reply, tokenizer)

    return pack(pairs(), job.max_length)


@lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer(tokenizer_json)


def policy_examples(
    source: PolicySource,
    *,
    count: int,
    seed: str,
    facts: Sequence[TaskFacts],
    scaffold: Scaffold,
    tokenizer: Tokenizer,
    max_length: int,
    workers: int,
) -> Examples:
    """`count` scripts, generated by `workers` processes (0 = one a core); order is fixed."""
    jobs = [
        PolicyJob(
            seed=f"{seed}/{first}",
            count=min(CHUNK, count - first),
            invented=source.invented,
            facts=tuple(facts),
            scaffold=scaffold,
            tokenizer_json=tokenizer.to_str(),
            max_length=max_length,
        )
        for first in range(0, count, CHUNK)
    ]
    return in_processes(policy_chunk, jobs, workers)


def policy_texts(
    count: int, seed: str, invented: float, facts: Sequence[TaskFacts], scaffold: Scaffold
) -> Iterator[str]:
    """Plain texts of prompts and scripts, to train a tokenizer on."""
    rng = random.Random(seed)
    job = PolicyJob(seed, count, invented, tuple(facts), scaffold, "", 0)
    for _ in range(count):
        for message in policy_messages(rng, job):
            yield str(message["content"])


# ------------------------------------------------------------------ dialogues


def read_dialogues(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; ConfigError names the line that is not a record."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; make the dialogues first")
    records = []
    held_out = held_out_ids()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            refuse_held_out_text(line, f"{path} line {number}", held_out)
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path} line {number}: not JSON; remove the line") from error
            if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
                raise ConfigError(f'{path} line {number}: no "messages" list; mend the record')
            records.append(record)
    if not records:
        raise ConfigError(f"{path}: holds no dialogue; make the dialogues first")
    return records


def dialogue_pairs(
    record: Mapping[str, Any], tokenizer: Tokenizer
) -> Iterator[tuple[list[int], list[int]]]:
    """One (prompt, reply) pair an assistant turn, each with the prompt the server would build."""
    messages = record["messages"]
    tools = record.get("tools")
    for index, message in enumerate(messages):
        if message.get("role") == "assistant" and not message.get("no_loss", False):
            yield (
                render_ids(messages[:index], tools, tokenizer),
                render_reply_ids(message, tokenizer),
            )


@dataclass(frozen=True)
class DialogueJob:
    """Some records of a JSONL file for a worker process; `first` is the number of the first."""

    path: Path
    first: int
    records: Sequence[dict[str, Any]]
    tokenizer_json: str
    max_length: int


def dialogue_chunk(job: DialogueJob) -> Examples:
    """All trained assistant turns of the job's records; runs in a worker process."""
    tokenizer = _tokenizer(job.tokenizer_json)
    pairs: list[tuple[list[int], list[int]]] = []
    for number, record in enumerate(job.records, job.first):
        try:
            found = list(dialogue_pairs(record, tokenizer))
        except ChatFormatError as error:
            raise ConfigError(f"{job.path} record {number}: {error}") from error
        for prompt, reply in found:
            if len(prompt) + len(reply) > job.max_length:
                raise ConfigError(
                    f"{job.path} record {number}: {len(prompt) + len(reply)} tokens, over "
                    f"max_length {job.max_length}; shorten the dialogue or raise max_length"
                )
        pairs += found
    return pack(pairs, job.max_length)


def dialogue_examples(
    path: Path, tokenizer: Tokenizer, max_length: int, workers: int = 1
) -> Examples:
    """All trained assistant turns of a JSONL file, tokenised by `workers` processes (0 = one a
    core); ConfigError if one is longer than `max_length`."""
    records = read_dialogues(path)
    return in_processes(
        dialogue_chunk,
        [
            DialogueJob(
                path, first + 1, records[first : first + CHUNK], tokenizer.to_str(), max_length
            )
            for first in range(0, len(records), CHUNK)
        ],
        workers,
    )


def dialogue_texts(path: Path) -> Iterator[str]:
    """Texts of a JSONL file (tools included), to train a tokenizer on."""
    for record in read_dialogues(path):
        for message in record["messages"]:
            yield str(message.get("content") or "")
            for call in message.get("tool_calls") or []:
                yield json.dumps(call.get("function", call))
        yield json.dumps(record.get("tools") or [], ensure_ascii=False)


# ------------------------------------------------------------------ batches


class Mixer:
    """Draws whole batches from several sources by share; each source is a fresh random order an
    epoch. The same seed gives the same batches."""

    def __init__(
        self,
        sources: Sequence[tuple[Examples, float, float]],
        *,
        batch: int,
        micro_tokens: int,
        seed: int,
    ) -> None:
        """sources: (examples, share, token weight)."""
        total = sum(share for _, share, _ in sources)
        self._sources = [(ex, share / total, weight) for ex, share, weight in sources]
        self._batch = batch
        self._micro_tokens = micro_tokens
        self._rng = np.random.default_rng(seed)
        self._order = [np.zeros(0, np.int64) for _ in sources]
        self._debt = np.zeros(len(sources))
        self.epochs = [0] * len(sources)

    def next(self) -> list[MicroBatch]:
        """The micro-batches of one optimiser step, each of at most `micro_tokens` padded tokens."""
        self._debt += [share * self._batch for _, share, _ in self._sources]
        counts = np.floor(self._debt).astype(int)
        while counts.sum() < self._batch:
            counts[int(np.argmax(self._debt - counts))] += 1
        self._debt -= counts
        picks = [(s, int(i)) for s, n in enumerate(counts) for i in self._take(s, int(n))]
        return list(self._micro_batches(picks))

    def _take(self, source: int, count: int) -> NDArray[np.int64]:
        while len(self._order[source]) < count:
            fresh = self._rng.permutation(len(self._sources[source][0])).astype(np.int64)
            self._order[source] = np.concatenate([self._order[source], fresh])
            self.epochs[source] += 1
        taken = self._order[source][:count]
        self._order[source] = self._order[source][count:]
        return taken

    def _micro_batches(self, picks: list[tuple[int, int]]) -> Iterator[MicroBatch]:
        lengths = np.asarray([self._length(s, i) for s, i in picks])
        order = np.argsort(lengths, kind="stable")[::-1]
        first = 0
        while first < len(order):
            widest = _round_up(int(lengths[order[first]]))
            rows = max(1, self._micro_tokens // widest)
            yield self._pad([picks[j] for j in order[first : first + rows]], widest)
            first += rows

    def _length(self, source: int, index: int) -> int:
        start = self._sources[source][0].start
        return int(start[index + 1] - start[index])

    def _pad(self, rows: Sequence[tuple[int, int]], width: int) -> MicroBatch:
        return pad_rows([(self._sources[s][0], i, self._sources[s][2]) for s, i in rows], width)


def pad_rows(rows: Sequence[tuple[Examples, int, float]], width: int) -> MicroBatch:
    """(examples, index, token weight) rows → right-padded arrays of `width` columns."""
    ids = np.zeros((len(rows), width), np.int64)
    lengths = np.zeros(len(rows), np.int64)
    prompt = np.zeros(len(rows), np.int64)
    weight = np.zeros(len(rows), np.float32)
    for row, (examples, index, token_weight) in enumerate(rows):
        piece = examples.flat[examples.start[index] : examples.start[index + 1]]
        ids[row, : len(piece)] = piece
        lengths[row] = len(piece)
        prompt[row] = examples.prompt[index]
        weight[row] = token_weight
    return MicroBatch(ids, lengths, prompt, weight)


def _round_up(length: int, multiple: int = 16) -> int:
    # few distinct shapes: allocator and kernels are reused
    return -(-length // multiple) * multiple
