"""Parameters and training FLOPs of a variant, and the plan that makes two variants' FLOPs equal.

FLOPs of a token, forward and backward: 6 for each active parameter (all but the embedding), and
12 · head size · query heads for each pair of tokens that sees each other, in each layer. Nothing is
recomputed. A multi-token-prediction module counts with its block, its projection and its use of
the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from model.config import ModelConfig
from model.study.variants import VARIANTS, Size, Variant, config_of, full_config

_STEP = 8  # widths that the grouped product takes: rows of 16 bytes in bfloat16


@dataclass(frozen=True)
class Plan:
    """One variant at one size: its model, its steps, and what they cost."""

    size: Size
    variant: Variant
    config: ModelConfig
    steps: int
    parameters: int
    active: int
    flops: float

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        return self.steps * self.size.rows * self.size.context


def block_parameters(config: ModelConfig, *, active: bool) -> int:
    """Parameters of one layer; `active` counts only those that one token uses."""
    d, q, kv = config.hidden_size, config.query_size, config.key_value_size
    attention = d * (2 * q + 2 * kv) + q + kv
    experts = config.num_experts_per_tok if active else config.num_local_experts
    inner = experts * config.intermediate_size + config.shared_intermediate_size
    return attention + 2 * d + config.num_local_experts * d + 3 * d * inner


def parameters(config: ModelConfig, *, active: bool) -> int:
    """Parameters of a model; the embedding is not active (no product is made with it)."""
    ends = (1 if active else 2) * config.vocab_size * config.hidden_size
    blocks = config.num_hidden_layers * block_parameters(config, active=active)
    return ends + config.hidden_size + blocks


def module_parameters(config: ModelConfig, *, active: bool) -> int:
    """Parameters of one multi-token-prediction module: block, projection, three norms."""
    d = config.hidden_size
    return block_parameters(config, active=active) + 2 * d * d + 3 * d


def visible_pairs(config: ModelConfig, layer: int, context: int) -> int:
    """Pairs (token, token it sees) in one row of one layer."""
    window = config.window_of(layer)
    if window is None or window >= context:
        return context * (context + 1) // 2
    pairs = window * (window + 1) // 2 + (context - window) * window
    sinks = config.num_sink_tokens
    return pairs + sum(min(sinks, t + 1 - window) for t in range(window, context))


def row_flops(config: ModelConfig, context: int, modules: int = 0) -> float:
    """Training FLOPs of one row."""
    linear = parameters(config, active=True)
    pairs = sum(visible_pairs(config, i, context) for i in range(config.num_hidden_layers))
    if modules:  # their blocks have full attention, and each uses the head again
        head = config.vocab_size * config.hidden_size
        linear += modules * (module_parameters(config, active=True) + head)
        pairs += modules * (context * (context + 1) // 2)
    return 6.0 * linear * context + 12.0 * config.query_size * pairs


def run_flops(size: Size, variant: Variant, config: ModelConfig, steps: int) -> float:
    """Training FLOPs of all steps."""
    converted = round(variant.convert_at * steps)
    bounds = sorted({0, min(size.short_steps, steps), converted, steps})
    total = 0.0
    for start, end in pairwise(bounds):
        shape = size.short if start < size.short_steps else size
        layers = full_config(config) if start < converted else config
        total += (end - start) * shape.rows * row_flops(layers, shape.context, variant.mtp)
    return total


def plan(size: Size, variant: Variant) -> Plan:
    """The variant's model and steps, matched to another variant's FLOPs where it says so."""
    steps, width = size.steps, size.width
    if variant.matched:
        goal = plan(size, VARIANTS[variant.matched]).flops
        if variant.matched_by == "steps":
            have = run_flops(size, variant, config_of(size, variant), steps)
            more = run_flops(size, variant, config_of(size, variant), steps + 1) - have
            steps += round((goal - have) / more)
        else:
            have = run_flops(size, variant, config_of(size, variant), steps)
            wider = config_of(size, variant, width=width + _STEP)
            each = run_flops(size, variant, wider, steps) - have
            width += _STEP * round((goal - have) / each)
    config = config_of(size, variant, width=width)
    total = parameters(config, active=False)
    active = parameters(config, active=True)
    if variant.mtp:
        total += variant.mtp * module_parameters(config, active=False)
    return Plan(
        size=size,
        variant=variant,
        config=config,
        steps=steps,
        parameters=total,
        active=active,
        flops=run_flops(size, variant, config, steps),
    )
