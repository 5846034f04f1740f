"""The gradients of one optimiser step, from calls that are merged where that pays.

`backward_packs` lays the calls out (`rl.tree_plan`), runs piece after piece and adds the gradients
of any objective of `rl.objectives` to the parameters. Every split, merged or not, gives the sum
that one pass a call would give: shares are counted over the whole step before the first pass.

A piece that continues others gets the keys and values of its open path as leaves. They are computed
without graph first; then pieces go in reverse order, so that what all later pieces hand back to a
token's keys and values is complete when its own piece runs, and enters there as their gradient.

Shapes: L layers, M own tokens of a piece, C carried, O open tokens of a pack, n trained tokens,
f response tokens of all calls, K key heads, D head size, k experts a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention import Attend, CausalAttend, PackedAttend
from model.moe import RoutingTape, float_of
from model.strands import STRAND_PAIRS, find_strands
from model.transformer import Transformer
from model.tree_attend import KeysValues, TreeAttend
from model.upload import upload
from model.visible import Visibility
from rl.backward import Sums
from rl.objectives import Objective, Terms, Tokens, shares
from rl.prefix_tree import Ints, Labels, Pack
from rl.tree_plan import (
    Costs,
    Merge,
    Piece,
    Plan,
    Split,
    open_tokens,
    part_of,
    plan_step,
    tout_within,
)
from rl.tree_scores import score_pairs

Floats = NDArray[np.float64]


class Trained(Protocol):
    """A call to train on: one recorded log-prob a response id, one advantage for all of them."""

    @property
    def prompt_ids(self) -> Sequence[int] | Ints: ...

    @property
    def response_ids(self) -> Sequence[int] | Ints: ...

    @property
    def logprobs(self) -> Sequence[float] | Floats: ...

    @property
    def advantage(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class StepSums(Sums):
    """`Sums`, the plan they were computed by, and `load_LE`: how often each expert was chosen, each
    call's tokens counted (None: not asked for)."""

    plan: Plan
    load_LE: Tensor | None = None


def figures_of(plan: Plan) -> dict[str, float]:
    """What was decided, for the step's row."""
    return {
        "tree/merged": float(plan.merged),
        "tree/ratio_vs_calls": plan.ratio_calls,
        "tree/cost_share": plan.cost_share,
        "tree/packed_tokens": float(plan.tokens),
        "tree/open_tokens": float(plan.open_tokens),
        "tree/pieces": float(sum(len(pieces) for pieces in plan.pieces)),
    }


def costs_of(model: Transformer) -> Costs:
    """Of a model where it is: six operations a token and active weight (the output head, which is
    the same either way, left out), fourteen a pair, head and number of a head."""
    config = model.config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = hidden * (2 * config.query_size + 2 * config.key_value_size)
    experts = 3 * hidden * config.intermediate_size * config.num_experts_per_tok
    experts += 3 * hidden * config.shared_intermediate_size + hidden * config.num_local_experts
    pair = 14.0 * config.query_size * layers
    token = 6.0 * layers * (attention + experts)
    if model.device.type == "cuda":
        return Costs(token, pair, start=2e12, plain_pair=0.6)
    return Costs(token, pair, start=2e8, row=STRAND_PAIRS * pair)


def backward_packs(
    model: Transformer,
    samples: Sequence[Trained],
    objective: Objective,
    temperature: float,
    budget: int,
    *,
    merge: Merge = "auto",
    split: Split = "auto",
    routed: Labels | None = None,
    step_tokens: int | None = None,
    step_calls: int | None = None,
    count_load: bool = False,
) -> StepSums:
    """Add the gradients of the objective over all samples to the parameters' `.grad`.

    budget: most tokens of one pass with graph. Non-finite recorded log-probs are left out of
    numerator and denominator, and counted. `routed`: for each call the experts to replay,
    (tokens − 1, L·k), or None. `step_tokens`, `step_calls`: trained tokens, and calls with any, of
    the whole step where these samples are a part of it (data parallel).
    Raises ValueError as `tree_plan.plan_step`, and for unequal numbers of ids and log-probs.
    """
    plan = plan_step(samples, budget, costs_of(model), merge=merge, split=split, labels=routed)
    return backward_plan(
        model,
        samples,
        plan,
        objective,
        temperature,
        step_tokens=step_tokens,
        step_calls=step_calls,
        count_load=count_load,
    )


def backward_plan(
    model: Transformer,
    samples: Sequence[Trained],
    plan: Plan,
    objective: Objective,
    temperature: float,
    *,
    step_tokens: int | None = None,
    step_calls: int | None = None,
    count_load: bool = False,
) -> StepSums:
    """`backward_packs` by a plan made before; it serves all updates of a batch."""
    table = _Table.of(samples, objective, step_tokens, step_calls)
    run = _Run(model, objective, temperature, table, count_load)
    for pack, pieces in zip(plan.packs, plan.pieces, strict=True):
        run.pack(pack, pieces)
    return StepSums.of(
        run.terms,
        sum(float(x) for x in run.entropies),
        table.nonfinite,
        figures=figures_of(plan),
        plan=plan,
        load_LE=run.load_LE,
    )


@dataclass(frozen=True)
class _Table:
    """Numbers of every response token, call after call; `base_C`: where each call's begin."""

    base_C: Ints
    rollout_f: Floats
    advantage_f: Floats
    share_f: Floats
    finite_f: NDArray[np.bool_]

    @property
    def nonfinite(self) -> int:
        return int((~self.finite_f).sum())

    @classmethod
    def of(
        cls,
        samples: Sequence[Trained],
        objective: Objective,
        step_tokens: int | None,
        step_calls: int | None,
    ) -> _Table:
        for index, sample in enumerate(samples):
            if len(sample.logprobs) != len(sample.response_ids):
                raise ValueError(
                    f"call {index}: {len(sample.response_ids)} response ids and "
                    f"{len(sample.logprobs)} log-probs; record one for each"
                )
        lengths_C = np.array([len(s.response_ids) for s in samples], np.int64)
        logprobs = [np.asarray(s.logprobs, np.float64) for s in samples]
        rollout_f = np.concatenate(logprobs) if logprobs else np.zeros(0)
        finite_f = np.isfinite(rollout_f)
        call_f = np.repeat(np.arange(len(samples)), lengths_C)
        trained_C = np.bincount(call_f[finite_f], minlength=len(samples))
        tokens = int(trained_C.sum()) if step_tokens is None else step_tokens
        calls = int((trained_C > 0).sum()) if step_calls is None else step_calls
        share_f = np.zeros(len(rollout_f))
        some = torch.from_numpy(trained_C[trained_C > 0])
        share_f[finite_f] = shares(some, objective.reduction, max(1, tokens), calls).numpy()
        advantage_C = np.array([s.advantage for s in samples], np.float64)
        base_C = np.cumsum(lengths_C) - lengths_C
        return cls(base_C, rollout_f, advantage_C[call_f], share_f, finite_f)


class _Run:
    """The passes of one step, and their sums."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        temperature: float,
        table: _Table,
        count_load: bool,
    ) -> None:
        self.model, self.objective, self.temperature = model, objective, temperature
        self.table, self.count_load = table, count_load
        self.terms: list[Terms] = []
        self.entropies: list[Tensor] = []  # read at the end: the host does not wait in between
        self.load_LE: Tensor | None = None

    def pack(self, pack: Pack, pieces: Sequence[Piece]) -> None:
        """All pieces, last one first."""
        open_O = open_tokens(pack, pieces)
        past = _OpenPaths(self.model, open_O) if len(open_O) else None
        if past is not None:
            for piece in part_of(pieces, open_O):
                past.add(pack, piece)
        for piece in reversed(pieces):
            self._piece(pack, piece, past)

    def _piece(self, pack: Pack, piece: Piece, past: _OpenPaths | None) -> None:
        opened = past.own(piece) if past is not None else None
        keeps = opened is not None and opened.any
        leaves = past.leaves(piece) if past is not None and len(piece.carried_C) else []
        tape = self._tape(pack, piece, opened)
        attend = _attend(self.model, pack, piece, leaves, keeps)
        x_MH = _run(self.model, pack, piece, attend, tape)
        roots: list[Tensor] = []
        grads: list[Tensor | None] = []
        loss = self._loss(pack, piece, x_MH)
        if loss is not None:
            roots.append(loss)
            grads.append(None)
        if keeps and past is not None and opened is not None and isinstance(attend, TreeAttend):
            for seen, handed in zip(attend.seen, past.handed, strict=True):
                for own, grad in zip(seen, handed, strict=True):
                    roots.append(own.index_select(0, opened.local))
                    grads.append(grad.index_select(0, opened.stored).to(own.dtype))
        if roots:
            torch.autograd.backward(roots, grads)
        if past is not None and leaves:
            past.hand_back(piece, leaves)
        if tape is not None and self.count_load:
            load_LE = tape.load_LE
            self.load_LE = load_LE if self.load_LE is None else self.load_LE + load_LE

    def _tape(self, pack: Pack, piece: Piece, opened: _Opened | None) -> RoutingTape | None:
        forced_LMk = _forced(self.model, pack, piece)
        if opened is not None and opened.any and opened.choices_LOk is not None:
            if forced_LMk is None:
                layers, _, top_k = opened.choices_LOk.shape
                shape = (layers, len(piece.own_M), top_k)
                forced_LMk = torch.full(shape, -1, device=self.model.device)
            forced_LMk[:, opened.local] = opened.choices_LOk
        if forced_LMk is None and not self.count_load:
            return None
        times_M = upload(pack.calls_M[piece.own_M], self.model.device)
        return RoutingTape(forced_LMk, times_M)

    def _loss(self, pack: Pack, piece: Piece, x_MH: Tensor) -> Tensor | None:
        """The objective of the tokens that this piece predicts, noted in the sums."""
        begin, end = int(piece.own_M[0]), int(piece.own_M[-1]) + 1
        place_n = self.table.base_C[pack.call_n] + pack.offset_n
        here_n = (pack.predictor_n >= begin) & (pack.predictor_n < end)
        here_n &= self.table.finite_f[place_n]
        if not here_n.any():
            return None
        place_n = place_n[here_n]
        logp_n, entropy_n = score_pairs(
            self.model,
            x_MH,
            pack.predictor_n[here_n] - begin,
            pack.target_n[here_n],
            self.temperature,
        )
        table = self.table
        columns = (table.rollout_f, table.advantage_f, table.share_f)
        tokens = Tokens(
            logp_n, *(upload(x[place_n], logp_n.device).to(logp_n.dtype) for x in columns)
        )
        terms = self.objective.loss(tokens)
        self.terms.append(replace(terms, loss=terms.loss.detach()))
        self.entropies.append(entropy_n.sum())
        return terms.loss


@dataclass(frozen=True)
class _Opened:
    """A piece's own open tokens: their places in the piece and in the pack's open tokens, and the
    experts that were chosen when their keys and values were computed."""

    local: Tensor
    stored: Tensor
    choices_LOk: Tensor | None

    @property
    def any(self) -> bool:
        return len(self.local) > 0


class _OpenPaths:
    """Keys and values (O, K, D) in each layer of the tokens that are open at some cut, and the
    gradients handed back to them so far."""

    def __init__(self, model: Transformer, open_O: Ints) -> None:
        config = model.config
        self.model, self.open_O = model, open_O
        shape = (len(open_O), config.num_key_value_heads, config.head_dim)
        empty = torch.zeros(shape, device=model.device, dtype=model.dtype)
        none = empty.to(float_of(model.dtype))  # gradients are added up in float32
        layers = range(config.num_hidden_layers)
        self.held = [(empty.clone(), empty.clone()) for _ in layers]
        self.handed = [(none.clone(), none.clone()) for _ in layers]
        top_k = config.num_experts_per_tok
        self._choices_LOk = torch.zeros(
            (config.num_hidden_layers, len(open_O), top_k), device=model.device, dtype=torch.long
        )

    def _places(self, index: Ints) -> Tensor:
        return upload(np.searchsorted(self.open_O, index), self.model.device)

    @torch.no_grad()
    def add(self, pack: Pack, piece: Piece) -> None:
        """Compute some open tokens, after the ones before them."""
        tape = RoutingTape(_forced(self.model, pack, piece), keep_choices=True)
        attend = _attend(self.model, pack, piece, self.leaves(piece), keeps=True)
        _run(self.model, pack, piece, attend, tape)
        assert isinstance(attend, TreeAttend)
        at = self._places(piece.own_M)
        for held, seen in zip(self.held, attend.seen, strict=True):
            for store, own in zip(held, seen, strict=True):
                store.index_copy_(0, at, own)
        for layer, choice_Mk in enumerate(tape.choices):
            self._choices_LOk[layer].index_copy_(0, at, choice_Mk.long())

    def own(self, piece: Piece) -> _Opened:
        """Which of a piece's own tokens are open."""
        index = np.intersect1d(piece.own_M, self.open_O, assume_unique=True)
        stored = self._places(index)
        local = upload(index - piece.own_M[0], self.model.device)
        return _Opened(local, stored, self._choices_LOk[:, stored])

    def leaves(self, piece: Piece) -> list[KeysValues]:
        """What the piece sees of others, as leaves of its graph."""
        if not len(piece.carried_C):
            return []
        at = self._places(piece.carried_C)
        wanted = torch.is_grad_enabled()
        return [
            (
                k.index_select(0, at).requires_grad_(wanted),
                v.index_select(0, at).requires_grad_(wanted),
            )
            for k, v in self.held
        ]

    @torch.no_grad()
    def hand_back(self, piece: Piece, leaves: Sequence[KeysValues]) -> None:
        """Add the leaves' gradients."""
        at = self._places(piece.carried_C)
        for handed, pair in zip(self.handed, leaves, strict=True):
            for total, leaf in zip(handed, pair, strict=True):
                if leaf.grad is not None:
                    total.index_add_(0, at, leaf.grad.to(total.dtype))


def _run(
    model: Transformer, pack: Pack, piece: Piece, attend: Attend, tape: RoutingTape | None
) -> Tensor:
    ids_M, depth_M = (upload(x[piece.own_M], model.device) for x in (pack.ids_M, pack.depth_M))
    return model.run(ids_M, depth_M, attend, tape)


def _attend(
    model: Transformer, pack: Pack, piece: Piece, past: Sequence[KeysValues], keeps: bool
) -> Attend:
    """What joins a piece's tokens: whole rows that share nothing have kernels of their own."""
    device, carried = model.device, len(piece.carried_C)
    tout_S, depth_S = tout_within(pack, piece)
    if not (carried or keeps):
        starts = np.flatnonzero(np.diff(depth_S, prepend=-2) != 1)
        lengths = np.diff(np.append(starts, len(depth_S)))
        longest, rows = int(lengths.max()), len(starts)
        if not depth_S[starts].any():
            if rows * longest == len(depth_S):
                return CausalAttend(model.config, rows, longest)
            padded = rows * longest * (longest + 1) / 2
            exact = float((lengths * (lengths + 1) / 2).sum()) + STRAND_PAIRS * rows
            if device.type == "cpu" and padded < exact:
                place_M = np.repeat(np.arange(rows), lengths) * longest + depth_S
                place = torch.from_numpy(place_M)
                return PackedAttend(model.config, rows, longest, place)
    seen = Visibility(*(upload(x, device) for x in (tout_S, depth_S)))
    strands = find_strands(torch.from_numpy(depth_S), carried)
    return TreeAttend(seen, model.config, past, carried, strands)


def _forced(model: Transformer, pack: Pack, piece: Piece) -> Tensor | None:
    """The recorded experts of a piece's tokens, (L, M, k)."""
    if pack.labels_MX is None:
        return None
    labels_MX = upload(pack.labels_MX[piece.own_M], model.device)
    shape = (len(labels_MX), model.config.num_hidden_layers, model.config.num_experts_per_tok)
    if labels_MX.shape[1] != shape[1] * shape[2]:
        raise ValueError(
            f"routed experts have {labels_MX.shape[1]} numbers a token; the model has {shape[1]} "
            f"layers of {shape[2]} experts a token"
        )
    return labels_MX.view(shape).transpose(0, 1).contiguous()
