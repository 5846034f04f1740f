"""A whole training step of the `base` preset on one GPU: `python -m benchmarks.train_step --json`

One step is `Trainer.cispo_update`: scores of every token with its log-prob in bfloat16 (router,
logits and loss in float32), the backward pass without recomputing any block, clipping, and AdamW on
float32 masters; 8 rows of 4,096 random tokens, all trained.

`peak_share` is the step's useful work a second over what the card reaches in a product of two
8192 x 8192 bfloat16 matrices in the same run. Useful work: 6 x active parameters x tokens, the
output head included and the embedding not, and 12 x heads x head size for each pair of tokens that
see each other; nothing that is computed twice counts twice. `rows` holds the step with other shapes
and the ten kernels that take most of its time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common import emit, report
from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from rl.config import OptimSection
from rl.trainer import Sample, Trainer

SHAPES = ((8, 4096), (16, 2048), (4, 8192))
TARGET = 0.4
_PEAK_SIZE = 8192


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if the target is missed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA device here; run it on a machine with a GPU", file=sys.stderr)
        return 2
    config = PRESETS[options.preset]
    peak = dense_peak()
    rows: list[dict[str, Any]] = [{"part": "peak", "tflop_s": peak / 1e12}]
    trainer = Trainer(
        Transformer(config, seed=0).cast(torch.bfloat16).to("cuda"),
        OptimSection(warmup_steps=0, lr=1e-6, micro_batch=1024),
    )
    for batch, time_ in SHAPES:
        step = make_step(trainer, config, batch, time_)
        torch.cuda.reset_peak_memory_stats()
        seconds = measure(step, options.repeats)
        work = useful_work(config, batch, time_)
        rows.append(
            {
                "part": "step",
                "rows": batch,
                "tokens_a_row": time_,
                "seconds": seconds,
                "tok_s": batch * time_ / seconds,
                "tflop_s": work / seconds / 1e12,
                "peak_share": work / seconds / peak,
                "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
    rows += profile(make_step(trainer, config, *SHAPES[0]))
    first = rows[1]
    figures = {"tok_s": first["tok_s"], "peak_share": first["peak_share"]}
    emit(report("train_step", figures, rows), as_json=options.json)
    return 0 if figures["peak_share"] >= TARGET else 1


def useful_work(config: ModelConfig, batch: int, tokens: int) -> float:
    """Floating-point operations of a step (see above)."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = hidden * (2 * config.query_size + 2 * config.key_value_size)
    experts = 3 * hidden * config.intermediate_size * config.num_experts_per_tok
    router = hidden * config.num_local_experts
    layers = config.num_hidden_layers
    active = layers * (attention + experts + router) + hidden * config.vocab_size
    pairs = batch * tokens * (tokens + 1) / 2
    return 6.0 * active * batch * tokens + 12.0 * heads * layers * pairs


def make_step(trainer: Trainer, config: ModelConfig, batch: int, tokens: int) -> Callable[[], None]:
    """One update on random rows, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch, tokens + 1), generator=generator).tolist()
    guess = (-10.4,) * tokens
    samples = [
        Sample((row[0],), tuple(row[1:]), guess, advantage=1.0 - 2.0 * (i % 2))
        for i, row in enumerate(ids)
    ]

    def step() -> None:
        trainer.cispo_update(samples, lr=1e-6, is_weight_max=5.0, temperature=1.0)

    return step


def measure(step: Callable[[], None], repeats: int) -> float:
    """Median seconds of a call, after two warm ones."""
    step()
    step()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def dense_peak() -> float:
    """Operations a second of one large bfloat16 product: the median of 20."""
    a, b = (torch.randn(_PEAK_SIZE, _PEAK_SIZE, device="cuda").bfloat16() for _ in range(2))

    def products() -> None:
        for _ in range(5):
            torch.mm(a, b)

    seconds = measure(products, 20) / 5
    return 2.0 * _PEAK_SIZE**3 / seconds


def profile(step: Callable[[], None], count: int = 10) -> list[dict[str, Any]]:
    """The kernels that take most of one step's time."""
    from torch.profiler import ProfilerActivity

    step()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    return [
        {
            "part": "profile",
            "kernel": event.key[:120],
            "calls": event.count,
            "ms": event.self_device_time_total / 1e3,
            "share": event.self_device_time_total / total,
        }
        for event in kernels[:count]
    ]


if __name__ == "__main__":
    sys.exit(main())
