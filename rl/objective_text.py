"""The line that names a run's objective: band, anchor, denominator. No torch here."""

from __future__ import annotations

import json
from typing import Literal

from rl.config import RunConfig

Reduction = Literal["token", "sequence"]


def cispo_text(is_weight_max: float, mask_low: float | None, mask_high: float | None) -> str:
    """Of `rl.objectives.cispo`."""
    mask = ""
    if mask_low is not None or mask_high is not None:
        mask = f" · mask: A < 0 below 1 − {mask_low}, A > 0 above 1 + {mask_high}"
    band = f"importance weight in [0, {is_weight_max:g}] (no floor, ceiling inclusive){mask}"
    return _text("cispo", band, "token")


def clip_text(name: str, low: float, high: float, reduction: Reduction) -> str:
    """Of `rl.objectives.ppo_clip` and `grpo`."""
    return _text(name, f"ratio clipped to [{1 - low:g}, {1 + high:g}]", reduction)


def reinforce_text() -> str:
    """Of `rl.objectives.reinforce`."""
    return _text("reinforce", "no importance weight", "token")


def objective_text(config: RunConfig) -> str:
    """Of the run's objective, with how often it is stepped."""
    if config.objective == "expert_iteration":
        return f"expert iteration: {json.dumps(config.expert_iteration.model_dump())}"
    if config.objective == "cispo":
        c = config.cispo
        text = cispo_text(c.is_weight_max, c.mask_low, c.mask_high)
    elif config.objective == "grpo":
        text = clip_text("grpo", config.grpo.low, config.grpo.high, "sequence")
    elif config.objective == "ppo_clip":
        text = clip_text("ppo_clip", config.ppo_clip.low, config.ppo_clip.high, "token")
    else:
        text = reinforce_text()
    return text + ratio_text(config)


def ratio_text(config: RunConfig) -> str:
    """Whether the ratio can differ from 1 in a synchronous run."""
    updates = config.optim.updates_per_batch
    if updates == 1:
        return " · 1 update a batch: every ratio is 1 without lag, so no ceiling or clip acts"
    passes = config.optim.passes
    return f" · {updates} updates a batch ({updates // passes} minibatches × {passes} passes)"


def _text(name: str, band: str, reduction: Reduction) -> str:
    denominator = {
        "token": "all trained tokens of the optimiser step",
        "sequence": "each call's own tokens, then all calls of the optimiser step",
    }[reduction]
    return f"{name}: {band} · anchor: recorded rollout log-probs · denominator: {denominator}"
