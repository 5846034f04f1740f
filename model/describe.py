"""`python -m model.describe PRESET|FOLDER [--json]`: what a model of these sizes costs. No torch.

Parameters are counted from the table of tensors on disk, so they are those of a checkpoint.
Active are those that one token uses: k of E experts, everything else whole. The report's "9.8 B
active" is without embedding and output head (`docs/checkpoints.md`). Exit code 2: no such model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from model.config import PRESETS, ModelConfig, load_config
from model.errors import ModelError
from model.layout import is_fp8_weight, scale_shape, tensor_shapes

PARTS = ("experts", "shared_experts", "attention", "router", "norms", "embedding", "head")
_KV_BYTES = 2  # bfloat16
_OPTIMISER_BYTES = 12  # float32 masters and both moments of Adam
_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Description:
    """Sizes of one model. Parameters are numbers, memory is bytes."""

    name: str
    layers: int
    window_layers: int
    context: int
    parameters: int
    """All of them."""
    parameters_by_part: dict[str, int]
    active: int
    """Used by one token, without embedding and output head."""
    active_with_head: int
    active_with_head_and_embedding: int
    kv_bytes_per_token: int
    """Keys and values in bfloat16 that each further token adds: those of the full layers."""
    kv_bytes_of_windows: int
    """Keys and values of the window layers of one text in bfloat16, at most, however long it is."""
    kv_bytes_at_context: int
    """Both for a text of `context` tokens."""
    flops_per_token: int
    """Forward pass of the token that sees `context` others or itself: 2 a weight, head included,
    and 4 · heads · head size for each position that a layer sees."""
    memory: dict[str, int]
    """Weights on disk or in memory by type; `optimiser`: float32 masters and two moments;
    `training`: that, float32 gradients and bfloat16 weights (the router is its own master)."""


def describe(config: ModelConfig, name: str = "model", context: int | None = None) -> Description:
    """The sizes of a model; `context` is the position of the token whose FLOPs are counted.

    Raises ModelError for a context that is not from 1 to the model's.
    """
    context = config.max_position_embeddings if context is None else context
    if not 1 <= context <= config.max_position_embeddings:
        raise ModelError(
            f"--context {context}: choose from 1 to the model's {config.max_position_embeddings}"
        )
    by_part = dict.fromkeys(PARTS, 0)
    fp8_bytes = wide = 0
    for tensor, shape in tensor_shapes(config).items():
        size, part = math.prod(shape), _part(tensor)
        by_part[part] += size
        if part == "router":
            wide += size
        elif is_fp8_weight(tensor):
            fp8_bytes += size + 4 * math.prod(scale_shape(shape))
        else:
            fp8_bytes += 2 * size
    total = sum(by_part.values())
    ends = by_part["embedding"] + by_part["head"]
    share = config.num_experts_per_tok / config.num_local_experts
    idle = by_part["experts"] - round(by_part["experts"] * share)
    active = total - ends - idle
    seen = [
        context if window is None else min(context, window + config.num_sink_tokens)
        for window in map(config.window_of, range(config.num_hidden_layers))
    ]
    windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    full = windows.count(None)
    kv_layer = 2 * config.key_value_size * _KV_BYTES
    bounded = sum(w + config.num_sink_tokens for w in windows if w is not None) * kv_layer
    return Description(
        name=name,
        layers=config.num_hidden_layers,
        window_layers=len(windows) - full,
        context=context,
        parameters=total,
        parameters_by_part=by_part,
        active=active,
        active_with_head=active + by_part["head"],
        active_with_head_and_embedding=active + ends,
        kv_bytes_per_token=full * kv_layer,
        kv_bytes_of_windows=bounded,
        kv_bytes_at_context=sum(seen) * kv_layer,
        flops_per_token=2 * (active + by_part["head"]) + 4 * config.query_size * sum(seen),
        memory={
            "float32": 4 * total,
            "bfloat16": 2 * total + 2 * wide,  # the router stays float32
            "fp8": fp8_bytes + 4 * wide,
            "optimiser": _OPTIMISER_BYTES * total,
            "training": (_OPTIMISER_BYTES + _GRADIENT_BYTES) * total + 2 * (total - wide),
        },
    )


def _part(tensor: str) -> str:
    for mark, part in (
        ("shared_expert", "shared_experts"),
        (".experts.", "experts"),
        ("norm", "norms"),
        ("self_attn", "attention"),
        ("block_sparse_moe", "router"),
        ("embed_tokens", "embedding"),
    ):
        if mark in tensor:
            return part
    return "head"


def find_config(name: str) -> ModelConfig:
    """The configuration of a preset, or of a checkpoint folder (weights are not needed).

    Raises ModelError for a name that is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_dir():
        return load_config(name)
    raise ModelError(f"no model {name!r}; name a folder or one of {', '.join(PRESETS)}")


def to_text(found: Description) -> str:
    """The description for people."""
    parts = [
        f"  {part:18} {_count(size):>9}" for part, size in found.parameters_by_part.items() if size
    ]
    windows = (
        [f"{'window layers':20} {_bytes(found.kv_bytes_of_windows):>9}  at most, a text"]
        if found.window_layers
        else []
    )
    return "\n".join(
        [
            f"{found.name}: {found.layers} layers, {found.window_layers} of them with a window",
            f"{'parameters':20} {_count(found.parameters):>9}",
            *parts,
            f"{'active a token':20} {_count(found.active):>9}",
            f"{'  with head':20} {_count(found.active_with_head):>9}",
            f"{'  with embedding too':20} {_count(found.active_with_head_and_embedding):>9}",
            f"{'keys and values':20} {found.kv_bytes_per_token:>9,} bytes a token (bfloat16)",
            *windows,
            f"{'':20} {_bytes(found.kv_bytes_at_context):>9}  for {found.context:,} tokens",
            f"{'FLOPs a token':20} {_count(found.flops_per_token):>9}  at {found.context:,} tokens",
            *(f"{'memory, ' + kind:20} {_bytes(size):>9}" for kind, size in found.memory.items()),
        ]
    )


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.1f} KiB"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.describe", description=__doc__)
    parser.add_argument("model", metavar="PRESET|FOLDER", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--context", type=int, help="position of the token; default: the last")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    try:
        found = describe(find_config(options.model), options.model, options.context)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found)) if options.json else to_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
