"""The bundled model on the processor: our server in turns with vLLM, part of `benchmarks.serve`.

Each of `SETTINGS` is a vLLM of its own (`python -m model.serve --engine vllm`), warmed, then asked
in turns with ours: the same 32 prompts of 64 tokens at once, 128 tokens each, over HTTP. vLLM is
asked for less (no ids, no log-probs, no seeds, which all cost it time). `vs_vllm_cpu_32` is the
median of the paired ratios against the setting where that is lowest; `vs_vllm_cpu_seconds_32` the
same by CPU-seconds of all processes, which hardly depends on what else the machine does.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serve_common import (
    NANO,
    NEW,
    ROWS,
    TIMEOUT_S,
    BenchmarkError,
    Server,
    ours,
    prompts,
    server,
)
from model.tokenizer import Tokenizer
from model.vllm_serve import find_vllm

START_S = 600.0


@dataclass(frozen=True)
class Setting:
    """How vLLM runs. `binding` is VLLM_CPU_OMP_THREADS_BIND (auto: one core is left for the rest);
    `openmp`: Intel's library instead of GNU's, as vLLM's guide for processors advises."""

    compiled: bool = True
    dtype: str = "float32"
    binding: str = "auto"
    threads: int = 0
    openmp: bool = False


CORES = len(os.sched_getaffinity(0))
SETTINGS = [
    Setting(),
    Setting(openmp=True),
    Setting(dtype="bfloat16"),
    Setting(binding="nobind", threads=CORES),
    Setting(binding="nobind", threads=1),
    Setting(compiled=False),
]


def measure_vllm(
    repeats: int, settings: Sequence[Setting] = SETTINGS
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows. Raises ModelError where there is no vLLM."""
    found = find_vllm(os.environ, "cpu")
    asked = prompts(Tokenizer.load(NANO))
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    with server("--prefix-cache-tokens", "0", "--threads", "1") as own:
        for setting in settings:
            options, environment = _launch(setting, found.python)
            began = time.perf_counter()
            with server(*options, environment=environment, start_s=START_S) as peer:
                started = time.perf_counter() - began
                made = asyncio.run(_in_turns(own, peer, asked, repeats))
            ratio = statistics.median(row["tok_s_32"] / row["vllm_tok_s_32"] for row in made)
            rows += [{"part": "vllm", **vars(setting), "start_s": started, **row} for row in made]
            if ratio < figures.get("vs_vllm_cpu_32", float("inf")):
                figures["vs_vllm_cpu_32"] = ratio
                pairs = [row["vllm_cpu_s"] / row["cpu_s"] for row in made]
                figures["vs_vllm_cpu_seconds_32"] = statistics.median(pairs)
                for key in ("vllm_tok_s_1", "vllm_tok_s_32"):
                    figures[key] = statistics.median(row[key] for row in made)
                figures["vllm_setting"] = list(settings).index(setting)
    return figures, rows


def _launch(setting: Setting, python: Path) -> tuple[list[str], dict[str, str]]:
    """Options and environment of `model.serve`."""
    options = ["--engine", "vllm", "--dtype", setting.dtype, "--prefix-cache-tokens", "0"]
    options += ["--max-batch", "64"]
    if not setting.compiled:
        options.append("--eager")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": setting.binding}
    if setting.threads:
        options += ["--threads", str(setting.threads)]
        environment["OMP_NUM_THREADS"] = str(setting.threads)
    if setting.openmp:
        library = next(iter(python.parent.parent.glob("**/libiomp5.so")), None)
        if library is None:
            raise BenchmarkError(f"no libiomp5.so beside {python}; run `make setup-vllm`")
        environment["LD_PRELOAD"] = str(library)
    return options, environment


async def _in_turns(
    own: Server, peer: Server, asked: Sequence[list[int]], repeats: int
) -> list[dict[str, float]]:
    rows = []
    limits = httpx.Limits(max_connections=ROWS, keepalive_expiry=0.5)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        await ours(client, own.url, asked)
        for count in (1, len(asked), len(asked)):  # the first of each size compiles
            await _vllm(client, peer.url, asked[:count])
        for _ in range(repeats):
            row = {"vllm_tok_s_1": await _vllm(client, peer.url, asked[:1])}
            before = own.cpu_s()
            row["tok_s_32"] = await ours(client, own.url, asked)
            row["cpu_s"] = own.cpu_s() - before
            before = peer.cpu_s()
            row["vllm_tok_s_32"] = await _vllm(client, peer.url, asked)
            row["vllm_cpu_s"] = peer.cpu_s() - before
            rows.append(row)
    return rows


async def _vllm(client: httpx.AsyncClient, url: str, asked: Sequence[list[int]]) -> float:
    """Tokens a second of these prompts asked at once."""

    async def ask(prompt: list[int]) -> int:
        body = {"prompt": prompt, "max_tokens": NEW, "temperature": 1.0, "ignore_eos": True}
        answer = await client.post(f"{url}/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    start = time.perf_counter()
    counts = await asyncio.gather(*(ask(prompt) for prompt in asked))
    took = time.perf_counter() - start
    if counts != [NEW] * len(asked):
        raise BenchmarkError(f"asked vLLM for {NEW} tokens each, got {sorted(set(counts))}")
    return sum(counts) / took
