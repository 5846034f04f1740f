"""Turn digests of real short runs into the agent's supervised dialogues.

Input: training examples of `benchmarks.agent_digests make --set train`. Every example becomes
`--copies` dialogues: its metric rows are jittered by a few per cent, digested again, and put into
the loop's own prompt (`selfevo.agent_prompts`) with a random round, list of runs and memory. The
answer is the planted fault's repair, or an abstention for a healthy run. The call that asks for the
digest is always the same, so only `--opening-share` of the dialogues train on it. Output: one JSON
object `{"messages": [...], "tools": [...]}` a line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_tools.wandb_logs import RunHistory, digest
from benchmarks.agent_digests import read_lines
from selfevo.agent_prompts import (
    AGENT_TOOLS,
    DEFAULT_KEYS,
    DIRECTIONS,
    agent_messages,
    call_message,
    memory_line,
    tool_message,
)

#: Why a repair helps, by key and direction: what the digest shows.
WHY: Mapping[tuple[str, str], Sequence[str]] = {
    ("optim.lr", "decrease"): ("the policy breaks : steps are too large", "lr is too high"),
    ("rollout.temperature", "decrease"): ("entropy is too high from the start",),
    ("rollout.temperature", "increase"): ("entropy is too low to explore",),
    ("rollout.max_new_tokens", "increase"): ("scripts are cut off",),
    ("env.cpu_seconds", "increase"): ("scripts run out of time",),
    ("optim.updates_per_batch", "decrease"): ("the ratio leaves one : too many updates",),
    ("cispo.is_weight_max", "increase"): ("the ceiling is under one : every token is capped",),
    ("optim.warmup_steps", "decrease"): ("lr is still warming up at the end",),
}
HEALTHY_WHY = ("the run is healthy", "no fault shows")
FRACTIONS = ("_frac", "reward/")


def jitter(rows: Sequence[Mapping[str, float]], rng: random.Random) -> list[dict[str, float]]:
    """Rows with 4 % multiplicative noise a value; fractions stay in [0, 1], exact ones stay put."""
    noisy = []
    for row in rows:
        copy = dict(row)
        for key, value in row.items():
            if key in ("step", "t", "optim/lr") or not isinstance(value, float):
                continue
            if math.isfinite(value) and value not in (0.0, 1.0):
                value *= math.exp(rng.gauss(0.0, 0.04))
                copy[key] = min(1.0, value) if any(f in key for f in FRACTIONS) else value
        noisy.append(copy)
    return noisy


def run_names(rng: random.Random, round_: int) -> list[str]:
    """Names as the loop gives them: control runs, or the kept candidate's."""
    stem = "control" if round_ == 1 or rng.random() < 0.5 else f"r{rng.randrange(1, round_)}"
    return [f"{stem}-s{i}" for i in range(rng.choice([1, 2, 2, 2, 3]))]


def memory_lines(rng: random.Random, round_: int, answer: Mapping[str, str] | None) -> list[str]:
    """Notes on earlier rounds; none of them rejects the edit that is right now."""
    lines = []
    for earlier in range(1, round_):
        key, direction = rng.choice(DEFAULT_KEYS), rng.choice(DIRECTIONS)
        same = answer is not None and (key, direction) == (answer["key"], answer["direction"])
        verdict = rng.choice(
            ("accept", "indecisive") if same else ("accept", "reject", "indecisive")
        )
        lines.append(memory_line(earlier, key, direction, verdict, rng.gauss(0, 15)))
    return lines[-4:]


def dialogue(
    example: Mapping[str, Any], rng: random.Random, opening_share: float = 1.0
) -> dict[str, Any]:
    """One supervised dialogue of one example."""
    fault = example["fault"]
    rounds = rng.choice([1, 2, 2, 3, 5, 10])
    round_ = rng.randint(1, rounds)
    runs = run_names(rng, round_)
    messages = agent_messages(round_, rounds, runs, memory=memory_lines(rng, round_, fault))
    history = RunHistory(
        rows=jitter(example["rows"], rng), config={}, state="done", source="wandb", warnings=[]
    )
    opening = call_message("run_digest", {"run": runs[0]})
    if rng.random() >= opening_share:
        opening["no_loss"] = True
    messages += [opening, tool_message(digest(history).text)]
    if fault is None:
        decision = call_message("abstain", {"why": rng.choice(HEALTHY_WHY)}, "call_1")
    else:
        edit = (fault["key"], fault["direction"])
        decision = call_message(
            "propose_edit",
            {"key": edit[0], "direction": edit[1], "why": rng.choice(WHY[edit])},
            "call_1",
        )
    return {"messages": [*messages, decision], "tools": AGENT_TOOLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", type=Path, nargs="+")
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--opening-share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    examples = [json.loads(line) for path in args.examples for line in read_lines(path)]
    rng = random.Random(args.seed)
    made = [
        dialogue(example, rng, args.opening_share)
        for example in examples
        for _ in range(args.copies)
    ]
    rng.shuffle(made)
    with args.out.open("w") as sink:
        for record in made:
            sink.write(json.dumps(record) + "\n")
    print(f"{len(made)} dialogues of {len(examples)} runs in {args.out}")


if __name__ == "__main__":
    main()
