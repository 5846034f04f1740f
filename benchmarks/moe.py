"""One layer's experts against transformers': `python -m benchmarks.moe --json`

Forward and backward, gradients of tokens, routing weights and expert weights included, on the same
inputs: ours, the plain loop over experts, and transformers' MiniMaxM2Experts with each of its
`experts_implementation` settings. All take turns in one run; times are medians.

CPU: one thread, CPU-seconds. GPU: CUDA events, bfloat16. `vs_hf_*` and `vs_loop_*` are the worst
over all shapes and types, against the fastest setting. Their router gives float32 weights, which
makes their grouped_mm multiply in float32 at the end; `vs_hf_short_*` compares with weights made
short beforehand, which no setting of theirs does. `bare_product_share_*` is the time that the
products alone would take over ours, at worst. `rows` has every time and the stages of our GPU path.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import emit, report
from model.experts import loop_experts, run_experts, sorted_experts

F32, BF16 = torch.float32, torch.bfloat16
CPU_TARGET, GPU_TARGET, GPU_BEST_TARGET = 1.5, 1.8, 2.5
# transformers' batched_mm copies an expert's weights for every pair: tried up to so many bytes.
BATCHED_BYTES = {"cpu": 3e9, "cuda": 20e9}


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size, expert width, experts, experts a token; `skew` makes a few popular."""

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    skew: bool = False

    @property
    def work(self) -> float:
        """Floating-point operations of forward and backward."""
        return 18.0 * self.tokens * self.top_k * self.hidden * self.width


NANO = Shape("nano", 16_384, 256, 96, 16, 2)
NANO_FEW = Shape("nano, few tokens", 4096, 256, 96, 16, 2)
SMALL = Shape("small", 2048, 1024, 512, 16, 4)
FINE = Shape("fine-grained", 4096, 512, 128, 64, 8)
CPU_CASES = (
    (NANO, F32),
    (NANO_FEW, F32),
    (SMALL, F32),
    (SMALL, BF16),
    (FINE, F32),
    (FINE, BF16),
)
SHORT = ", short routing weights"
GPU_SHAPES = (
    Shape("d 1024", 16_384, 1024, 512, 64, 8),
    Shape("d 1024, skewed", 16_384, 1024, 512, 64, 8, skew=True),
    Shape("d 2048", 16_384, 2048, 1024, 64, 8),
    Shape("M2 layer", 8_192, 3072, 1536, 256, 8),
)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Inputs:
    """Leaves with gradients, the routing, and the gradient that comes back."""

    x_MH: Tensor
    weights_Mk: Tensor
    experts_Mk: Tensor
    w13_EOH: Tensor
    w2_EIH: Tensor
    grad_MH: Tensor

    def leaves(self) -> tuple[Tensor, ...]:
        return self.x_MH, self.weights_Mk, self.w13_EOH, self.w2_EIH


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """Random tokens and weights; routing weights are float32, as both routers give them."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    scores_ME = draw(shape.tokens, shape.experts)
    if shape.skew:  # popularity falls with the rank: the first expert has several times its share
        scores_ME -= torch.arange(1, shape.experts + 1, device=device).log()
    top = scores_ME.sigmoid().topk(shape.top_k, dim=-1)
    weights_Mk = top.values / top.values.sum(-1, keepdim=True)
    hidden, width = shape.hidden, shape.width
    w13_EOH = torch.empty(shape.experts, 2 * width, hidden, dtype=dtype, device=device)
    w2_EIH = torch.empty(shape.experts, width, hidden, dtype=dtype, device=device)
    w13_EOH.normal_(0, hidden**-0.5, generator=generator)
    w2_EIH.normal_(0, width**-0.5, generator=generator)
    x_MH, grad_MH = (draw(shape.tokens, hidden).to(dtype) for _ in range(2))
    leaves = (t.requires_grad_() for t in (x_MH, weights_Mk, w13_EOH, w2_EIH))
    x_MH, weights_Mk, w13_EOH, w2_EIH = leaves
    return Inputs(x_MH, weights_Mk, top.indices, w13_EOH, w2_EIH, grad_MH)


def our_call(inputs: Inputs, function: Callable[..., Tensor], *more: Any) -> Call:
    """A forward and backward pass of one of our functions; returns its output."""
    leaves = inputs.leaves()

    def call() -> Tensor:
        x_MH, weights_Mk, w13_EOH, w2_EIH = leaves
        out_MH = function(x_MH, weights_Mk, inputs.experts_Mk, w13_EOH, w2_EIH, *more)
        torch.autograd.backward(out_MH, inputs.grad_MH)
        for leaf in leaves:
            leaf.grad = None
        return out_MH.detach()

    return call


def their_calls(shape: Shape, inputs: Inputs) -> dict[str, Call]:
    """The same by transformers' module, with each setting that fits here."""
    from transformers import MiniMaxM2Config
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2Experts

    down_EHI = inputs.w2_EIH.detach().transpose(1, 2).contiguous()
    calls: dict[str, Call] = {}
    settings = ["eager", "grouped_mm"]
    copied = shape.tokens * shape.top_k * inputs.w2_EIH[0].nbytes * 3
    if copied < BATCHED_BYTES[inputs.x_MH.device.type]:
        settings.append("batched_mm")
    for setting in settings:
        config = MiniMaxM2Config(
            num_local_experts=shape.experts,
            hidden_size=shape.hidden,
            intermediate_size=shape.width,
            hidden_act="silu",
        )
        config._experts_implementation = setting
        with torch.device("meta"):
            module = MiniMaxM2Experts(config)
        module.gate_up_proj = torch.nn.Parameter(inputs.w13_EOH.detach())
        module.down_proj = torch.nn.Parameter(down_EHI)
        types = [inputs.weights_Mk.dtype]
        if setting == "grouped_mm" and inputs.x_MH.dtype != types[0]:
            types.append(inputs.x_MH.dtype)  # spares it float32 products with the weights
        for dtype in types:
            weights_Mk = inputs.weights_Mk.detach().to(dtype).requires_grad_()
            name = setting if dtype == types[0] else setting + SHORT
            calls[name] = _their_call(module, inputs, weights_Mk)
    return calls


def _their_call(module: Any, inputs: Inputs, weights_Mk: Tensor) -> Call:
    leaves = (inputs.x_MH, weights_Mk, module.gate_up_proj, module.down_proj)

    def call() -> Tensor:
        out_MH: Tensor = module(inputs.x_MH, inputs.experts_Mk, weights_Mk)
        torch.autograd.backward(out_MH, inputs.grad_MH)
        for leaf in leaves:
            leaf.grad = None
        return out_MH.detach()

    return call


def in_turns(
    calls: dict[str, Call], timer: Callable[[Call], float], limit: float
) -> dict[str, Any]:
    """Median seconds of each call, one round after the other, for at most `limit` seconds a call
    or three times. An untimed call goes before each timed one, so that nobody pays for memory that
    another has given back."""

    def warm(call: Call) -> float:
        timer(call)
        return timer(call)

    spent = {name: warm(call) for name, call in calls.items()}
    repeats = {name: min(max(int(limit / max(s, 1e-9)), 2), 15) for name, s in spent.items()}
    times = {name: [taken] for name, taken in spent.items()}
    for turn in range(max(repeats.values())):
        for name, call in calls.items():
            if turn < repeats[name]:
                times[name].append(warm(call))
    return {name: statistics.median(taken) for name, taken in times.items()}


def cpu_seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def gpu_seconds(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def bare_products(shape: Shape, inputs: Inputs) -> dict[str, Call]:
    """The products of both passes on rows that are sorted already: no other work."""
    flat = inputs.experts_Mk.flatten()
    counts_E = torch.bincount(flat, minlength=shape.experts)
    w13_EOH, w2_EIH = inputs.w13_EOH.detach(), inputs.w2_EIH.detach()
    rows = len(flat)
    x_RH, y_RH = (w13_EOH.new_ones(rows, shape.hidden) for _ in range(2))
    up_RO, h_RI = w13_EOH.new_ones(rows, 2 * shape.width), w13_EOH.new_ones(rows, shape.width)
    if w13_EOH.is_cuda:
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        return {
            "x @ w13": lambda: F.grouped_mm(x_RH, w13_EOH.transpose(1, 2), offs=ends_E),
            "h @ w2": lambda: F.grouped_mm(h_RI, w2_EIH, offs=ends_E),
            "grad @ w2": lambda: F.grouped_mm(y_RH, w2_EIH.transpose(1, 2), offs=ends_E),
            "grad of w2": lambda: F.grouped_mm(h_RI.t(), y_RH, offs=ends_E),
            "grad of w13": lambda: F.grouped_mm(up_RO.t(), x_RH, offs=ends_E),
            "grad @ w13": lambda: F.grouped_mm(up_RO, w13_EOH, offs=ends_E),
        }
    wide = [t.float() for t in (x_RH, y_RH, up_RO, h_RI)]
    w13, w2 = w13_EOH[0].float(), w2_EIH[0].float()
    grad13, grad2 = torch.empty_like(w13), torch.empty_like(w2)

    def products() -> None:
        parts = (torch.split(t, counts_E.tolist()) for t in wide)
        for x, y, up, h in zip(*parts, strict=True):
            torch.mm(x, w13.t(), out=up)
            torch.mm(h, w2, out=y)
            torch.mm(y, w2.t(), out=h)
            torch.mm(h.t(), y, out=grad2)
            torch.mm(up.t(), x, out=grad13)
            torch.mm(up, w13, out=x)

    return {"float32 products": products}


def on_cpu(limit: float) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows of the CPU cases."""
    rows: list[dict[str, Any]] = []
    worst: dict[str, list[float]] = {}
    for shape, dtype in CPU_CASES:
        inputs = make_inputs(shape, dtype, "cpu")
        calls = {"ours": our_call(inputs, run_experts), "loop": our_call(inputs, loop_experts)}
        theirs = their_calls(shape, inputs)
        seconds = in_turns(calls | theirs | bare_products(shape, inputs), cpu_seconds, limit)
        found = {
            "vs_loop_cpu": seconds["loop"] / seconds["ours"],
            "vs_hf_cpu": _best(seconds, theirs) / seconds["ours"],
            "vs_hf_short_cpu": _best(seconds, theirs, short=True) / seconds["ours"],
            "bare_product_share_cpu": seconds["float32 products"] / seconds["ours"],
        }
        rows += _rows("cpu", shape, dtype, seconds)
        rows.append({"part": "cpu", "shape": shape.name, "dtype": _name(dtype), **found})
        for name, value in found.items():
            worst.setdefault(name, []).append(value)
    return {name: min(values) for name, values in worst.items()}, rows


def on_gpu(limit: float) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows of the GPU shapes, and of what could be fused further."""
    rows: list[dict[str, Any]] = []
    against_loop, against_hf, against_short, share = [], [], [], []
    for shape in GPU_SHAPES:
        inputs = make_inputs(shape, BF16, "cuda")
        theirs = their_calls(shape, inputs)
        calls = {
            "ours": our_call(inputs, run_experts),
            "ours, plain passes": our_call(inputs, sorted_experts, "grouped"),
            "loop": our_call(inputs, loop_experts),
        }
        rows.append({"part": "check", "shape": shape.name, "difference": _apart(calls, theirs)})
        seconds = in_turns(calls | theirs, gpu_seconds, limit)
        bare = in_turns(bare_products(shape, inputs), gpu_seconds, limit)
        against_loop.append(seconds["loop"] / seconds["ours"])
        against_hf.append(_best(seconds, theirs) / seconds["ours"])
        against_short.append(_best(seconds, theirs, short=True) / seconds["ours"])
        share.append(sum(bare.values()) / seconds["ours"])
        rows += _rows("gpu", shape, BF16, seconds)
        rows += [
            {"part": "product", "shape": shape.name, "name": name, "ms": 1e3 * s}
            for name, s in bare.items()
        ]
        with torch.no_grad():
            rows += stages(shape, inputs, limit)
        del inputs, calls, theirs
        torch.cuda.empty_cache()
    figures = {
        "vs_loop_gpu": min(against_loop),
        "vs_hf_gpu": min(against_hf),
        "vs_hf_gpu_best": max(against_hf),
        "vs_hf_short_gpu": min(against_short),
        "bare_product_share_gpu": min(share),
    }
    return figures, rows


def _best(seconds: dict[str, float], theirs: dict[str, Call], short: bool = False) -> float:
    """Their fastest setting, with or without those that they do not offer."""
    return min(seconds[name] for name in theirs if short or not name.endswith(SHORT))


def stages(shape: Shape, inputs: Inputs, limit: float) -> list[dict[str, Any]]:
    """Each memory-bound pass of our GPU path by itself, with the bytes that it moves."""
    from model import experts_fused as fused

    x_MH, weights_Mk, w13_EOH, _ = (leaf.detach() for leaf in inputs.leaves())
    rows = fused.sort_pairs(inputs.experts_Mk, shape.experts)
    x_RH = fused.gather(x_MH, rows)
    up_RO = F.grouped_mm(x_RH, w13_EOH.transpose(1, 2), offs=rows.ends_E)
    h_RI = fused.swiglu(up_RO, weights_Mk, rows)

    moved = {
        "sort": 0,
        "gather": x_RH.nbytes + x_MH.nbytes,
        "swiglu": up_RO.nbytes + h_RI.nbytes,
        "combine": x_RH.nbytes + x_MH.nbytes,
        "swiglu backward": 2 * up_RO.nbytes + 2 * h_RI.nbytes,
    }
    calls: dict[str, Call] = {
        "sort": lambda: fused.sort_pairs(inputs.experts_Mk, shape.experts),
        "gather": lambda: fused.gather(x_MH, rows),
        "swiglu": lambda: fused.swiglu(up_RO, weights_Mk, rows),
        "combine": lambda: fused.combine(x_RH, rows),
        "swiglu backward": lambda: fused.swiglu_backward(up_RO, weights_Mk, rows, h_RI),
    }
    seconds = in_turns(calls, gpu_seconds, limit)
    return [
        {
            "part": "stage",
            "shape": shape.name,
            "name": name,
            "ms": 1e3 * s,
            **({"gb_s": moved[name] / s / 1e9} if moved.get(name) else {}),
        }
        for name, s in seconds.items()
    ]


def _apart(calls: dict[str, Call], theirs: dict[str, Call]) -> float:
    """Relative distance between our output and theirs."""
    ours, other = calls["ours"]().float(), theirs["grouped_mm"]().float()
    return float((ours - other).norm() / other.norm())


def _rows(
    part: str, shape: Shape, dtype: torch.dtype, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    return [
        {
            "part": part,
            "shape": shape.name,
            "sizes": [shape.tokens, shape.hidden, shape.width, shape.experts, shape.top_k],
            "dtype": _name(dtype),
            "name": name,
            "ms": 1e3 * s,
            "gflop_s": shape.work / s / 1e9,
        }
        for name, s in seconds.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--no-cpu", action="store_true", help="only the GPU part")
    parser.add_argument(
        "--limit", type=float, default=3.0, help="seconds for each thing that is timed"
    )
    options = parser.parse_args(arguments)
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    if not options.no_cpu:
        torch.set_num_threads(1)
        figures, rows = on_cpu(options.limit)
    if torch.cuda.is_available():
        found, more = on_gpu(options.limit / 10)
        figures, rows = figures | found, rows + more
    emit(report("moe", figures, rows, ("torch", "transformers", "triton")), options.json)
    wanted = {"vs_hf_cpu": CPU_TARGET, "vs_hf_gpu": GPU_TARGET, "vs_hf_gpu_best": GPU_BEST_TARGET}
    return int(any(figures.get(name, math.inf) < least for name, least in wanted.items()))


if __name__ == "__main__":
    sys.exit(main())
