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
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from model.errors import ModelError
from model.generate import Row, sampler_of
from model.mtp import MTP
from model.native.build import NativeUnavailableError
from model.native.draft import NativeDrafter
from model.native.step import NativeModel
from model.sampling import Sampler
from model.slots import SlotCache
from model.speculative import Guesses, Numbers, Rule, Tail, may_speculate
from model.transformer import Transformer

MOST_ROWS = 8
"""With more rows, even guesses that all stand save next to nothing."""
REST = 96
"""Plain steps after guesses did not pay, before they are tried again."""
_MEMORY, _TRIAL = 0.9, 8  # of the mean of tokens a round; rounds before it is believed


def break_even(guesses: int, rows: int) -> float:
    """Tokens a round that guessing must give to cost what plain steps do, in native code: checking
    and making a guess costs a share of a step that grows with the rows (docs/mtp.md)."""
    return 1 + guesses * (0.62 + 0.035 * rows)


@dataclass(eq=False)
class _Known:
    """Hidden states (W, H) of a row's columns from `start` on that no guess has used yet; guesses
    know nothing before `first`. `numbers` as in `Numbers`, by name."""

    numbers: dict[str, list[float]]
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


@dataclass(frozen=True)
class DraftOptions:
    """Modules to guess with, and the settings of `Speculation`."""

    mtp: MTP
    guesses: int = 3
    most_rows: int = MOST_ROWS
    rule: Rule = "match"


@dataclass
class Counts:
    """Rounds that checked guesses, guesses checked, guesses that stood."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Guessing(Protocol):
    """What a running batch tells of its rows, and asks for: `Speculation`, or `NO_GUESSES`."""

    @property
    def counts(self) -> Counts: ...

    @property
    def guesses(self) -> int:
        """A round, at most; 0 for no rounds."""
        ...

    @property
    def pending(self) -> bool:
        """Whether there are guesses to judge."""
        ...

    def begin(self, row: Row, hidden_TH: Tensor, start: int) -> None:
        """A row has read its prompt; the hidden states of its tokens from `start` on."""
        ...

    def copy(self, source: Row, row: Row) -> None:
        """A row has the prompt that `source` has just read."""
        ...

    def fed(self, rows: Sequence[Row], hidden_BH: Tensor, lengths: Sequence[int]) -> None:
        """A plain step has fed column `lengths[b]` of each row."""
        ...

    def move(self, source: int, target: int) -> None:
        """Slot `target` becomes slot `source`."""
        ...

    def drop(self) -> None:
        """Forget guesses that are not judged: rows came or went."""
        ...

    def wants(self, rows: Sequence[Row]) -> bool:
        """Whether the next step of these rows is to be fed with guesses."""
        ...

    def feed(self, rows: Sequence[Row], lengths: Sequence[int], cache: SlotCache) -> Tensor:
        """Guess, and feed each row's newest id and its guesses from column `lengths[b]` on; logits
        (B, V) after the newest ids. The cache has room for as many guesses as the context has."""
        ...

    def draw(self, rows: Sequence[Row]) -> Drawn:
        """Judge the pending guesses of the same rows."""
        ...


def follow(
    old: Guessing, options: DraftOptions | None, native: NativeModel | None, model: Transformer
) -> tuple[Guessing, str]:
    """Guessing with the weights as they are now, and why there is none. Raises ModelError where the
    modules do not fit the model."""
    if options is None:
        return NO_GUESSES, ""
    if native is None:
        return NO_GUESSES, ", no guesses (they need native code)"
    if isinstance(old, Speculation) and old.native is native:
        old.update()
        return old, ""
    options.mtp.check_fits(model)
    try:
        return Speculation(native, options), ""
    except NativeUnavailableError as error:
        return NO_GUESSES, f", no guesses ({error})"


class _NoGuesses:
    """Every step is a plain one."""

    counts, guesses, pending = Counts(), 0, False

    def begin(self, row: Row, hidden_TH: Tensor, start: int) -> None:
        pass

    def copy(self, source: Row, row: Row) -> None:
        pass

    def fed(self, rows: Sequence[Row], hidden_BH: Tensor, lengths: Sequence[int]) -> None:
        pass

    def move(self, source: int, target: int) -> None:
        pass

    def drop(self) -> None:
        pass

    def wants(self, rows: Sequence[Row]) -> bool:
        return False

    def feed(self, rows: Sequence[Row], lengths: Sequence[int], cache: SlotCache) -> Tensor:
        raise AssertionError("nothing is guessed")

    def draw(self, rows: Sequence[Row]) -> Drawn:
        raise AssertionError("nothing is guessed")


NO_GUESSES = _NoGuesses()


class Speculation:
    """Guesses for the rows of one running batch, whose first slots they have in the given order.

    As many guesses a round as the options say, as long as no more than `most_rows` rows write, all
    of them may speculate, and it pays: where a round's tokens stay below `break_even`, `REST` plain
    steps follow. With rule "match" none of this can be seen in the replies.
    """

    def __init__(self, native: NativeModel, options: DraftOptions) -> None:
        if options.guesses < 1:
            raise ModelError(f"{options.guesses} guesses a step; it must be ≥ 1")
        self.native, self._drafter = native, NativeDrafter(native, options.mtp)
        self.guesses, self.most_rows, self.rule = options.guesses, options.most_rows, options.rule
        self.counts = Counts()
        self._known: WeakKeyDictionary[Row, _Known] = WeakKeyDictionary()
        self._pending: _Pending | None = None
        self._gain, self._trials, self._resting = 0.0, 0, 0
        self._settings: tuple[tuple[object, ...], Sampler, Sampler] | None = None

    def update(self) -> None:
        """Follow new weights; guesses made with the old ones are dropped."""
        self._drafter.update()
        self.drop()

    def begin(self, row: Row, hidden_TH: Tensor, start: int) -> None:
        made = Numbers.of(row.request, self.rule, self.guesses)
        numbers = {name: x.tolist() for name, x in vars(made).items()}
        self._known[row] = _Known(numbers, hidden_TH, start, start)

    def copy(self, source: Row, row: Row) -> None:
        known = self._known[source]
        self.begin(row, known.hidden_WH, known.start)

    def fed(self, rows: Sequence[Row], hidden_BH: Tensor, lengths: Sequence[int]) -> None:
        # Guesses begin anew there: what came before is lost to them.
        for row, hidden_H, column in zip(rows, hidden_BH, lengths, strict=True):
            known = self._known[row]
            known.hidden_WH, known.start, known.first = hidden_H[None], column, column

    def move(self, source: int, target: int) -> None:
        self._drafter.move(source, target)

    def wants(self, rows: Sequence[Row]) -> bool:
        if not 0 < len(rows) <= self.most_rows:
            return False
        if not all(may_speculate(row.request, self.rule) for row in rows):
            return False
        if self._resting:
            self._resting -= 1
            return False
        if self._trials >= _TRIAL and self._gain < break_even(self.guesses, len(rows)):
            self._gain, self._trials, self._resting = 0.0, 0, REST
            return False
        return True

    def drop(self) -> None:
        self._pending = None

    @property
    def pending(self) -> bool:
        return self._pending is not None

    def feed(self, rows: Sequence[Row], lengths: Sequence[int], cache: SlotCache) -> Tensor:
        k = min(self.guesses, self.native.config.max_position_embeddings - max(lengths) - 1)
        known = [self._known[row] for row in rows]
        tails = [_tail(row, x) for row, x in zip(rows, known, strict=True)]
        uniform_kB = self._numbers("draft", rows, k).t().contiguous()
        guesses, hidden_BjH, policy_MV = self._drafter.feed(
            tails, self._samplers(rows, k)[0], uniform_kB, cache, torch.tensor(lengths)
        )
        self._pending = _Pending(guesses, policy_MV, hidden_BjH)
        for x, column, hidden_jH in zip(known, lengths, hidden_BjH, strict=True):
            x.hidden_WH, x.start = hidden_jH[:1], column
            x.first = x.first if k else column  # what was not used is given up
        return policy_MV.view(len(rows), k + 1, -1)[:, 0]

    def draw(self, rows: Sequence[Row]) -> Drawn:
        pending = self._pending
        assert pending is not None
        self._pending = None
        guessed, k = pending.guesses.id_Bk.tolist(), pending.guesses.id_Bk.shape[1]
        sampler, wide = self._samplers(rows, k)
        final_Bj = self._numbers("final", rows, k + 1)
        if self.rule == "match":
            drawn, logps = self._draw_all(wide, pending.policy_MV, final_Bj)
            counts = [_agreement(a, b) for a, b in zip(drawn, guessed, strict=True)]
        else:
            accept_Bk = self._numbers("accept", rows, k)
            made = self._drafter.judge(
                sampler, pending.policy_MV, pending.guesses, accept_Bk, final_Bj
            )
            counts, logps = made.count_B.tolist(), made.logp_Bj.tolist()
            drawn = [
                [*own[:count], last]
                for own, count, last in zip(guessed, counts, made.next_B.tolist(), strict=True)
            ]
        for row, hidden_jH, count in zip(rows, pending.hidden_BjH, counts, strict=True):
            self._known[row].hidden_WH = hidden_jH[: count + 1]
        self._learn(counts, k)
        ids = [own[: count + 1] for own, count in zip(drawn, counts, strict=True)]
        logprobs = [own[: count + 1] for own, count in zip(logps, counts, strict=True)]
        return Drawn(ids, logprobs, torch.tensor([own[-1] for own in ids]))

    def _draw_all(
        self, wide: Sampler, policy_MV: Tensor, final_Bj: Tensor
    ) -> tuple[list[list[int]], list[list[float]]]:
        """What plain decoding would draw in every place, and its log-probs."""
        if wide.any_filter:
            id_M, logp_M, _ = wide.draw(policy_MV, final_Bj.flatten(), None)
        else:
            id_M, logp_M = self.native.draw(wide, policy_MV, final_Bj)
        return id_M.view(final_Bj.shape).tolist(), logp_M.view(final_Bj.shape).tolist()

    def _learn(self, counts: Sequence[int], k: int) -> None:
        """Take note of how a round went."""
        kept = min(_MEMORY, self._trials / (self._trials + 1))  # a plain mean at first
        self._gain = kept * self._gain + (1 - kept) * (1 + sum(counts) / len(counts))
        self._trials += 1
        self.counts.rounds += len(counts)
        self.counts.drafted += k * len(counts)
        self.counts.accepted += sum(counts)

    def _numbers(self, kind: str, rows: Sequence[Row], count: int) -> Tensor:
        """The next numbers of each row (B, count)."""
        parts = [
            self._known[row].numbers[kind][len(row.ids) : len(row.ids) + count] for row in rows
        ]
        return torch.tensor(parts, dtype=torch.float64).view(len(rows), count)

    def _samplers(self, rows: Sequence[Row], k: int) -> tuple[Sampler, Sampler]:
        """Settings of the rows, and of each row's k + 1 positions."""
        key = (k, *rows)
        if self._settings is None or self._settings[0] != key:
            sampler = sampler_of(rows, self.native.config.vocab_size, torch.device("cpu"))
            wide = sampler.take(torch.arange(len(rows)).repeat_interleave(k + 1))
            self._settings = (key, sampler, wide)
        return self._settings[1:]


def _tail(row: Row, known: _Known) -> Tail:
    """With as many ids as there are hidden states."""
    count, prompt = len(known.hidden_WH), row.request.prompt_ids
    ids = row.ids[-count:] if count <= len(row.ids) else [*prompt, *row.ids][-count:]
    return Tail(ids, known.hidden_WH, known.start, known.first, known.start + 1)


def _agreement(drawn: Sequence[int], guessed: Sequence[int]) -> int:
    """How many guesses are what was drawn, from the first on."""
    count = 0
    while count < len(guessed) and guessed[count] == drawn[count]:
        count += 1
    return count
