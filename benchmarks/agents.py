"""What an agent costs beside its model and its scripts: `python -m benchmarks.agents`

One episode of three calls, answered at once by a canned endpoint in this process, for each way of
running an agent; the rounds take turns. `direct` is a bare HTTP client making the same calls.

- `wall_ms`, `times_direct`: median of an episode, and that over the median of `direct`. The
  endpoint is in the figures of every side.
- `cpu_ms`: with the processes that it started; null in the sandbox, whose processes are not seen.

`mini-swe-agent` is measured where `make setup-agents` has run, else it is null.
"""

from __future__ import annotations

import argparse
import http.client
import json
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from agent_tools.errors import UserError
from agent_tools.paths import agents_python
from benchmarks.common import emit, report
from rl.agents.langgraph_env import LangGraphAgent
from rl.agents.langgraph_mle import build
from rl.agents.registry import agent_env
from rl.types import ScriptOutcome, Task

CALLS = 3
SANDBOXED = ("command_sandboxed", "mini-swe-agent")
BASH = {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}
PLAIN = f"""
import json, os, urllib.request
for turn in range({CALLS}):
    body = json.dumps({{"model": "m", "messages": [{{"role": "user", "content": str(turn)}}]}})
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions", body.encode(),
        {{"Content-Type": "application/json"}})
    urllib.request.urlopen(request).read()
"""


class _Env:
    """Scripts that cost nothing."""

    def attempt(self, task: Task, script: str, last: bool) -> ScriptOutcome:
        del task, last
        return ScriptOutcome(script, "ok", True, 0.5, 50.0)

    def feedback(self, task: Task, outcome: ScriptOutcome) -> str:
        del task, outcome
        return "score 0.5 percentile 50"


class _Handler(BaseHTTPRequestHandler):
    """The third call of an episode ends mini-swe-agent; the others look around."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message: dict[str, object] = {"role": "assistant", "content": "x = 1"}
        if request.get("tools"):
            turn = sum(item["role"] == "assistant" for item in request["messages"])
            arguments = BASH if turn >= CALLS - 1 else {"command": "true"}
            call = {"name": "bash", "arguments": json.dumps(arguments)}
            message["tool_calls"] = [{"id": f"c{turn}", "type": "function", "function": call}]
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps({**head, "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def _sides(url: str, folder: Path) -> dict[str, Callable[[], None]]:
    """An episode of each kind, by name."""
    task = Task("bench", ({"role": "user", "content": "do it"},), folder / "files", "train")
    grader = {"kind": "python", "call": "benchmarks.agents:half"}
    python = sys.executable
    kinds = {
        "langgraph": LangGraphAgent(_Env(), build, model="m", options={"turns": CALLS}),
        "command": agent_env(
            "command",
            {"command": [python, "-c", PLAIN], "isolation": "none", "grader": grader},
        ),
        "command_sandboxed": agent_env(
            "command", {"command": ["python3", "-c", PLAIN], "grader": grader}
        ),
    }
    try:
        agents_python()
        kinds["mini-swe-agent"] = agent_env("mini-swe-agent", {"grader": grader})
    except UserError:
        pass

    def direct() -> None:
        line = http.client.HTTPConnection(str(urlsplit(url).hostname), urlsplit(url).port or 80)
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "do it"}]})
        for _ in range(CALLS):
            line.request("POST", "/v1/chat/completions", body)
            line.getresponse().read()
        line.close()

    def episode(name: str) -> Callable[[], None]:
        def run() -> None:
            record = kinds[name].run(task, url, "key", 120.0)
            assert (record.status, record.outcome) == ("done", 0.5), (name, record)

        return run

    return {"direct": direct} | {name: episode(name) for name in kinds}


def half(task: Task, folder: Path) -> float:
    """A grader that costs nothing."""
    del task, folder
    return 0.5


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(rounds: int) -> dict[str, dict[str, float | None] | None]:
    """Medians a side; the first episode of each is not counted."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "files").mkdir()
        sides = _sides(f"http://127.0.0.1:{server.server_address[1]}/v1", Path(name))
        for _ in range(rounds + 1):
            for side, run in sides.items():
                cpu, wall = _cpu_s(), time.monotonic()
                run()
                took = (_cpu_s() - cpu, time.monotonic() - wall)
                seen.setdefault(side, []).append(took)
    server.shutdown()
    server.server_close()
    base = statistics.median(wall for _, wall in seen["direct"][1:])
    found: dict[str, dict[str, float | None] | None] = {"mini-swe-agent": None}
    for side, rows in seen.items():
        wall = statistics.median(wall for _, wall in rows[1:])
        cpu = statistics.median(cpu for cpu, _ in rows[1:])
        found[side] = {
            "wall_ms": round(wall * 1e3, 2),
            "times_direct": round(wall / base, 1),
            "cpu_ms": None if side in SANDBOXED else round(cpu * 1e3, 2),
        }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agents", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    found = measure(options.rounds)
    figures = {
        f"{key}_{side}": row[key]
        for side, row in found.items()
        if row is not None
        for key in ("wall_ms", "times_direct")
    }
    rows = [{"side": side, **(row or {})} for side, row in found.items()]
    emit(
        report("agents", figures, rows, ("openai", "langgraph"), rounds=options.rounds),
        options.json,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
