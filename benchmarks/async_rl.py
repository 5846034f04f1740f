"""How much of a step the asynchronous mode hides: `python -m benchmarks.async_rl --json`

Trains the same job three times with `python -m rl.train`, each long enough for a steady state:

    in_turns    the same processes with forge.steps_ahead 0: a step's groups begin when the step
                before is trained and its weights are in the engine, so the stages take turns
    async       forge.steps_ahead S: groups of later steps are generated while one is trained
    in_process  forge.mode sync: one process with our own engine (`--in-process`; to compare)

Prompts, batch and seeds are the same, and a learning rate of 1e-7 keeps the policy. The first
`--warm-up` steps are left out, and the last S + 1 of async, for which nothing new is begun: the
same groups are measured in all runs.

T is the mean time from one step to the next; T_sync is that of the in_turns run, and the stages are
measured in it too: T_generate and T_env are the time a step during which at least one call, or one
script, runs (from the pool's records; both run at once for a while, in different episodes), T_train
is from the whole batch to the trained weights. Figures:

    async_vs_sync       T_sync / T_async
    overlap_efficiency  async_vs_sync / (T_sync / max(T_generate, T_train, T_env)): 1 when the
                        longest stage alone sets the pace
    trainer_idle_share  part of T_async in which the trainer waits for groups
    tok_s               response tokens a second, async
    max_lag, lag_bound  versions between a group's first token and its step, async

`--engine vllm --device cuda --eager --steps 14` takes eight minutes on one card and 16 cores, with
vLLM on PYTHONPATH; the default is our own engine on the processor and a job for two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, emit, report
from benchmarks.serve_common import BenchmarkError
from rl.pool import Pool
from rl.types import CallRecord
from rl.window import lag_bound, window_size

Row = dict[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Size:
    """Scripts a step in groups; workers, each with so many episodes at once; sandboxes in all."""

    scripts: int
    group: int
    workers: int
    episodes: int
    sandboxes: int


SMALL = Size(scripts=16, group=4, workers=2, episodes=16, sandboxes=4)
LARGE = Size(scripts=64, group=8, workers=4, episodes=64, sandboxes=8)
VLLM_OPTIONS = ("--max-batch", "256", "--dtype", "bfloat16", "--cache-tokens", "400000")
LIMIT_S = 1800.0


# ------------------------------------------------------------------ intervals


def covered(intervals: Iterable[Interval], start: float, end: float) -> float:
    """Seconds of [start, end] that lie in at least one of the intervals."""
    total, until = 0.0, start
    for first, last in sorted(intervals):
        total += max(0.0, min(last, end) - max(first, until))
        until = max(until, min(last, end))
    return total


def tool_intervals(calls: Sequence[CallRecord], tool_s: float) -> list[Interval]:
    """When an episode's scripts ran: between its calls, and after the last one for what is left of
    `tool_s`, its seconds in all."""
    ordered = sorted((call.t_start, call.t_end) for call in calls)
    gaps = [(end, start) for (_, end), (start, _) in pairwise(ordered)]
    left = tool_s - sum(end - start for start, end in gaps)
    return [*gaps, (ordered[-1][1], ordered[-1][1] + max(0.0, left))] if ordered else []


def from_pool(path: Path) -> tuple[list[Interval], list[Interval], list[tuple[float, int]]]:
    """When calls ran, when scripts ran, and (end, tokens) of each call."""
    episodes: dict[str, list[CallRecord]] = {}
    with Pool(path, create=False) as pool:
        for call in pool.all_calls():
            episodes.setdefault(call.episode, []).append(call)
        rewards = pool.rewards()
    calls = [call for mine in episodes.values() for call in mine]
    scripts = [
        interval
        for reward in rewards
        for interval in tool_intervals(episodes.get(reward.episode, []), reward.t_tool)
    ]
    ends = [(call.t_end, len(call.response_ids)) for call in calls]
    return [(call.t_start, call.t_end) for call in calls], scripts, ends


# ------------------------------------------------------------------ runs


def measure(name: str, folder: Path, warm_up: int, tail: int) -> Row:
    """Seconds a step of a finished run, from its rows and its pool."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = rows[warm_up : len(rows) - tail]
    if len(kept) < 3:
        raise BenchmarkError(f"{len(rows)} steps leave {len(kept)} to measure; ask for more steps")
    first, last, steps = kept[0]["t"], kept[-1]["t"], len(kept) - 1

    def mean(key: str) -> float:
        return statistics.fmean(row.get(key, 0.0) for row in kept[1:])

    step_s = (last - first) / steps
    row: Row = {"run": name, "steps": steps, "step_s": step_s}
    row["update_s"] = mean("perf/update_s")
    pool = folder / "pool.sqlite"
    if pool.is_file():
        calls, scripts, ends = from_pool(pool)
        tokens = sum(count for end, count in ends if first <= end <= last)
        row |= {
            "generate_s": covered(calls, first, last) / steps,
            "execute_s": covered(scripts, first, last) / steps,
            "wait_s": mean("perf/wait_batch_s"),
            "sync_s": mean("perf/sync_s"),
            "tok_s": tokens / (last - first),
            "mean_lag": mean("lag/mean"),
            "max_lag": max(row.get("lag/max", 0.0) for row in kept),
        }
        row["train_s"] = step_s - row["wait_s"] - row["sync_s"]
    else:
        row |= {
            "generate_s": mean("perf/generate_s"),
            "execute_s": mean("perf/execute_s"),
            "train_s": mean("perf/update_s"),
            "tok_s": mean("perf/tokens_per_s"),
        }
    row["step_times_s"] = [round(b["t"] - a["t"], 3) for a, b in pairwise(kept)]
    return row


def train(name: str, folder: Path, settings: Sequence[str], log: Path) -> float:
    """One run of `rl.train`; returns its seconds. BenchmarkError with its logs if it fails."""
    config = log.with_suffix(".yaml")
    config.write_text("model: {checkpoint: nano}\n", encoding="utf-8")
    command = [sys.executable, "-m", "rl.train", str(config), "--run-dir", str(folder), *settings]
    started = time.monotonic()
    code: int | str
    with log.open("w") as out:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"no result within {LIMIT_S:.0f} s"
    if code:
        logs = [log, *sorted((folder / "forge").glob("*.log"))]
        words = "\n".join(f"--- {path.name}\n{path.read_text()[-2500:]}" for path in logs)
        raise BenchmarkError(f"run {name} ended with {code}\n{words}")
    return time.monotonic() - started


def size_of(args: argparse.Namespace) -> Size:
    """By the machine."""
    return LARGE if args.device == "cuda" else SMALL


def common_settings(args: argparse.Namespace) -> list[str]:
    """What the runs share, as overrides of `rl.train`."""
    size = size_of(args)
    return [
        f"budget.scripts_per_step={size.scripts}",
        f"rollout.group_size={size.group}",
        f"forge.workers={size.workers}",
        f"forge.episodes_per_worker={size.episodes}",
        f"sandbox.workers={size.sandboxes}",
        "forge.zero_variance=keep",
        "forge.probe_calls=0",
        "optim.lr=1e-7",
        f"checkpoint_every={args.steps + 10}",
        "wandb.mode=disabled",
        f"device={args.device}",
        f"seed={args.seed}",
        *args.set,
    ]


def engine_settings(args: argparse.Namespace) -> list[str]:
    """Engine and weight sync of the runs by processes."""
    if args.engine == "own":
        return ["forge.engine=own", "forge.sync=file"]
    options = json.dumps([*VLLM_OPTIONS, *(["--eager"] if args.eager else [])])
    return ["forge.engine=vllm", f"forge.sync={args.sync}", f"forge.engine_options={options}"]


def figures(rows: Sequence[Row], bound: int) -> dict[str, float]:
    """From the rows of both runs by processes."""
    turns = next(row for row in rows if row["run"] == "in_turns")
    ahead = next(row for row in rows if row["run"] == "async")
    longest = max(turns[key] for key in ("generate_s", "train_s", "execute_s"))
    gain = turns["step_s"] / ahead["step_s"]
    found = {
        "overlap_efficiency": gain / (turns["step_s"] / longest),
        "async_vs_sync": gain,
        "possible": turns["step_s"] / longest,
        "trainer_idle_share": ahead["wait_s"] / ahead["step_s"],
        "tok_s": ahead["tok_s"],
        "max_lag": ahead["max_lag"],
        "lag_bound": bound,
    }
    alone = [row for row in rows if row["run"] == "in_process"]
    return found | ({"async_vs_in_process": alone[0]["step_s"] / ahead["step_s"]} if alone else {})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.async_rl")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--engine", choices=("own", "vllm"), default="own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sync", choices=("file", "ipc"), default="ipc", help="with vllm")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=4, help="steps left out at the beginning")
    parser.add_argument("--ahead", type=int, default=1, help="S: steps ahead")
    parser.add_argument("--order", choices=("fifo", "windowed", "greedy"), default="windowed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-process", action="store_true", help="also forge.mode sync")
    parser.add_argument("--keep", type=Path, help="run directories go here and stay")
    parser.add_argument("--out", type=Path, help="the object also goes into this file")
    parser.add_argument("set", nargs="*", metavar="a.b=value", help="overrides of every run")
    return parser.parse_args()


def main() -> None:
    """The runs, one after the other; prints one object."""
    args = arguments()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="async-rl-"))
    folder.mkdir(parents=True, exist_ok=True)
    common, engine = common_settings(args), engine_settings(args)
    processes = ["forge.mode=async", *engine]
    ahead = [f"forge.steps_ahead={args.ahead}", f"forge.order={args.order}"]
    asked = {
        "in_turns": [*processes, "forge.steps_ahead=0", "forge.order=fifo"],
        "async": [*processes, *ahead],
    }
    if args.in_process:
        asked["in_process"] = ["forge.mode=sync"]
    rows: list[Row] = []
    try:
        for name, settings in asked.items():
            tail = args.ahead + 1 if name == "async" else 0
            steps = args.steps + tail  # the same steps, and so the same groups, are measured
            overrides = [f"budget.steps={steps}", *settings, *common]
            run, log = folder / name, folder / f"{name}.log"
            seconds = train(name, run, overrides, log)
            rows.append(measure(name, run, args.warm_up, tail) | {"run_s": seconds})
            shown = {k: round(v, 3) for k, v in rows[-1].items() if isinstance(v, float)}
            print(f"{name}: {shown}", file=sys.stderr, flush=True)
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    groups = size_of(args).scripts // size_of(args).group
    slots = (args.ahead + 1) * groups
    bound = lag_bound(slots, window_size(args.order, slots), groups)
    packages = ("torch", "vllm") if args.engine == "vllm" else ("torch",)
    result = report(
        "async_rl",
        figures(rows, bound),
        rows,
        packages=packages,
        engine=args.engine,
        steps_ahead=args.ahead,
        order=args.order,
        settings=[*engine, *common],
    )
    if args.out:
        args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    emit(result, args.json)


if __name__ == "__main__":
    main()
