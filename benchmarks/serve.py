"""How fast and how sturdy the server is: `python -m benchmarks.serve --json`

Speed: the bundled model in float32 on this machine's processor, 32 requests at once through HTTP
(32 different prompts of 64 tokens, 128 tokens each, sampled at temperature 1, prefix cache off),
against `generate` of transformers on the same checkpoint with the same prompts and lengths as one
batch of 32, at the fastest of the settings tried (all in `rows`). Both sides are warmed and
measured in turns, the server with one thread and with all cores; `vs_hf_generate_32` is the better
median of the paired ratios (the target is ≥ 2).

`vs_hf_cpu_32` compares tokens a CPU-second (server and peer on one thread each), which hardly
depends on what else the machine does.

Speculation: two of our servers in turns, one with `--draft` (rule "match"). `draft_tok_s_N` beside
`plain_tok_s_N`, N requests at once; from nine running requests on a server does not guess.

vLLM (`make setup-vllm`): see `benchmarks.serve_vllm`; `vs_vllm_cpu_32` has the target ≥ 1.5.

Load: 2,000 requests in waves of 400 against 64 slots and a queue of 256. Of each wave some leave in
the middle of their stream and some while they still wait. `answered` + `refused` + `left` are all
2,000; refused ones got 429 with Retry-After; `wrong` counts every other outcome, and `slots_after`
what still runs or waits at the end (both must be 0). `rss_*_mb` is the server's memory;
`rss_growth_mb` what the later waves added to the first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from benchmarks.common import emit, report
from benchmarks.serve_common import (
    NANO,
    NEW,
    PROMPT,
    ROWS,
    TIMEOUT_S,
    BenchmarkError,
    Server,
    ours,
    prompts,
    server,
)
from benchmarks.serve_vllm import measure_vllm
from model.errors import ModelError
from model.tokenizer import Tokenizer

SLOTS, QUEUE, WAVE, REQUESTS = 64, 256, 400, 2000
TARGET, VLLM_TARGET = 2.0, 1.5


# ---------------------------------------------------------------- speed


@dataclass(frozen=True)
class Setting:
    """How transformers may run the model."""

    attention: str
    experts: str
    cache: str
    threads: int


SETTINGS = [
    Setting(attention, experts, cache, threads)
    for threads in sorted({1, len(os.sched_getaffinity(0))})
    for attention, experts, cache in (
        ("sdpa", "grouped_mm", "dynamic"),
        ("sdpa", "grouped_mm", "static"),
        ("sdpa", "batched_mm", "dynamic"),
        ("sdpa", "eager", "dynamic"),
        ("eager", "grouped_mm", "dynamic"),
    )
]


class Peer:
    """`generate` of transformers with one setting."""

    def __init__(self, setting: Setting) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.setting = setting
        self.model = transformers.MiniMaxM2ForCausalLM.from_pretrained(
            NANO,
            attn_implementation=setting.attention,
            experts_implementation=setting.experts,
            dtype=torch.float32,
        ).eval()

    def tokens_s(self, asked: Sequence[list[int]], new: int = NEW) -> float:
        """Tokens a second of these prompts as one batch."""
        torch.set_num_threads(self.setting.threads)
        ids = torch.tensor(asked)
        more = {} if self.setting.cache == "dynamic" else {"cache_implementation": "static"}
        start = time.perf_counter()
        with torch.inference_mode():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
                disable_compile=True,
                **more,
            )
        took = time.perf_counter() - start
        if made.shape != (len(asked), PROMPT + new):
            raise BenchmarkError(f"transformers gave {tuple(made.shape)}")
        return len(asked) * new / took


def fastest_peers(asked: Sequence[list[int]], rows: list[dict[str, Any]]) -> tuple[Peer, Peer]:
    """The best setting of all and the best on one thread, each by the better of two short runs
    after a warm one."""
    tried: list[tuple[float, Peer]] = []
    for setting in SETTINGS:
        peer = Peer(setting)
        peer.tokens_s(asked, 8)
        speed = max(peer.tokens_s(asked, 32) for _ in range(2))
        rows.append({"part": "setting", "peer": "transformers", **vars(setting), "tok_s": speed})
        tried.append((speed, peer))
    single = [found for found in tried if found[1].setting.threads == 1]
    return _best(tried), _best(single)


def _best(tried: Sequence[tuple[float, Peer]]) -> Peer:
    return max(tried, key=lambda pair: pair[0])[1]


async def in_turns(
    running: Server, peer: Peer, asked: Sequence[list[int]], repeats: int
) -> list[dict[str, float]]:
    """Both sides, warmed, one after the other; and what a single request and eight get."""
    rows = []
    # The peer runs for longer than a server keeps an idle connection.
    limits = httpx.Limits(max_connections=ROWS, keepalive_expiry=0.5)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
        await ours(client, running.url, asked)
        peer.tokens_s(asked)
        for _ in range(repeats):
            row = {f"tok_s_{n}": await ours(client, running.url, asked[:n]) for n in (1, 8)}
            before = running.process.cpu_times()
            row["tok_s_32"] = await ours(client, running.url, asked)
            after = running.process.cpu_times()
            row["cpu_s"] = after.user + after.system - before.user - before.system
            start = time.process_time()
            row["hf_tok_s_32"] = peer.tokens_s(asked)
            row["hf_cpu_s"] = time.process_time() - start
            rows.append(row)
    return rows


def measure_speed(repeats: int, native: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows of the speed part: the server with one thread and with all."""
    asked = prompts(Tokenizer.load(NANO))
    rows: list[dict[str, Any]] = []
    best, single = fastest_peers(asked, rows)
    figures: dict[str, float] = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        options = ["--prefix-cache-tokens", "0", "--threads", str(threads), "--native", native]
        with server(*options) as running:
            peer = single if threads == 1 else best
            made = asyncio.run(in_turns(running, peer, asked, repeats))
        rows += [{"part": "speed", "threads": threads, **row} for row in made]
        found = {key: statistics.median(row[key] for row in made) for key in made[0]}
        ratio = statistics.median(row["tok_s_32"] / row["hf_tok_s_32"] for row in made)
        if threads == 1:
            pairs = [row["hf_cpu_s"] / row["cpu_s"] for row in made]
            figures["vs_hf_cpu_32"] = statistics.median(pairs)
        if ratio > figures.get("vs_hf_generate_32", 0):
            figures |= {key: found[key] for key in found if "tok_s" in key}
            figures |= {"vs_hf_generate_32": ratio, "threads": threads}
    return figures, rows


def measure_speculation(repeats: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows of the same requests with and without guesses."""
    asked = prompts(Tokenizer.load(NANO))
    options = ["--prefix-cache-tokens", "0", "--threads", "1"]

    async def turns(servers: dict[str, Server]) -> list[dict[str, Any]]:
        rows = []
        limits = httpx.Limits(max_connections=ROWS, keepalive_expiry=0.5)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
            for running in servers.values():
                await ours(client, running.url, asked)
            for _ in range(repeats):
                for n in (1, 8, ROWS):
                    for name, running in servers.items():
                        speed = await ours(client, running.url, asked[:n])
                        row = {"part": "speculation", "server": name, "requests": n}
                        rows.append(row | {"tok_s": speed})
        return rows

    with server(*options) as plain, server(*options, "--draft", str(NANO)) as draft:
        rows = asyncio.run(turns({"plain": plain, "draft": draft}))
    figures = {
        f"{name}_tok_s_{n}": statistics.median(
            row["tok_s"] for row in rows if (row["server"], row["requests"]) == (name, n)
        )
        for name in ("plain", "draft")
        for n in (1, 8, ROWS)
    }
    return figures, rows


# ---------------------------------------------------------------- load


async def one(client: httpx.AsyncClient, url: str, number: int, rng: random.Random) -> str:
    """One request of a wave: what became of it."""
    new = rng.randint(8, 64)
    kind = rng.choices(["whole", "stream", "leaves", "leaves early"], [60, 25, 10, 5])[0]
    prompt = [rng.randint(300, 2000) for _ in range(rng.randint(4, 200))]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": new, "seed": number, "ignore_eos": True}
    if kind == "whole":
        answer = await client.post(f"{url}/completions", json=body)
        if answer.status_code == 429 and "retry-after" in answer.headers:
            return "refused"
        done = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == new
        return "answered" if done else "wrong"
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "leaves early":
        with contextlib.suppress(httpx.TimeoutException):
            answer = await client.post(f"{url}/completions", json=body, timeout=0.05)
            if answer.status_code == 429:
                return "refused"
        return "left"
    events = 0
    last = ""
    async with client.stream("POST", f"{url}/completions", json=body) as answer:
        if answer.status_code == 429 and "retry-after" in answer.headers:
            return "refused"
        if answer.status_code != 200:
            return "wrong"
        async for line in answer.aiter_lines():
            events += line.startswith("data: {")
            if kind == "leaves" and events == 3:
                return "left"
            last = line if line.startswith("data: {") else last
    usage = json.loads(last.removeprefix("data: "))["usage"]
    return "answered" if usage["completion_tokens"] == new else "wrong"


def measure_load(requests: int, seed: int = 0) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures and rows of the load part."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    total: Counter[str] = Counter()

    async def waves(running: Server) -> int:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:
            for first in range(0, requests, WAVE):
                count, start = min(WAVE, requests - first), time.perf_counter()
                rngs = [random.Random(rng.random()) for _ in range(count)]
                work = [one(client, running.url, first + i, own) for i, own in enumerate(rngs)]
                found = Counter(await asyncio.gather(*work))
                total.update(found)
                took = time.perf_counter() - start
                wave = {"first": first, "seconds": took, "rss_mb": running.rss_mb(), **found}
                rows.append({"part": "load", **wave})
            left = 1
            for _ in range(600):
                health = (await client.get(running.url.replace("/v1", "/health"))).json()
                left = health["running"] + health["waiting"]
                if not left:
                    break
                await asyncio.sleep(0.1)
        return left

    with server("--max-batch", str(SLOTS), "--max-queue", str(QUEUE)) as running:
        before = running.rss_mb()
        left = asyncio.run(waves(running))
        after, peak = running.rss_mb(), running.peak_mb()
    figures = {name: total[name] for name in ("answered", "refused", "left", "wrong")}
    return figures | {
        "slots_after": left,
        "rss_before_mb": before,
        "rss_after_mb": after,
        "rss_peak_mb": peak,
        "rss_growth_mb": after - rows[0]["rss_mb"],
    }, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of the load part")
    parser.add_argument("--native", choices=["auto", "off"], default="auto", help="speed part")
    parser.add_argument("--only", choices=["speed", "speculation", "vllm", "load"], default=None)
    options = parser.parse_args(arguments)
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    try:
        if options.only in (None, "speed"):
            more, made = measure_speed(options.repeats, options.native)
            figures, rows = figures | more, rows + made
        if options.only in (None, "speculation"):
            more, made = measure_speculation(options.repeats)
            figures, rows = figures | more, rows + made
        if options.only in (None, "vllm"):
            more, made = measure_vllm(options.repeats)
            figures, rows = figures | more, rows + made
        if options.only in (None, "load"):
            more, made = measure_load(options.requests)
            figures, rows = figures | more, rows + made
    except (BenchmarkError, ModelError, httpx.HTTPError) as error:
        print(f"error: {error!r}", file=sys.stderr)
        return 5
    emit(report("serve", figures, rows, ("torch", "transformers", "uvicorn")), options.json)
    missed = figures.get("vs_hf_generate_32", TARGET) < TARGET
    missed |= figures.get("vs_vllm_cpu_32", VLLM_TARGET) < VLLM_TARGET
    missed |= bool(figures.get("wrong", 0) or figures.get("slots_after", 0))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
