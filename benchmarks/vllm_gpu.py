"""vLLM on one card against our own engine: `PYTHONPATH=SITE python -m benchmarks.vllm_gpu --json`

SITE holds vLLM. `model.serve` starts both engines on the same card: vLLM in float32 without
compilation (for exact comparison), on the bundled nano and on a random model (`_random`), in
bfloat16 as it runs fastest (for speed), and ours in float32. Printed, and written to
`benchmarks/results/`:

| figure | what |
|---|---|
| `ids_equal` | greedy, float32: share of replies with the same ids as ours |
| `ids_wrong`, `logprob_max` | replies that differ but for ties (0), largest difference (< 1e-4) |
| `…_after_file`, `…_after_ipc` | the same after new weights by folder, and from a live model |
| `load_s` | a load alone; below 1 s, as are the next two |
| `reload_file_s`, `reload_ipc_s` | hand over with pause and resume |
| `chat`, `auto`, `required`, `schema` | 1 where the answer is that of our own server |
| `tok_s_N`, `own_tok_s_N` | tokens a second over HTTP: N requests, 32 prompt tokens, 128 new |
| `fault_…` | what happens with one mend of `model.vllm_plugin` left out |
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.common import ROOT, emit, report
from benchmarks.serve_common import NANO, BenchmarkError, Server, server
from model.checkpoint import load_model, save_checkpoint
from model.config import PRESETS
from model.generate import Engine, Generation, GenRequest
from model.transformer import Transformer
from rl.engine_http import HttpEngine
from rl.errors import ConfigError, InfraError
from rl.weight_sync import Way, WeightPush

START_S = 240.0
PROMPT, NEW, WAVES = 32, 128, 3
CONCURRENT = (1, 32, 256)
LOGPROB_LIMIT, RELOAD_LIMIT_S = 1e-4, 1.0
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two small numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "mood": {"type": "string", "enum": ["calm", "hasty"]},
            },
            "required": ["a", "mood"],
        },
    },
}
CHATS: dict[str, dict[str, Any]] = {
    "chat": {},
    "auto": {"tools": [TOOL]},
    "required": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    },
}
EXACT = ("--engine", "vllm", "--dtype", "float32", "--eager", "--control", "--max-batch", "64")
FAST = ("--engine", "vllm", "--dtype", "bfloat16", "--max-batch", "512")
WITHOUT = "SELFEVO_VLLM_WITHOUT"

Figures = dict[str, float]


class Fleet:
    """All servers, started at once; each is waited for when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self._threads = ThreadPoolExecutor(16)
        self._starting: dict[str, Future[Server]] = {}
        self.start_s: dict[str, float] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._stack.close()

    def start(self, name: str, *options: str, checkpoint: Path = NANO, without: str = "") -> None:
        environment = {"VLLM_CACHE_ROOT": str(self._folder / f"cache-{name}"), WITHOUT: without}
        environment["VLLM_PLUGINS"] = "selfevo"  # the site may have mends of its own
        began = time.perf_counter()

        def up() -> Server:
            found = server(
                *options,
                checkpoint=checkpoint,
                device="cuda",
                environment=environment,
                start_s=START_S,
            )
            running = self._stack.enter_context(found)
            self.start_s[name] = time.perf_counter() - began
            return running

        self._starting[name] = self._threads.submit(up)

    def __getitem__(self, name: str) -> Server:
        return self._starting[name].result()


def random_checkpoint(folder: Path) -> Path:
    """A small random model with the bundled tokenizer; its weights are steep, so that every part
    shows in the log-probs."""
    config = replace(
        PRESETS["nano"],
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=64,
        rotary_dim=32,
        num_local_experts=8,
        initializer_range=0.08,
    )
    model = Transformer(config, seed=5)
    for layer in model.layers:
        layer.block_sparse_moe.e_score_correction_bias.uniform_(-0.2, 0.2)
    return save_checkpoint(model, folder / "random", dtype="float32", tokenizer_from=NANO)


def requests(vocab: int, count: int, new: int) -> list[GenRequest]:
    """Greedy requests with random prompts of 32 tokens."""
    ids = torch.randint(8, vocab, (count, PROMPT), generator=torch.Generator().manual_seed(1))
    return [
        GenRequest(prompt_ids=tuple(row), max_new_tokens=new, temperature=0) for row in ids.tolist()
    ]


def compare(name: str, made: Sequence[Generation], expected: Sequence[Generation]) -> Figures:
    """Share of equal replies; how many differ, other than from a token on where both engines find
    two tokens equally likely; the largest difference of log-probs up to there."""
    equal, wrong, worst = 0, 0, 0.0
    for mine, theirs in zip(made, expected, strict=True):
        equal += mine.ids == theirs.ids
        for a, b, p, q in zip(mine.ids, theirs.ids, mine.logprobs, theirs.logprobs, strict=False):
            if a != b:
                wrong += abs(p - q) > LOGPROB_LIMIT
                break
            worst = max(worst, abs(p - q))
    return {
        f"ids_equal{name}": equal / len(made),
        f"ids_wrong{name}": wrong,
        f"logprob_max{name}": worst,
    }


def check_numbers(label: str, running: Server, checkpoint: Path, folder: Path) -> Figures:
    """Greedy numbers before and after new weights by file and by ipc, and how long those took."""
    model = load_model(checkpoint, device="cuda")
    asked = requests(model.config.vocab_size, 32, 64)
    mine = Engine(model, device="cuda")
    figures: Figures = {}
    with HttpEngine(running.url) as engine:
        engine.generate(asked[:2])  # compiles
        figures |= compare(label, engine.generate(asked), mine.generate(asked))
        engine.load(checkpoint, 1)  # the first load of a process is not the usual one
        began = time.perf_counter()
        engine.load(checkpoint, 2)
        figures[f"load_s{label}"] = time.perf_counter() - began
        ways: tuple[Way, ...] = ("file", "ipc")
        for version, way in enumerate(ways, start=3):
            for weight in model.parameters():
                weight.data.mul_(1.02)
            push = WeightPush(engine, way, folder=folder / f"w{label}", dtype=torch.float32)
            if way == "ipc":
                push.push(model, version)  # opens the handles' way
            began = time.perf_counter()
            push.push(model, version)
            figures[f"reload_{way}_s{label}"] = time.perf_counter() - began
            made = engine.generate(asked)
            figures |= compare(f"_after_{way}{label}", made, mine.generate(asked))
        if {reply.version for reply in made} != {version}:
            raise BenchmarkError(f"replies carry versions {[reply.version for reply in made]}")
    return figures


def check_answers(theirs: Server, mine: Server) -> Figures:
    """Whether both servers answer the same chats alike."""

    def answer(url: str, body: dict[str, Any]) -> Any:
        asked = {"messages": [{"role": "user", "content": "say some words"}], **body}
        asked |= {"temperature": 0, "max_tokens": 150}
        found = httpx.post(f"{url}/chat/completions", json=asked, timeout=120)
        found.raise_for_status()
        choice = found.json()["choices"][0]
        calls = [call["function"] for call in choice["message"].get("tool_calls") or []]
        return (
            choice["message"]["content"],
            choice["message"]["reasoning_content"],
            [(call["name"], json.loads(call["arguments"])) for call in calls],
            choice["finish_reason"],
            choice["constrained"],
            found.json()["usage"]["completion_tokens"],
        )

    figures: Figures = {}
    for name, body in CHATS.items():
        one, two = answer(theirs.url, body), answer(mine.url, body)
        figures[name] = float(one == two)
        if one != two:
            print(f"{name}: {one!r} is not {two!r}", file=sys.stderr)
    return figures


async def tokens_s(url: str, count: int) -> float:
    """Tokens a second of `count` requests at once."""
    generator = torch.Generator().manual_seed(count)
    prompts = torch.randint(8, 2048, (count, PROMPT), generator=generator).tolist()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:

        async def ask(prompt: list[int]) -> int:
            body = {"prompt": prompt, "max_tokens": NEW, "temperature": 1.0, "ignore_eos": True}
            answer = await client.post(f"{url}/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        counts = await asyncio.gather(*(ask(prompt) for prompt in prompts))
    return sum(counts) / (time.perf_counter() - began)


def measure_speed(prefix: str, running: Server, rows: list[dict[str, Any]]) -> Figures:
    """Medians of three waves of each size, after one that warms."""
    figures: Figures = {}
    for count in CONCURRENT:
        waves = [asyncio.run(tokens_s(running.url, count)) for _ in range(WAVES + 1)][1:]
        rows.append(
            {"part": "speed", "engine": prefix or "vllm", "requests": count, "tok_s": waves}
        )
        figures[f"{prefix}tok_s_{count}"] = statistics.median(waves)
    return figures


def check_faults(fleet: Fleet, names: Sequence[str]) -> dict[str, Any]:
    """What becomes of a vLLM without one mend."""
    found: dict[str, Any] = {}
    asked = requests(2048, 16, 64)
    expected = Engine(load_model(NANO, device="cuda"), device="cuda").generate(asked)
    for name in names:
        try:
            with HttpEngine(fleet[name].url, timeout_s=60) as engine:
                differs = compare("", engine.generate(asked), expected)["logprob_max"]
                found[f"fault_{name}"] = f"largest log-prob difference {differs:.2g}"
                engine.load(NANO, 1)
        except (BenchmarkError, InfraError, ConfigError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            telling = [line for line in lines if "Error" in line or "answered" in line]
            found[f"fault_{name}"] = (telling or lines)[-1][-200:]
    return found


def measure(folder: Path, *, faults: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All figures and rows."""
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    random = random_checkpoint(folder)
    without = ("loader", "float32", "sampler", "ray") if faults else ()
    with Fleet(folder) as fleet:
        fleet.start("fast", *FAST)
        fleet.start("exact", *EXACT)
        fleet.start("random", *EXACT, checkpoint=random)
        fleet.start("own", "--max-batch", "256", "--prefix-cache-tokens", "0")
        for name in without:
            fleet.start(name, *EXACT, without=name)
        steps: list[Callable[[], dict[str, Any]]] = [
            lambda: check_numbers("", fleet["exact"], NANO, folder),
            lambda: check_numbers("_random", fleet["random"], random, folder),
            lambda: check_faults(fleet, without),
        ]
        fleet["own"]
        for step in steps:
            figures |= step()
        # the exact server has other weights now; the first ones back before answers are compared
        with HttpEngine(fleet["exact"].url) as engine:
            engine.load(NANO, 9)
        figures |= check_answers(fleet["exact"], fleet["own"])
        figures |= measure_speed("", fleet["fast"], rows)
        figures |= measure_speed("own_", fleet["own"], rows)
        figures |= {f"start_s_{name}": took for name, took in fleet.start_s.items()}
    return figures, rows


def missed(figures: dict[str, Any]) -> list[str]:
    """Names of the figures that miss what they must reach."""
    found = [name for name in CHATS if figures[name] != 1]
    for name, value in figures.items():
        found += [name] if name.startswith("ids_wrong") and value else []
        found += [name] if name.startswith("logprob_max") and value > LOGPROB_LIMIT else []
        found += [name] if name.startswith(("reload", "load_s")) and value > RELOAD_LIMIT_S else []
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and keep the result; exit code 1 if a target is missed, 5 if it could not be taken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_gpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--no-faults", action="store_true", help="no vLLM with a mend left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no CUDA device here; this benchmark needs one", file=sys.stderr)
        return 5
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures, rows = measure(Path(folder), faults=not options.no_faults)
    except (BenchmarkError, InfraError, ConfigError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    figures["seconds"] = time.perf_counter() - began
    late = missed(figures)
    result = report(
        "vllm_gpu", figures, rows, ("torch", "vllm", "transformers", "triton"), missed=late
    )
    card = torch.cuda.get_device_name().split()[1].lower()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"vllm-{card}.json").write_text(json.dumps(result, indent=1) + os.linesep)
    emit(result, options.json)
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
