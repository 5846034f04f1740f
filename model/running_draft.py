"""Speculation inside a running batch: what it keeps of each row between two steps.

A step draws from logits that the last one left. With guesses there are k + 1 positions of logits a
row: as many of them are drawn from as guesses stand. Guesses may be dropped at any time, since the
first position is what a plain step would have left. Native code only.

Shapes: B rows, k guesses, j = k + 1 positions, M = B·j tokens, T tokens of a prompt, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from model.errors import ModelError
from model.generate import Row, sampler_of
from model.mtp import MTP
from model.native.draft import NativeDrafter
from model.native.step import NativeModel
from model.sampling import Sampler
from model.slots import JoinAttend, SlotCache
from model.speculative import Guesses, Numbers, Rule, Tail, match, may_speculate

MOST_ROWS = 8
"""With more rows, checking guesses costs more than it saves (docs/mtp.md)."""


@dataclass(eq=False)
class _Known:
    """Hidden states (W, H) of a row's columns from `start` on that no guess has used yet; guesses
    know nothing before `first`."""

    numbers: Numbers
    hidden_WH: Tensor
    start: int
    first: int


@dataclass(frozen=True)
class _Pending:
    guesses: Guesses
    policy_MV: Tensor
    hidden_BjH: Tensor


@dataclass(frozen=True)
class Drawn:
    """New ids and log-probs of each row, and the newest id of each (B), which is not fed yet."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    newest_B: Tensor


@dataclass
class Counts:
    """Rounds that checked guesses, guesses checked, guesses that stood."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Speculation:
    """Guesses for the rows of one running batch, whose first slots they have in the given order.

    `guesses` a round, as long as no more than `most_rows` rows write and all of them may speculate.
    Raises ModelError where the modules do not fit, and NativeUnavailableError (model.native.build)
    where native code cannot run them.
    """

    def __init__(
        self,
        native: NativeModel,
        mtp: MTP,
        *,
        guesses: int = 3,
        most_rows: int = MOST_ROWS,
        rule: Rule = "match",
    ) -> None:
        if guesses < 1:
            raise ModelError(f"--draft-tokens is {guesses}; it must be ≥ 1")
        self._native, self._drafter = native, NativeDrafter(native, mtp)
        self.guesses, self.most_rows, self.rule = guesses, most_rows, rule
        self.counts = Counts()
        self._known: WeakKeyDictionary[Row, _Known] = WeakKeyDictionary()
        self._pending: _Pending | None = None
        self._sampler: tuple[list[Row], Sampler] | None = None

    def update(self) -> None:
        """Follow new weights; guesses made with the old ones are dropped."""
        self._drafter.update()
        self.drop()

    def begin(self, row: Row, hidden_TH: Tensor, start: int) -> None:
        """A row has read its prompt; the hidden states of its tokens from `start` on."""
        numbers = Numbers.of(row.request, self.rule, self.guesses)
        self._known[row] = _Known(numbers, hidden_TH, start, start)

    def copy(self, source: Row, row: Row) -> None:
        """A row has the prompt that `source` has just read."""
        known = self._known[source]
        self.begin(row, known.hidden_WH, known.start)

    def fed(self, rows: Sequence[Row], hidden_BH: Tensor, lengths: Sequence[int]) -> None:
        """A plain step has fed column `lengths[b]` of each row: guesses begin anew there."""
        for row, hidden_H, column in zip(rows, hidden_BH, lengths, strict=True):
            known = self._known[row]
            known.hidden_WH, known.start, known.first = hidden_H[None], column, column

    def move(self, source: int, target: int) -> None:
        """Slot `target` becomes slot `source`."""
        self._drafter.move(source, target)

    def wants(self, rows: Sequence[Row]) -> bool:
        """Whether the next step of these rows is to be fed with guesses."""
        return 0 < len(rows) <= self.most_rows and all(
            may_speculate(r.request, self.rule) for r in rows
        )

    def drop(self) -> None:
        """Forget guesses that are not judged: rows came or went."""
        self._pending = None

    @property
    def pending(self) -> bool:
        """Whether there are guesses to judge."""
        return self._pending is not None

    def feed(
        self, rows: Sequence[Row], lengths: Sequence[int], cache: SlotCache, context: int
    ) -> Tensor:
        """Guess, and feed each row's newest id and its guesses from column `lengths[b]` on; logits
        (B, V) after the newest ids. The cache has room for them (`guesses` more than a plain step
        needs)."""
        k = min(self.guesses, context - max(lengths) - 1)
        ids = [[*row.request.prompt_ids, *row.ids] for row in rows]
        known = [self._known[row] for row in rows]
        if k:
            tails = [
                Tail(own, x.hidden_WH, x.start, x.first) for own, x in zip(ids, known, strict=True)
            ]
            uniform_Bk = self._numbers("draft", rows, k)
            guesses = self._drafter.propose(tails, self._sampler_of(rows), uniform_Bk)
        else:
            vocab = self._native.config.vocab_size
            guesses = Guesses(torch.empty(len(rows), 0).long(), torch.empty(len(rows), 0, vocab))
        newest_B1 = torch.tensor([[own[-1]] for own in ids])
        attend = JoinAttend(cache, 0, lengths, [k + 1] * len(rows))
        ids_M = torch.cat([newest_B1, guesses.id_Bk], dim=1).flatten()
        x_MH, policy_MV = self._native.hidden_and_logits(ids_M, attend.column_M, attend)
        for x, column in zip(known, lengths, strict=True):
            x.start = column  # the hidden states before were used up
        self._pending = _Pending(guesses, policy_MV, x_MH.view(len(rows), k + 1, -1))
        for x, hidden_jH in zip(known, self._pending.hidden_BjH, strict=True):
            x.hidden_WH = hidden_jH[:1]
        return policy_MV.view(len(rows), k + 1, -1)[:, 0]

    def draw(self, rows: Sequence[Row]) -> Drawn:
        """Judge the pending guesses of the same rows."""
        pending = self._pending
        assert pending is not None
        self._pending = None
        guesses, k = pending.guesses, pending.guesses.id_Bk.shape[1]
        sampler, final_Bj = self._sampler_of(rows), self._numbers("final", rows, k + 1)
        if self.rule == "match":
            made = match(self._native, sampler, pending.policy_MV, guesses.id_Bk, final_Bj)
        else:
            accept_Bk = self._numbers("accept", rows, k)
            made = self._drafter.judge(sampler, pending.policy_MV, guesses, accept_Bk, final_Bj)
        counts = made.count_B.tolist()
        ids = [
            [*guessed[:count], last]
            for guessed, count, last in zip(
                guesses.id_Bk.tolist(), counts, made.next_B.tolist(), strict=True
            )
        ]
        logprobs = [
            own[: count + 1] for own, count in zip(made.logp_Bj.tolist(), counts, strict=True)
        ]
        for row, hidden_jH, count in zip(rows, pending.hidden_BjH, counts, strict=True):
            self._known[row].hidden_WH = hidden_jH[: count + 1]
        self.counts.rounds += len(rows)
        self.counts.drafted += k * len(rows)
        self.counts.accepted += sum(counts)
        return Drawn(ids, logprobs, made.next_B)

    def _numbers(self, kind: str, rows: Sequence[Row], count: int) -> Tensor:
        """The next numbers of each row (B, count)."""
        parts = []
        for row in rows:
            numbers: Tensor = getattr(self._known[row].numbers, kind)
            parts.append(numbers[len(row.ids) : len(row.ids) + count])
        return torch.stack(parts)

    def _sampler_of(self, rows: Sequence[Row]) -> Sampler:
        if self._sampler is None or self._sampler[0] != list(rows):
            sampler = sampler_of(rows, self._native.config.vocab_size, torch.device("cpu"))
            self._sampler = (list(rows), sampler)
        return self._sampler[1]
