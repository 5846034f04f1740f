"""Does the bundled model, as the agent, read a digest? `python -m benchmarks.agent_nano --json`

Every committed test digest (a real run, most with one planted fault) is put to the served model
through the loop's own prompt, tools and HTTP route; its decision is compared with the fault.

Figures: `right_key` and `right_direction` (right key *and* sign) over faulty digests, where an
abstention counts as wrong; `healthy_abstain` over healthy ones. Each also with
`_random_valid` (a uniformly random edit), `_detectors_only` (the loop's rules agent) and
`_shuffled_digest` (the same prompt with the digest of another run), and 95 % Wilson intervals.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openai import OpenAI

from agent_tools.wandb_logs import RunHistory, detect
from benchmarks.agent_digests import TEST_FILE, read_lines
from benchmarks.common import emit, report, wilson
from selfevo.agent_prompts import (
    AGENT_TOOLS,
    DECISIONS,
    DEFAULT_KEYS,
    DIRECTIONS,
    agent_messages,
    call_message,
    tool_message,
)

Decision = tuple[str, str] | None
"""(key, direction), or None for an abstention."""
Decide = Callable[[Mapping[str, Any]], Decision]


def ask(client: OpenAI, digest_text: str) -> Decision:
    """One decision of the served model, at temperature 0, as the loop asks for it."""
    messages = agent_messages(1, 2, ["control-s0", "control-s1"])
    messages += [call_message("run_digest", {"run": "control-s0"}), tool_message(digest_text)]
    reply: Any = client.chat.completions.create(
        model="nano",
        messages=messages,
        tools=AGENT_TOOLS,  # type: ignore[call-overload]
        tool_choice="required",
        temperature=0,
        max_tokens=160,
    )
    call = reply.choices[0].message.tool_calls[0].function
    if call.name not in DECISIONS or call.name == "abstain":
        return None
    arguments = json.loads(call.arguments)
    return arguments["key"], arguments["direction"]


def rules(row: Mapping[str, Any]) -> Decision:
    """The detectors' own first suggestion."""
    history = RunHistory(rows=row["rows"], config={}, state="done", source="wandb", warnings=[])
    for finding in detect(history):
        if finding.suggestion is not None:
            return finding.suggestion.config_key, finding.suggestion.direction
    return None


def score(
    decide: Decide, rows: Sequence[Mapping[str, Any]], workers: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]], list[Decision]]:
    """Figures, intervals and decisions of one way to decide."""
    with ThreadPoolExecutor(workers) as pool:
        decisions = list(pool.map(decide, rows))
    faulty = [(d, r["fault"]) for d, r in zip(decisions, rows, strict=True) if r["fault"]]
    healthy = [d for d, r in zip(decisions, rows, strict=True) if not r["fault"]]
    counts = {
        "right_key": (sum(d is not None and d[0] == f["key"] for d, f in faulty), len(faulty)),
        "right_direction": (sum(d == (f["key"], f["direction"]) for d, f in faulty), len(faulty)),
        "healthy_abstain": (sum(d is None for d in healthy), len(healthy)),
    }
    return (
        {k: hit / max(1, n) for k, (hit, n) in counts.items()},
        {k: wilson(hit, n) for k, (hit, n) in counts.items()},
        decisions,
    )


def serve(checkpoint: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start the real server on a free port; the process and its base URL."""
    port_file = folder / "port.json"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "model.serve",
            "--checkpoint",
            checkpoint,
            "--port",
            "0",
            "--port-file",
            str(port_file),
            "--served-model-name",
            "nano",
            "--quiet",
        ]
    )
    for _ in range(600):
        if port_file.exists():
            return server, f"http://127.0.0.1:{json.loads(port_file.read_text())['port']}/v1"
        if server.poll() is not None:
            break
        time.sleep(0.1)
    server.kill()
    raise SystemExit("error: the server did not start; see its message above")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--checkpoint", default="model/checkpoints/nano")
    parser.add_argument("--digests", type=Path, default=TEST_FILE, help="JSONL of packed digests")
    parser.add_argument("--limit", type=int, help="only the first N digests")
    args = parser.parse_args()
    rows = [json.loads(line) for line in read_lines(args.digests)][: args.limit]
    rng = random.Random(0)
    other = {r["seed"]: rng.choice([o for o in rows if o["seed"] != r["seed"]]) for r in rows}
    with tempfile.TemporaryDirectory() as scratch:
        server, url = serve(args.checkpoint, Path(scratch))
        try:
            client = OpenAI(base_url=url, api_key="unused", timeout=120)
            ways: dict[str, tuple[Decide, int]] = {
                "": (lambda r: ask(client, r["digest"]), 8),
                "_shuffled_digest": (lambda r: ask(client, other[r["seed"]]["digest"]), 8),
                "_random_valid": (lambda _: (rng.choice(DEFAULT_KEYS), rng.choice(DIRECTIONS)), 1),
                "_detectors_only": (rules, 1),
            }
            figures: dict[str, float] = {}
            intervals: dict[str, tuple[float, float]] = {}
            table: list[dict[str, Any]] = [{"seed": r["seed"], "fault": r["fault"]} for r in rows]
            for suffix, (decide, workers) in ways.items():
                values, ranges, decisions = score(decide, rows, workers)
                figures |= {name + suffix: value for name, value in values.items()}
                intervals |= {name + suffix: value for name, value in ranges.items()}
                for line, decision in zip(table, decisions, strict=True):
                    line["model" + suffix] = decision
        finally:
            server.terminate()
            server.wait(timeout=30)
    result = report(
        "agent_nano",
        figures,
        table,
        ("torch", "llguidance"),
        intervals=intervals,
        digests=len(rows),
    )
    if not args.json:
        for name, value in figures.items():
            low, high = intervals[name]
            print(f"{name:32} {value:.3f}  [{low:.3f}, {high:.3f}]")
    else:
        emit(result, True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
