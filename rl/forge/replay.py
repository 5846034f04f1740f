"""Rollout routing replay (R3): the trainer repeats the engine's choice of experts.

Between two engines about one choice in ten differs, and a token that went through other experts has
another log-prob. So where a record has the chosen experts, the selection is forced and the weights
are computed anew from the present scores: the router keeps its gradient (`model.moe.RoutingTape`).

Shapes: L layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from model.config import ModelConfig
from model.transformer import Transformer
from rl.backward import Sums
from rl.errors import RecordError
from rl.objectives import Objective
from rl.prefix_tree import Ints
from rl.samples import Sample
from rl.tree_update import backward_packs
from rl.types import CallRecord


class ReplayedPacks:
    """`rl.backward.Backward` over merged calls, with the experts that their records name."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._experts: dict[tuple[tuple[int, ...], tuple[int, ...]], Ints] = {}

    def remember(self, calls: Iterable[CallRecord]) -> float:
        """The experts of a step's calls; forgets those of the step before. Returns the share of
        calls that have any. RecordError where they do not fit the call or the model."""
        self._experts = {}
        count = 0
        for call in calls:
            count += 1
            if call.routed_experts is not None:
                key = (call.prompt_ids, call.response_ids)
                self._experts[key] = experts_of(call, self._config)
        return len(self._experts) / count if count else 0.0

    def __call__(
        self,
        model: Transformer,
        samples: Sequence[Sample],
        objective: Objective,
        temperature: float,
        budget: int,
    ) -> Sums:
        routed = [self._experts.get((s.prompt_ids, s.response_ids)) for s in samples]
        some = any(x is not None for x in routed)
        return backward_packs(
            model, samples, objective, temperature, budget, routed=routed if some else None
        )


def experts_of(call: CallRecord, config: ModelConfig) -> Ints:
    """(tokens − 1, L·k) of a call: a row for every token that a later one is computed from.

    A record may begin after the prompt, or after the part of it that the engine had cached: tokens
    before its first row choose for themselves (−1).
    """
    assert call.routed_experts is not None
    tokens = len(call.prompt_ids) + len(call.response_ids)
    width = config.num_hidden_layers * config.num_experts_per_tok
    rows = np.array(call.routed_experts, dtype=np.int64)
    where = f"call {call.index} of episode {call.episode}: its experts"
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) > tokens:
        raise RecordError(
            f"{where} have shape {rows.shape}; the model has {config.num_hidden_layers} layers of "
            f"{config.num_experts_per_tok} experts a token, and the call {tokens} tokens"
        )
    if len(rows) and not 0 <= int(rows.max()) < config.num_local_experts:
        raise RecordError(f"{where} name expert {int(rows.max())} of {config.num_local_experts}")
    if len(rows) == tokens:
        rows = rows[:-1]  # the last token's are of no use
    free = np.full((tokens - 1 - len(rows), width), -1, dtype=np.int64)
    return np.concatenate([free, rows])
