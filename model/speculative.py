"""Speculative decoding: MTP modules guess the next tokens, the model checks them in one pass.

A guess is accepted with probability min(1, p / q), where p is what the policy gives the token at
the request's temperature and q what the draft gave it; at the first that is not, the token is drawn
from max(p − q, 0), normed; after k accepted ones one more comes from the policy. What comes out has
the policy's distribution whatever the drafts are worth (Leviathan et al. 2023, Chen et al. 2023).
Greedy is the limit: a guess is accepted where it is the policy's likeliest token.

Every row's random numbers belong to the position of a token, so a reply depends on its own seed and
on the drafts, not on the other rows. `Rule` "match" needs no q: the token is the one that plain
decoding draws with the same seed, and a guess is accepted where it is that token. Replies are then
those of plain decoding, token for token, and fewer guesses are accepted.

Shapes: B rows, k guesses a round, j = k + 1 positions checked, M tokens, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import ModelError
from model.generate import Generation, GenRequest, Row, sampler_of
from model.mtp import MTP, Shared
from model.sampling import Sampler, uniforms
from model.slots import JoinAttend, SlotCache
from model.transformer import Transformer
from model.window import has_windows

Rule = Literal["reject", "match"]
_STREAMS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # apart from a seed's own numbers


# ------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class Numbers:
    """A request's uniform numbers, one of each kind for every position of its reply.

    `final` is what plain decoding draws with; `draft` draws guesses and `accept` judges them.
    """

    final: Tensor
    draft: Tensor
    accept: Tensor

    @classmethod
    def of(cls, request: GenRequest, rule: Rule, spare: int) -> Numbers:
        """For `max_new_tokens` positions and `spare` beyond, which are guessed at but not kept."""
        steps = request.max_new_tokens + spare
        final = uniforms(request.seed, steps)
        if rule == "match":
            return cls(final, final, final)
        seeds = [None if request.seed is None else (request.seed ^ s) >> 1 for s in _STREAMS]
        return cls(final, uniforms(seeds[0], steps), uniforms(seeds[1], steps))


@dataclass(frozen=True)
class Accepted:
    """How many guesses of each row stand (B), the token after them (B), and the policy's log-prob
    of every token that comes out: position i ≤ count of (B, j)."""

    count_B: Tensor
    next_B: Tensor
    logp_Bj: Tensor


def accept(
    sampler: Sampler,
    policy_BjV: Tensor,
    draft_BkV: Tensor,
    id_Bk: Tensor,
    accept_Bk: Tensor,
    final_Bj: Tensor,
) -> Accepted:
    """Exact rejection sampling of guesses that were drawn from the draft's softmax at the rows'
    temperatures. Logits in; `accept_Bk` and `final_Bj` are uniform in [0, 1)."""
    k = id_Bk.shape[1]
    heat_B11 = sampler.temperature_B1[:, :, None].to(policy_BjV.dtype)
    logp_BjV = (policy_BjV / heat_B11).log_softmax(-1)
    p_BjV, q_BkV = logp_BjV.exp(), (draft_BkV / heat_B11).softmax(-1)
    p_Bk = p_BjV[:, :k].gather(2, id_Bk[:, :, None])[:, :, 0]
    q_Bk = q_BkV.gather(2, id_Bk[:, :, None])[:, :, 0]
    best_Bj = policy_BjV.argmax(-1)
    stands_Bk = accept_Bk * q_Bk < p_Bk
    stands_Bk = torch.where(sampler.greedy_B[:, None], id_Bk == best_Bj[:, :k], stands_Bk)
    count_B = stands_Bk.long().cumprod(1).sum(1)
    at_B = torch.arange(len(count_B), device=count_B.device)
    weight_BV = p_BjV[at_B, count_B]
    if k:
        rest_BV = (weight_BV - q_BkV[at_B, count_B.clamp_max(k - 1)]).clamp_min(0)
        # Empty where rounding alone made a guess fail: draft and policy are then the same.
        some_B = (count_B < k) & (rest_BV.sum(-1) > 0)
        weight_BV = torch.where(some_B[:, None], rest_BV, weight_BV)
    drawn_B = _invert(weight_BV, final_Bj[at_B, count_B])
    next_B = torch.where(sampler.greedy_B, best_Bj[at_B, count_B], drawn_B)
    return _accepted(count_B, next_B, id_Bk, logp_BjV)


def match(
    checker: Checker, sampler: Sampler, policy_MV: Tensor, id_Bk: Tensor, final_Bj: Tensor
) -> Accepted:
    """Draw every position as plain decoding would; guesses stand as far as they are the same."""
    batch, j = final_Bj.shape
    wide = sampler.take(torch.arange(batch, device=id_Bk.device).repeat_interleave(j))
    uniform_M = final_Bj.reshape(-1)
    if sampler.any_filter:
        drawn_M, logp_M, _ = wide.draw(policy_MV, uniform_M, None)
    else:
        drawn_M, logp_M = checker.draw(wide, policy_MV, uniform_M)
    drawn_Bj = drawn_M.view(batch, j)
    count_B = (drawn_Bj[:, : j - 1] == id_Bk).long().cumprod(1).sum(1)
    next_B = drawn_Bj.gather(1, count_B[:, None])[:, 0]
    return Accepted(count_B, next_B, logp_M.view(batch, j))


def _accepted(count_B: Tensor, next_B: Tensor, id_Bk: Tensor, logp_BjV: Tensor) -> Accepted:
    out_Bj = torch.cat([id_Bk, next_B[:, None]], dim=1).scatter(
        1, count_B[:, None], next_B[:, None]
    )
    return Accepted(count_B, next_B, logp_BjV.gather(2, out_Bj[:, :, None])[:, :, 0])


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """As `Sampler` draws: the inverse of the cumulative distribution, in vocabulary order."""
    cumulative_BV = weight_BV.cumsum(-1, dtype=torch.float64)
    point_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True)[:, 0]


# ------------------------------------------------------------------------------- the drafts


@dataclass(frozen=True)
class Tail:
    """What a row's drafts go on from: the model's hidden states (W, H) of its last columns, from
    `start` on, and the row's ids but the first `skipped`, of which the last has no hidden state
    yet. Drafts know nothing of columns before `first`."""

    ids: Sequence[int]
    hidden_WH: Tensor
    start: int
    first: int = 0
    skipped: int = 0

    @property
    def end(self) -> int:
        """Columns with hidden states known."""
        return self.start + len(self.hidden_WH)


@dataclass(frozen=True)
class Guesses:
    """Guessed ids and the logits they were drawn from."""

    id_Bk: Tensor
    logits_BkV: Tensor


class Drafter(Protocol):
    """Guesses for the first B rows of a batch; it keeps what it needs of each row by its place."""

    @property
    def window(self) -> int:
        """How many columns before the new ones a tail must have."""
        ...

    def propose(self, tails: Sequence[Tail], sampler: Sampler, uniform_Bk: Tensor) -> Guesses: ...

    def feed(
        self,
        tails: Sequence[Tail],
        sampler: Sampler,
        uniform_kB: Tensor,
        cache: SlotCache,
        column_B: Tensor,
    ) -> tuple[Guesses, Tensor, Tensor]:
        """`propose`, and the model's pass over each row's newest id and its guesses from column
        `column_B` of its own cache on: guesses, hidden states (B, j, H) and logits (B·j, V)."""
        ...

    def judge(
        self,
        sampler: Sampler,
        policy_MV: Tensor,
        guesses: Guesses,
        accept_Bk: Tensor,
        final_Bj: Tensor,
    ) -> Accepted:
        """`accept`, for the logits of all B·j positions."""
        ...

    def move(self, source: int, target: int) -> None:
        """Row `target` becomes row `source`."""
        ...


class TorchDrafter:
    """Runs the modules as they are. Depth d uses module d; later ones use the last again, on its
    own output, one position further each time."""

    def __init__(self, model: Transformer, mtp: MTP) -> None:
        mtp.check_fits(model)
        self.model, self.mtp, self.shared = model, mtp, Shared.of(model)
        self.window = mtp.count - 1
        self._cache = SlotCache(cache_config(mtp), model.device, model.dtype)
        self._filled = 0

    def propose(self, tails: Sequence[Tail], sampler: Sampler, uniform_Bk: Tensor) -> Guesses:
        device, k = uniform_Bk.device, uniform_Bk.shape[1]
        # Columns of the cache are counted from a tail's first; positions are not.
        ends = [tail.end - tail.first for tail in tails]
        rows, filled = self._cache.rows, self._filled
        self._filled = max(filled, max(ends) + k)
        self._cache.fit(max(len(tails), rows), self._filled, rows, filled)
        counts = [len(tail.hidden_WH) for tail in tails]
        attend = JoinAttend(self._cache, 0, [tail.start - tail.first for tail in tails], counts)
        first_B = torch.tensor([tail.first for tail in tails], device=device)
        position_M = attend.column_M + first_B[attend.row_M]
        last_B = torch.tensor(counts, device=device).cumsum(0) - 1
        h_MH = torch.cat([tail.hidden_WH for tail in tails])
        known = [list(tail.ids) for tail in tails]
        ids: list[Tensor] = []
        logits: list[Tensor] = []
        for d in range(1, k + 1):
            module = self.mtp.layers[min(d, self.mtp.count) - 1]
            again = d - self.mtp.count
            if again > 0:
                starts = [end + again - 1 for end in ends]
                attend = JoinAttend(self._cache, 0, starts, [1] * len(tails))
                position_M, h_MH = attend.column_M + first_B, h_MH[last_B]
                next_M = ids[-1]
                last_B = torch.arange(len(tails), device=device)
            else:
                joined = [
                    id
                    for tail, row in zip(tails, known, strict=True)
                    for id in row[tail.start + d - tail.skipped : tail.end + d - tail.skipped]
                ]
                next_M = torch.tensor(joined, device=device)
            h_MH = module(self.shared, h_MH, next_M, position_M, attend)
            logits_BV = module.logits(self.shared, h_MH[last_B])
            id_B, _, _ = sampler.draw(logits_BV, uniform_Bk[:, d - 1], None)
            for row, id in zip(known, id_B.tolist(), strict=True):
                row.append(id)
            ids.append(id_B)
            logits.append(logits_BV)
        return Guesses(torch.stack(ids, 1), torch.stack(logits, 1))

    def feed(
        self,
        tails: Sequence[Tail],
        sampler: Sampler,
        uniform_kB: Tensor,
        cache: SlotCache,
        column_B: Tensor,
    ) -> tuple[Guesses, Tensor, Tensor]:
        k, batch = uniform_kB.shape
        if k:
            guesses = self.propose(tails, sampler, uniform_kB.t())
        else:
            guesses = _no_guesses(batch, self.model)
        newest_B1 = torch.tensor([[tail.ids[-1]] for tail in tails], device=uniform_kB.device)
        attend = JoinAttend(cache, 0, column_B.tolist(), [k + 1] * batch)
        ids_M = torch.cat([newest_B1, guesses.id_Bk], dim=1).flatten()
        x_MH = self.model.run(ids_M, attend.column_M, attend)
        return guesses, x_MH.view(batch, k + 1, -1), self.model.head(x_MH)

    def judge(
        self,
        sampler: Sampler,
        policy_MV: Tensor,
        guesses: Guesses,
        accept_Bk: Tensor,
        final_Bj: Tensor,
    ) -> Accepted:
        policy_BjV = policy_MV.view(*final_Bj.shape, -1)
        return accept(sampler, policy_BjV, guesses.logits_BkV, guesses.id_Bk, accept_Bk, final_Bj)

    def move(self, source: int, target: int) -> None:
        if source < self._cache.rows:  # otherwise nothing was guessed for it yet
            self._cache.move(source, target, self._filled)


def cache_config(mtp: MTP) -> ModelConfig:
    """Of a key/value cache with one layer a module."""
    return replace(mtp.config, num_hidden_layers=mtp.count)


# --------------------------------------------------------------------------------- a batch


@dataclass(frozen=True)
class Speculated:
    """A reply, and how it was made: rounds (forward passes after the prompt's), guesses that were
    checked, guesses that stood."""

    generation: Generation
    rounds: int
    drafted: int
    accepted: int


@dataclass(eq=False)
class _Live:
    row: Row
    numbers: Numbers
    tail: Tail
    index: int
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Checker(Protocol):
    """What reads prompts and draws: `TorchChecker`, or native code with the model's weights."""

    def run(self, ids_M: Tensor, position_M: Tensor, attend: JoinAttend) -> Tensor: ...

    def head(self, x_MH: Tensor) -> Tensor: ...

    def draw(self, sampler: Sampler, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        """`Sampler.draw` where nothing limits the choice."""
        ...


class TorchChecker:
    """The model as it is."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def run(self, ids_M: Tensor, position_M: Tensor, attend: JoinAttend) -> Tensor:
        return self.model.run(ids_M, position_M, attend)

    def head(self, x_MH: Tensor) -> Tensor:
        return self.model.head(x_MH)

    def draw(self, sampler: Sampler, logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        return sampler.draw(logits_BV, uniform_B, None)[:2]


@torch.inference_mode()
def speculate(
    model: Transformer,
    drafter: Drafter | MTP,
    requests: Sequence[GenRequest],
    *,
    draft_tokens: int = 2,
    rule: Rule = "reject",
    checker: Checker | None = None,
    version: int = 0,
) -> list[Speculated]:
    """Continue every prompt as one batch; rows accept different counts and go on from their own.

    Log-probs are those of `Engine.generate`: the policy's, unmasked, at the request's temperature.
    A native drafter comes with its `NativeModel` as `checker`. Raises ModelError for requests that
    guesses do not go with (`may_speculate`), and where the drafts do not fit.
    """
    if draft_tokens < 1:
        raise ModelError(f"draft_tokens is {draft_tokens}; it must be ≥ 1")
    if has_windows(model.config):
        raise ModelError(
            "the model has window layers, whose rings forget what a rejected guess writes over; "
            "use Engine.generate for it"
        )
    for request in requests:
        if not may_speculate(request, rule) or request.prompt_logprobs:
            raise ModelError(
                "request: guesses go with no constraint, top_logprobs or prompt_logprobs, and by "
                "rejection with no top_p or top_k; use Engine.generate for it"
            )
    if isinstance(drafter, MTP):
        drafter = TorchDrafter(model, drafter)
    return _Batch(model, drafter, requests, draft_tokens, rule, checker or TorchChecker(model)).run(
        version
    )


def may_speculate(request: GenRequest, rule: Rule) -> bool:
    """Whether guesses at this request's tokens can be judged: what is drawn from must be known for
    all positions at once and, for rejection, be the whole softmax."""
    whole = rule == "match" or (request.top_p >= 1 and request.top_k == 0)
    return whole and request.constraint is None and not request.top_logprobs


class _Batch:
    def __init__(
        self,
        model: Transformer,
        drafter: Drafter,
        requests: Sequence[GenRequest],
        draft_tokens: int,
        rule: Rule,
        checker: Checker,
    ) -> None:
        self.model, self.drafter, self.rule, self.checker = model, drafter, rule, checker
        self.k, self.device = draft_tokens, model.device
        self.context = model.config.max_position_embeddings
        self.cache = SlotCache(model.config, model.device, model.dtype)
        self.sampler: Sampler | None = None
        self.live = [
            _Live(Row(request), Numbers.of(request, rule, draft_tokens), _nothing(request), i)
            for i, request in enumerate(requests)
        ]

    def run(self, version: int) -> list[Speculated]:
        if not self.live:
            return []
        every = list(self.live)
        self._read()
        self._drop_ended()
        while self.live:
            self._round()
            self._drop_ended()
        return [
            Speculated(one.row.result(version), one.rounds, one.drafted, one.accepted)
            for one in every
        ]

    def _read(self) -> None:
        """Prompts in, first tokens out."""
        prompts = [one.row.request.prompt_ids for one in self.live]
        counts = [len(ids) for ids in prompts]
        self.cache.fit(len(prompts), max(counts), 0, 0)
        attend = JoinAttend(self.cache, 0, [0] * len(prompts), counts)
        ids_M = torch.tensor([id for ids in prompts for id in ids], device=self.device)
        x_MH = self.checker.run(ids_M, attend.column_M, attend)
        last_B = torch.tensor(counts, device=self.device).cumsum(0) - 1
        uniform_B = torch.stack([one.numbers.final[0] for one in self.live]).to(self.device)
        logits_BV = self.checker.head(x_MH[last_B])
        id_B, logp_B, _ = self._sampler().draw(logits_BV, uniform_B, None)
        for one, hidden_TH, id, logp in zip(
            self.live, torch.split(x_MH, counts), id_B.tolist(), logp_B.tolist(), strict=True
        ):
            one.row.add(id, logp)
            one.tail = Tail([*one.row.request.prompt_ids, id], hidden_TH, 0)

    def _round(self) -> None:
        live = self.live
        ends = [one.tail.end for one in live]
        k = min(self.k, self.context - max(ends) - 1)
        said = [len(one.row.ids) for one in live]
        sampler = self._sampler()
        tails = [one.tail for one in live]

        def numbers(name: str, count: int) -> Tensor:
            rows = [
                getattr(one.numbers, name)[n : n + count] for one, n in zip(live, said, strict=True)
            ]
            return torch.stack(rows).to(self.device)

        self.cache.fit(len(live), max(ends) + k + 1, len(live), max(ends))
        uniform_kB = numbers("draft", k).t().contiguous()
        column_B = torch.tensor(ends, device=self.device)
        guesses, x_BjH, policy_MV = self.drafter.feed(
            tails, sampler, uniform_kB, self.cache, column_B
        )
        id_Bk = guesses.id_Bk
        final_Bj = numbers("final", k + 1)
        if self.rule == "match":
            made = match(self.checker, sampler, policy_MV, id_Bk, final_Bj)
        else:
            accept_Bk = numbers("accept", k)
            made = self.drafter.judge(sampler, policy_MV, guesses, accept_Bk, final_Bj)
        for one, guessed, count, last, logps, x_jH in zip(
            live,
            id_Bk.tolist(),
            made.count_B.tolist(),
            made.next_B.tolist(),
            made.logp_Bj.tolist(),
            x_BjH,
            strict=True,
        ):
            new = [*guessed[:count], last]
            for id, logp in zip(new, logps, strict=False):
                one.row.add(id, logp)
            one.rounds += 1
            one.drafted += k
            one.accepted += count
            one.tail = _longer(one.tail, new, x_jH[: count + 1], self.drafter.window)

    def _drop_ended(self) -> None:
        for slot in reversed(range(len(self.live))):
            if self.live[slot].row.finish is None:
                continue
            last = len(self.live) - 1
            if slot != last:
                self.cache.move(last, slot, self.live[last].tail.end)
                self.drafter.move(last, slot)
                self.live[slot] = self.live[last]
            self.live.pop()

    def _sampler(self) -> Sampler:
        if self.sampler is None or len(self.sampler.greedy_B) != len(self.live):
            rows = [one.row for one in self.live]
            self.sampler = sampler_of(rows, self.model.config.vocab_size, self.device)
        return self.sampler


def _no_guesses(batch: int, model: Transformer) -> Guesses:
    id_B0 = torch.empty(batch, 0, dtype=torch.long, device=model.device)
    return Guesses(id_B0, torch.empty(batch, 0, model.config.vocab_size, device=model.device))


def _nothing(request: GenRequest) -> Tail:
    return Tail(request.prompt_ids, torch.empty(0, 0), 0)


def _longer(tail: Tail, new: Sequence[int], x_jH: Tensor, window: int) -> Tail:
    """The tail after `new` ids, for whose predecessors `x_jH` are the hidden states; `window` older
    columns are kept."""
    kept = min(window, len(tail.hidden_WH))
    hidden_WH = torch.cat([tail.hidden_WH[len(tail.hidden_WH) - kept :], x_jH]) if kept else x_jH
    return replace(tail, ids=[*tail.ids, *new], hidden_WH=hidden_WH, start=tail.end - kept)
