"""What benchmarks of serving share: the server as a process, the prompts, asking for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.common import ROOT
from model.tokenizer import Tokenizer

NANO = ROOT / "model" / "checkpoints" / "nano"
SCRIPTS = ROOT / "benchmarks" / "data" / "scripts_48.jsonl"
ROWS, PROMPT, NEW = 32, 64, 128
TIMEOUT_S = 600.0


class BenchmarkError(Exception):
    """The server did not come up, or answered what it must not."""


@dataclass(frozen=True)
class Server:
    """A running `model.serve`."""

    url: str
    process: psutil.Process

    def rss_mb(self) -> float:
        return float(self.process.memory_info().rss) / 2**20

    def cpu_s(self) -> float:
        """CPU-seconds that it and the processes that it started have used."""
        times = [p.cpu_times() for p in (self.process, *self.process.children(recursive=True))]
        return sum(found.user + found.system for found in times)

    def peak_mb(self) -> float:
        """The most memory it ever had (Linux)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        raise BenchmarkError("this system does not tell a process's peak memory")


@contextlib.contextmanager
def server(
    *options: str,
    checkpoint: Path = NANO,
    device: str = "cpu",
    environment: Mapping[str, str] | None = None,
    start_s: float = 120,
) -> Iterator[Server]:
    """`python -m model.serve` on a free port, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port.json"
        command = [sys.executable, "-m", "model.serve", "--checkpoint", str(checkpoint)]
        command += ["--port", "0", "--port-file", str(port_file), "--device", device, "--quiet"]
        command += options
        env = {**os.environ, **(environment or {})}
        log = Path(folder) / "log"
        with (
            log.open("w") as out,
            subprocess.Popen(command, cwd=ROOT, stderr=out, env=env) as process,
        ):
            try:
                for _ in range(int(start_s * 10)):
                    if port_file.exists() or process.poll() is not None:
                        break
                    time.sleep(0.1)
                if not port_file.exists():
                    raise BenchmarkError(
                        f"the server did not come up (exit {process.poll()}): "
                        f"{log.read_text()[-6000:]}"
                    )
                port = json.loads(port_file.read_text())["port"]
                yield Server(f"http://127.0.0.1:{port}/v1", psutil.Process(process.pid))
            finally:
                process.terminate()
                process.wait(timeout=60)


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """The first 64 tokens of 32 committed scripts, which differ from the first token on."""
    found: list[list[int]] = []
    for line in SCRIPTS.read_text().splitlines():
        row = json.loads(line)
        text = f"# {len(found)} {row['competition']}\n{row['script']}"
        ids = tokenizer.encode(text)
        if len(ids) >= PROMPT and len(found) < ROWS:
            found.append(ids[:PROMPT])
    if len(found) < ROWS:
        raise BenchmarkError(f"{SCRIPTS}: only {len(found)} scripts are long enough")
    return found


async def ours(client: httpx.AsyncClient, url: str, asked: Sequence[list[int]]) -> float:
    """Tokens a second of these prompts asked at once."""

    async def ask(seed: int, prompt: list[int]) -> int:
        body = {"prompt": prompt, "max_tokens": NEW, "temperature": 1.0, "seed": seed}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = await client.post(f"{url}/completions", json=body)
        answer.raise_for_status()
        return len(answer.json()["choices"][0]["token_ids"])

    start = time.perf_counter()
    counts = await asyncio.gather(*(ask(seed, prompt) for seed, prompt in enumerate(asked)))
    took = time.perf_counter() - start
    if counts != [NEW] * len(asked):
        raise BenchmarkError(f"asked for {NEW} tokens each, got {sorted(set(counts))}")
    return sum(counts) / took
