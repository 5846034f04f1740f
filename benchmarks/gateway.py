"""What the gateway costs a call, and whether it ever changes an id: `python -m benchmarks.gateway`

Client, gateway and a canned engine (`benchmarks.gateway_engine`) are three processes on the cores
of this machine; the pool is a SQLite file. Agents are as hostile as agents are: they send back no
thinking, and the JSON of their tool calls written anew; every fifth turn is a new user message, at
which the chat template drops earlier thinking.

- `added_ms_p50`, `_p99`: one agent, each call through the gateway followed by the same ids sent to
  the engine directly; the differences of such pairs (the target of p50 is ≤ 2).
- `calls_s`: 10,000 calls of 32 agents at once, all recorded (the target is ≥ 500).
  `direct_calls_s` is the same client on the engine alone, measured in turns with it;
  `cpu_ms_call` the gateway's processor time a call, which hardly depends on what else runs.
- `id_mismatches`: over all these records, read from the pool afterwards: prompt or response ids
  that are not those which the engine gave and took (the target is 0). What a prompt should be is
  computed here: the last prompt of the conversation, its reply's ids, what came after rendered.
  `mismatches_if_rendered` are the prompts that rendering each request anew would have changed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil

from benchmarks.common import ROOT, emit, report
from benchmarks.gateway_engine import NANO, choice_of, replies, tokenizer
from model.chat_format import render_ids, render_next_ids
from rl.gateway.http_client import HttpClient
from rl.pool import Pool

AGENTS, CALLS, TURNS, PAIRS, ROUNDS = 32, 10_000, 20, 300, 4
TIMEOUT_S = 60.0
Json = dict[str, Any]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "description": "Runs a script.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}, "options": {"type": "object"}},
                "required": ["code"],
            },
        },
    }
]


class BenchmarkError(Exception):
    """A process did not come up, or answered what it must not."""


@dataclass
class Agent:
    """One conversation, and what its prompts must be."""

    episode: str
    messages: list[Json] = field(default_factory=list)
    said: list[list[Json]] = field(default_factory=list)  # what followed each reply

    def body(self) -> bytes:
        if not self.messages:
            first = {"role": "user", "content": f"Task of {self.episode}: improve the score."}
            self.messages.append(first)
        return orjson.dumps({"model": "any", "messages": self.messages, "tools": TOOLS})

    def hear(self, message: Json, turn: int) -> None:
        """The reply comes back without its thinking, its JSON in another form; then the world's
        answer to its calls, or every fifth time a new user message too."""
        calls = []
        for call in message["tool_calls"]:
            arguments = json.loads(call["function"]["arguments"])
            text = json.dumps(dict(sorted(arguments.items(), reverse=True)), indent=1)
            inner = {"name": call["function"]["name"], "arguments": text}
            calls.append({"id": call["id"], "type": "function", "function": inner})
        self.messages.append(
            {"role": "assistant", "content": message["content"], "tool_calls": calls}
        )
        result = f"fold {turn}: 0.{len(self.messages) * 7919 % 10_000:04d} " * 4
        new = [{"role": "tool", "tool_call_id": calls[0]["id"], "content": result}]
        if turn % 5 == 4:
            new.append({"role": "user", "content": f"Now go on with part {turn}."})
        self.said.append(new)
        self.messages += new


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[tuple[str, str, psutil.Process]]:
    """URLs of a running engine and of a gateway before it, and the gateway's process."""
    with contextlib.ExitStack() as stack:
        engine, _ = _start(
            stack, folder, "engine", "benchmarks.gateway_engine", str(folder / "engine")
        )
        command = ["rl.gateway", "--engine", engine, "--model", str(NANO), "--quiet"]
        command += ["--pool", str(folder / "pool.db"), "--port", "0", "--auto-open"]
        command += ["--port-file", str(folder / "gateway"), "--linger", "0", "--exit-with-parent"]
        yield engine, *_start(stack, folder, "gateway", *command)


def _start(
    stack: contextlib.ExitStack, folder: Path, name: str, *command: str
) -> tuple[str, psutil.Process]:
    log = stack.enter_context((folder / f"{name}.log").open("w"))
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=log)
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)
    file = folder / name
    for _ in range(600):
        if file.exists():
            url = f"http://127.0.0.1:{json.loads(file.read_text())['port']}"
            return url, psutil.Process(process.pid)
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise BenchmarkError(f"{name} did not come up: {(folder / f'{name}.log').read_text()[-2000:]}")


async def call(gateway: HttpClient, agent: Agent) -> Json:
    """One turn of an agent through the gateway; its message."""
    path = f"/e/{agent.episode}/v1/chat/completions"
    answer = await gateway.request("POST", path, agent.body(), timeout_s=TIMEOUT_S)
    if answer.status != 200:
        raise BenchmarkError(f"{answer.status}: {answer.body[:300]!r}")
    message: Json = orjson.loads(answer.body)["choices"][0]["message"]
    return message


async def direct(engine: HttpClient, prompt: Sequence[int]) -> int:
    """The same ids to the engine; how many it gave."""
    body = {"model": "canned", "prompt": list(prompt), "max_tokens": 1024, "temperature": 1.0}
    body |= {"return_token_ids": True, "logprobs": 0, "ignore_eos": True, "stop_token_ids": [2]}
    answer = await engine.request(
        "POST", "/v1/completions", orjson.dumps(body), timeout_s=TIMEOUT_S
    )
    return len(orjson.loads(answer.body)["choices"][0]["token_ids"])


def expected(agent: Agent) -> list[list[int]]:
    """The prompts of a conversation, from its first rendering and the engine's replies."""
    prompts = [render_ids(agent.messages[:1], TOOLS, tokenizer())]
    for new in agent.said[:-1]:
        reply = replies()[choice_of(prompts[-1])]
        prompts.append([*prompts[-1], *reply, *render_next_ids(new, tokenizer(), {})])
    return prompts


async def pairs(gateway: HttpClient, engine: HttpClient, agents: list[Agent]) -> list[Json]:
    """Latencies of calls one after the other, each with its direct twin, in seconds."""
    rows: list[Json] = []
    while len(rows) < PAIRS:
        agent = Agent(f"pair-{len(agents)}")
        agents.append(agent)
        for turn in range(TURNS):
            begin = time.perf_counter()
            message = await call(gateway, agent)
            middle = time.perf_counter()
            agent.hear(message, turn)
            prompt = expected(agent)[-1]
            again = time.perf_counter()
            await direct(engine, prompt)
            end = time.perf_counter()
            rows.append(
                {"gateway_s": middle - begin, "direct_s": end - again, "prompt": len(prompt)}
            )
    return rows


async def through(gateway: HttpClient, agents: list[Agent], calls: int) -> float:
    """Calls a second of AGENTS at once; each goes on with a new conversation when one is over."""
    left = calls

    async def one(name: str) -> None:
        nonlocal left
        while left > 0:
            agent = Agent(f"{name}-{len(agents)}")
            agents.append(agent)
            for turn in range(TURNS):
                if left <= 0:
                    return
                left -= 1
                agent.hear(await call(gateway, agent), turn)
            ended = orjson.dumps({"episode": agent.episode})
            await gateway.request("POST", "/control/close", ended, timeout_s=TIMEOUT_S)

    begin = time.perf_counter()
    await asyncio.gather(*(one(f"load{number}") for number in range(AGENTS)))
    return calls / (time.perf_counter() - begin)


async def beside(engine: HttpClient, prompts: Sequence[Sequence[int]]) -> float:
    """Calls a second on the engine alone, AGENTS at once."""
    todo = list(prompts)

    async def one() -> None:
        while todo:
            await direct(engine, todo.pop())

    begin = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(AGENTS)))
    return len(prompts) / (time.perf_counter() - begin)


def check(pool: Pool, agents: Sequence[Agent]) -> dict[str, int]:
    """Records that are not what they must be, and prompts that a new rendering would change."""
    wrong = changed = records = 0
    for agent in agents:
        found = pool.calls(agent.episode)
        prompts = expected(agent) if agent.said else []
        wrong += abs(len(found) - len(prompts))
        records += len(found)
        for record, prompt in zip(found, prompts, strict=False):
            reply = replies()[choice_of(prompt)]
            wrong += record.prompt_ids != tuple(prompt) or record.response_ids != tuple(reply)
        at = 1
        for prompt, new in zip(prompts, agent.said, strict=True):
            changed += render_ids(agent.messages[:at], TOOLS, tokenizer()) != prompt
            at += 1 + len(new)
    return {"records": records, "id_mismatches": wrong, "mismatches_if_rendered": changed}


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    engine_url: str, gateway_url: str, process: psutil.Process, calls: int
) -> tuple[Json, list[Json], list[Agent]]:
    engine, gateway = HttpClient(engine_url), HttpClient(gateway_url)
    agents: list[Agent] = []
    rows = await pairs(gateway, engine, agents)  # which warms both
    added = sorted((row["gateway_s"] - row["direct_s"]) * 1e3 for row in rows)
    speeds: list[Json] = []
    for _ in range(ROUNDS):
        begin, spent = len(agents), cpu_s(process)
        speed = await through(gateway, agents, calls // ROUNDS)
        spent = (cpu_s(process) - spent) * 1e3 / (calls // ROUNDS)
        prompts = [prompt for agent in agents[begin:] if agent.said for prompt in expected(agent)]
        alone = await beside(engine, prompts)
        speeds.append({"calls_s": speed, "direct_calls_s": alone, "cpu_ms_call": spent})
    health = orjson.loads((await gateway.request("GET", "/healthz", timeout_s=TIMEOUT_S)).body)
    figures = {
        "added_ms_p50": statistics.median(added),
        "added_ms_p99": added[int(len(added) * 0.99)],
        "direct_ms_p50": statistics.median(row["direct_s"] for row in rows) * 1e3,
        "calls_s": statistics.median(row["calls_s"] for row in speeds),
        "direct_calls_s": statistics.median(row["direct_calls_s"] for row in speeds),
        "vs_direct": statistics.median(r["calls_s"] / r["direct_calls_s"] for r in speeds),
        "cpu_ms_call": statistics.median(row["cpu_ms_call"] for row in speeds),
        "prompt_tokens_mean": statistics.mean(row["prompt"] for row in rows),
    }
    return figures, [*speeds, {"part": "gateway", **health["counts"]}], agents


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--calls", type=int, default=CALLS)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with processes(folder) as (engine, gateway, process):
                figures, rows, agents = asyncio.run(
                    measure(engine, gateway, process, options.calls)
                )
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 5
        with Pool(folder / "pool.db", create=False) as pool:
            figures |= check(pool, agents)
    packages = ("uvicorn", "orjson", "tokenizers", "uvloop", "httptools")
    emit(report("gateway", figures, rows, packages), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
