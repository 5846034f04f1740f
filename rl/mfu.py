"""The share of a GPU's peak that the updates of a step used (model FLOPs utilisation, MFU)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.config import ModelConfig
from model.describe import describe
from rl.config import RunConfig
from rl.device import peak_flops
from rl.types import Episode


def mfu(
    config: RunConfig,
    model: ModelConfig,
    device: torch.device,
    episodes: Sequence[Episode],
    seconds: float,
) -> dict[str, float]:
    """`perf/mfu` of an update of `seconds` over the calls of `episodes`; nothing where the device's
    peak is not known."""
    peak = peak_flops(device)
    if peak is None:
        return {}
    return {"perf/mfu": update_flops(config, model, episodes) / seconds / peak}


def update_flops(config: RunConfig, model: ModelConfig, episodes: Sequence[Episode]) -> float:
    """Forward and backward, every call as a row of its own."""
    lengths = [len(c.prompt_ids) + len(c.response_ids) for e in episodes for c in e.calls]
    if not lengths or config.objective == "expert_iteration":
        return 0.0
    each = describe(model, context=max(lengths)).flops_per_token
    return 3.0 * each * sum(lengths) * config.optim.passes
