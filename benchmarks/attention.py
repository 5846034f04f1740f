"""What one rule of visibility costs: `python -m benchmarks.attention --json`, on one GPU.

Forward and backward of attention alone, 16 query heads, 4 key heads, head size 128, bfloat16, in
turns; one prompt and agents that go on from it, as one tree and as joined rows, with and without a
window, and one plain row. A time is the card's own, a median; its TFLOP/s count visible pairs (×
heads × head size × 4, and 3.5 for forward and backward). Figures are ratios, above 1 where ours is
better:

- `plain_vs_sdpa`: TFLOP/s of one causal row, over those of torch's own kernel for it;
- `joined_vs_varlen`: the same for joined rows, over `torch.nn.attention.varlen` (where there is);
- `tree_vs_sdpa`, `tree_vs_joined`: the tree's TFLOP/s, over that kernel's and our joined rows';
- `tree_speedup`: joined rows' time over the tree's, beside their `tree_pair_ratio`;
- `window_speedup`: joined rows' time over theirs with a window, beside their `window_pair_ratio`.

Without a GPU everything is small and dense, which tells nothing but that it runs.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import emit, report
from model.config import PRESETS, WINDOW, ModelConfig
from model.visible import Visibility, VisibleAttend, row_visibility

HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
FORWARD_AND_BACKWARD = 3.5
CONFIG = replace(
    PRESETS["nano"],
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
)
AHEAD = 40_000_000  # cycles of the card, about 20 ms

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Tokens: a prompt, then for each agent `turns` answers with observations between them."""

    prompt: int
    agents: int
    turns: int
    answer: int
    observation: int
    plain: int
    window: int
    sinks: int

    @property
    def branch(self) -> int:
        return self.turns * self.answer + (self.turns - 1) * self.observation


LARGE = Sizes(4096, 4, 15, 300, 700, 16_384, 1024, 4)
SMALL = Sizes(64, 4, 3, 10, 20, 256, 32, 4)


@dataclass(frozen=True)
class Case:
    """One way to do some work: of flat tokens, that many of them, and how many pairs they see."""

    name: str
    run: Run
    tokens: int
    pairs: int


def pairs_of(visibility: Visibility, window: int | None = None, sinks: int = 0) -> int:
    """How many keys all tokens see together."""
    seen_M = visibility.depth_M + 1
    if window is not None:
        out_M = (seen_M - window).clamp_min(0)
        seen_M = seen_M - out_M + out_M.clamp_max(sinks)
    return int(seen_M.sum())


def tree_visibility(sizes: Sizes, device: torch.device) -> Visibility:
    """The prompt, then every agent's branch: each sees the prompt and itself."""
    branches = row_visibility([sizes.branch] * sizes.agents, device)
    prompt = torch.arange(sizes.prompt, device=device)
    total = sizes.prompt + len(branches)
    return Visibility(
        torch.cat([torch.full_like(prompt, total), branches.tout_M + sizes.prompt]),
        torch.cat([prompt, branches.depth_M + sizes.prompt]),
    )


def ours(name: str, visibility: Visibility, config: ModelConfig) -> Case:
    attend = VisibleAttend(visibility, config)
    pairs = pairs_of(visibility, config.window_of(0), config.num_sink_tokens)
    return Case(name, lambda q, k, v: attend(0, q, k, v), len(visibility), pairs)


def sdpa(tokens: int) -> Case:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return Case("sdpa", run, tokens, tokens * (tokens + 1) // 2)


def varlen(lengths: list[int], device: torch.device) -> Case | None:
    """torch's kernel for rows of uneven length, where this torch and device have it."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    grouped = "enable_gqa" in known
    if grouped:
        settings["enable_gqa"] = True
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not grouped:
            k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
        out: Any = varlen_attn(q, k, v, ends, ends, max(lengths), max(lengths), **settings)
        made: Tensor = out
        return made

    return Case("varlen", run, sum(lengths), sum(n * (n + 1) // 2 for n in lengths))


def milliseconds(case: Case, device: torch.device) -> float:
    """Of one forward and backward pass, the inputs made before it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(case.tokens, heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    grad = torch.randn(case.tokens, HEADS, HEAD_DIM, device=device, dtype=dtype)
    if device.type != "cuda":
        before = time.perf_counter()
        out = case.run(q, k, v)
        torch.autograd.grad(out, (q, k, v), grad.view_as(out))
        return (time.perf_counter() - before) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    # the host gets ahead, as in a step of many layers
    torch.cuda._sleep(AHEAD)  # type: ignore[no-untyped-call]
    start.record()
    out = case.run(q, k, v)
    torch.autograd.grad(out, (q, k, v), grad.view_as(out))
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def in_turns(
    cases: Sequence[Case], device: torch.device, repeats: int, untimed: int
) -> dict[str, list[float]]:
    """Milliseconds of each case's passes, after some untimed ones."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(untimed + repeats):
        for case in cases:
            times[case.name].append(milliseconds(case, device))
    return {name: found[untimed:] for name, found in times.items()}


def measure(repeats: int) -> dict[str, Any]:
    """All cases in turns, after one untimed pass each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = LARGE if device.type == "cuda" else SMALL
    near = replace(
        CONFIG,
        attn_type_list=(WINDOW,),
        sliding_window=sizes.window,
        num_sink_tokens=sizes.sinks,
    )
    lengths = [sizes.prompt + sizes.branch] * sizes.agents
    joined = row_visibility(lengths, device)
    found = [
        sdpa(sizes.plain),
        ours("plain", row_visibility([sizes.plain], device), CONFIG),
        varlen(lengths, device),
        ours("joined", joined, CONFIG),
        ours("window", joined, near),
        ours("tree", tree_visibility(sizes, device), CONFIG),
    ]
    cases = [case for case in found if case is not None]
    times = in_turns(cases, device, repeats, untimed=1)
    rows: list[dict[str, Any]] = []
    rate: dict[str, float] = {}
    took_ms: dict[str, float] = {}
    for case in cases:
        ms = took_ms[case.name] = statistics.median(times[case.name])
        flops = case.pairs * HEADS * HEAD_DIM * 4 * FORWARD_AND_BACKWARD
        rate[case.name] = flops / ms / 1e9
        row = {"case": case.name, "tokens": case.tokens, "pairs": case.pairs, "ms": ms}
        rows.append({**row, "tflops": rate[case.name], "all_ms": times[case.name]})
    pairs = {case.name: case.pairs for case in cases}
    figures = {
        "plain_vs_sdpa": rate["plain"] / rate["sdpa"],
        "tree_vs_sdpa": rate["tree"] / rate["sdpa"],
        "tree_vs_joined": rate["tree"] / rate["joined"],
        "tree_speedup": took_ms["joined"] / took_ms["tree"],
        "tree_pair_ratio": pairs["joined"] / pairs["tree"],
        "window_speedup": took_ms["joined"] / took_ms["window"],
        "window_pair_ratio": pairs["joined"] / pairs["window"],
    }
    if "varlen" in rate:
        figures["joined_vs_varlen"] = rate["joined"] / rate["varlen"]
    return report("attention", figures, rows, ("torch", "triton"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    emit(measure(options.repeats), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
