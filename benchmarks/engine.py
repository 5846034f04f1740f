"""What a step of the server's engine costs, without HTTP: `python -m benchmarks.engine --json`

The bundled model in float32 on one thread; CPU-seconds, the median of the repeats unless said.
`step_ms_N` is a decode step of N rows (64-token prompts, every token told to a listener) and
`python_ms_N` what of it is spent outside native code. `prompt_native_s` and `prompt_torch_s` are a
prompt of 4,000 tokens read whole, the least of the repeats. `reload_s` is what loading a checkpoint
takes by the clock, `reload_cpu_s` of CPU time. Rows: a prompt of 2,000 tokens beside 16 rows that
write, by tokens a piece: `prompt_s` beside the decode steps, and the `longest_ms` of its steps.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common import ROOT, emit, report
from model.batching import Batcher
from model.checkpoint import load_model
from model.generate import Engine, GenRequest, Row
from model.native.step import NativeModel
from model.running import RunningBatch
from model.serve import load_service
from model.slots import JoinAttend, SlotCache
from model.transformer import Transformer

NANO = ROOT / "model" / "checkpoints" / "nano"
PIECES = (64, 128, 256, 512, 1024, 2048)
STEPS = 60


def ids(count: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(2048) for _ in range(count))


def timed(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def step_ms(model: Transformer, rows: int) -> tuple[float, float]:
    """A decode step, and its part outside of native code (ms)."""
    spent = 0.0

    class Timed(NativeModel):
        def logits(self, *given: Any) -> torch.Tensor:
            nonlocal spent
            start = time.thread_time()
            made = super().logits(*given)
            spent += time.thread_time() - start
            return made

        def draw(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal spent
            start = time.thread_time()
            made = super().draw(*given)
            spent += time.thread_time() - start
            return made

    running = RunningBatch(Engine(model), prefix_tokens=0)
    running._native = Timed(model)
    batcher, rng = Batcher(running, start=False), random.Random(0)
    asked = [GenRequest(ids(64, rng), 2 * STEPS + 40, seed=i) for i in range(rows)]
    batcher.submit(asked, [lambda _: None] * rows)
    for _ in range(20):
        batcher.turn()
    spent = whole = 0.0
    for _ in range(STEPS):
        whole += timed(batcher.turn)
    return 1000 * whole / STEPS, 1000 * (whole - spent) / STEPS


def prompt_s(model: Transformer, forward: Transformer | NativeModel, tokens: int) -> float:
    """Reading one prompt whole."""
    cache = SlotCache(model.config, torch.device("cpu"), torch.float32)
    cache.fit(1, tokens, 0, 0)
    attend = JoinAttend(cache, 0, [0], [tokens])
    prompt = torch.tensor(ids(tokens, random.Random(0)))
    with torch.inference_mode():
        return timed(lambda: forward.run(prompt, attend.column_M, attend))


def pieces(model: Transformer, piece: int, native: bool) -> dict[str, Any]:
    """A prompt of 2,000 tokens, read in pieces beside 16 rows that write."""
    rng = random.Random(0)
    batch = RunningBatch(Engine(model), prefix_tokens=0, prefill_tokens=piece, native=native)
    batch.join([Row(GenRequest(ids(16, rng), 1000, seed=i)) for i in range(16)])
    for _ in range(20):
        batch.step()
    plain = statistics.median(timed(batch.step) for _ in range(10))
    row, steps = Row(GenRequest(ids(2000, rng), 1, seed=99)), []
    batch.join([row])
    while row.finish is None:
        steps.append(timed(batch.step))
    kind = {"native": native, "piece": piece, "decode_ms": 1000 * plain}
    return kind | {"prompt_s": sum(steps) - len(steps) * plain, "longest_ms": 1000 * max(steps)}


def measure(repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load_model(NANO)
    figures: dict[str, float] = {}
    for count in (1, 32):
        made = [step_ms(model, count) for _ in range(repeats)]
        figures[f"step_ms_{count}"] = statistics.median(whole for whole, _ in made)
        figures[f"python_ms_{count}"] = statistics.median(rest for _, rest in made)
    native = NativeModel(model)
    turns = [(prompt_s(model, native, 4000), prompt_s(model, model, 4000)) for _ in range(repeats)]
    figures["prompt_native_s"] = min(ours for ours, _ in turns)
    figures["prompt_torch_s"] = min(torchs for _, torchs in turns)
    service = load_service(NANO, device="cpu", threads=1)
    start = time.process_time()
    loads = [asyncio.run(service.load(NANO, version)) for version in range(1, repeats + 1)]
    figures["reload_s"] = statistics.median(loads)
    figures["reload_cpu_s"] = (time.process_time() - start) / repeats
    service.batcher.close()
    rows = [pieces(model, piece, native) for native in (True, False) for piece in PIECES]
    return report("engine", figures, rows, ("torch",))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    emit(measure(options.repeats), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
