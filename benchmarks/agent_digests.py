"""Digests of real short training runs, most with one planted fault: the agent's examples.

`make` runs `rl.train` for 4 steps × 24 scripts per example, in `--workers` processes, and writes
one JSON object a run: seed, config, fault, digest, and the metric rows that the digest was made
of. `pack` sorts and trims such files for the repository. `verify` remakes some of the committed
test examples and compares their detector marks.

The test set (`benchmarks/data/agent_nano.jsonl.xz`) shares no seed and no planted value with the
training set: seeds come from disjoint ranges, and integer values alternate between the two.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agent_tools.wandb_logs import DEFAULT_KEYS, RunHistory, digest, read_run

DATA = Path(__file__).resolve().parent / "data"
TEST_FILE = DATA / "agent_nano.jsonl.xz"
FIRST_SEED = {"train": 10_000, "test": 20_000}
STEPS, SCRIPTS_PER_STEP = 4, 24
HEALTHY_SHARE = 0.25

Draw = Callable[[random.Random, int], float]


def log_uniform(low: float, high: float) -> Draw:
    """A float, uniform in its logarithm, three significant digits."""

    def draw(rng: random.Random, _: int) -> float:
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")

    return draw


def integer(low: int, high: int) -> Draw:
    """An integer of the set's own parity (training even, test odd) in [low, high]."""

    def draw(rng: random.Random, parity: int) -> float:
        return rng.choice([n for n in range(low, high + 1) if n % 2 == parity])

    return draw


@dataclass(frozen=True)
class Fault:
    """One way to spoil a run: `key` is set to a drawn value; `repair` is the right direction."""

    key: str
    repair: str
    draw: Draw


FAULTS = (
    Fault("optim.lr", "decrease", log_uniform(3e-3, 3e-2)),
    Fault("rollout.temperature", "decrease", log_uniform(1.6, 2.0)),
    Fault("rollout.temperature", "increase", log_uniform(0.1, 0.3)),
    Fault("rollout.max_new_tokens", "increase", integer(30, 80)),
    Fault("env.cpu_seconds", "increase", log_uniform(0.05, 0.09)),
    Fault("optim.updates_per_batch", "decrease", integer(6, 16)),
    Fault("cispo.is_weight_max", "increase", log_uniform(0.1, 0.5)),
    Fault("optim.warmup_steps", "decrease", integer(30, 100)),
)

#: What a healthy run may look like; every run draws these before its fault is planted.
HEALTHY: Mapping[str, Draw] = {
    "optim.lr": log_uniform(1.5e-4, 5e-4),
    "optim.warmup_steps": lambda rng, _: rng.choice([0, 1, 2]),
    "optim.updates_per_batch": lambda rng, _: rng.choice([1, 1, 1, 2]),
    "rollout.temperature": log_uniform(0.8, 1.1),
    "rollout.max_new_tokens": lambda rng, _: rng.choice([224, 240, 256]),
    "rollout.group_size": lambda rng, _: rng.choice([4, 8, 8, 12]),
    "cispo.is_weight_max": log_uniform(3.0, 8.0),
    "env.cpu_seconds": log_uniform(2.0, 3.0),
}


#: Training runs from this index on use some of the competitions, as a user's runs may; the test
#: set and the first ones use all.
FIRST_MIXED = 50
COMPETITIONS = (
    (),
    ("diamonds-price",),
    ("tweet-sentiment",),
    ("diamonds-price", "tweet-sentiment"),
    ("diamonds-price", "tweet-sentiment"),
    ("diamonds-price", "food-reviews"),
)


def plan(kind: str, index: int) -> dict[str, Any]:
    """The example `index` of the `train` or `test` set: seed, config overrides, fault or None."""
    seed = FIRST_SEED[kind] + index
    rng = random.Random(seed)
    parity = 0 if kind == "train" else 1
    config: dict[str, Any] = {key: draw(rng, parity) for key, draw in HEALTHY.items()}
    fault = None
    if rng.random() >= HEALTHY_SHARE:
        chosen = FAULTS[index % len(FAULTS)]
        config[chosen.key] = chosen.draw(rng, parity)
        fault = {"key": chosen.key, "direction": chosen.repair}
    if kind == "train" and index >= FIRST_MIXED and (some := rng.choice(COMPETITIONS)):
        config["competitions"] = json.dumps(some)
    return {"seed": seed, "config": config, "fault": fault}


def run_one(
    example: Mapping[str, Any],
    checkpoint: str,
    base: Sequence[str],
    keep: str | None,
) -> dict[str, Any]:
    """Train one short run in this process and digest its log."""
    from rl.train import main as train

    folder = Path(tempfile.mkdtemp(prefix="digest-"))
    run_dir = folder / "run"
    overrides = {
        "seed": example["seed"],
        "model.checkpoint": checkpoint,
        "checkpoint_every": 1000,
        "budget.steps": STEPS,
        "budget.scripts_per_step": SCRIPTS_PER_STEP,
        **example["config"],
    }
    config_file = folder / "run.yaml"
    config_file.write_text("{}\n")
    started = time.monotonic()
    code = train(
        [
            str(config_file),
            "--run-dir",
            str(run_dir),
            *(f"{key}={value}" for key, value in overrides.items()),
            *base,
        ]
    )
    history = read_run(run_dir)
    made = digest(history)
    result = {
        **example,
        "digest": made.text,
        "marks": sorted(f.name for f in made.findings),
        "exit_code": code,
        "rows": history.rows,
        "seconds": round(time.monotonic() - started, 1),
    }
    if keep:
        shutil.copytree(
            run_dir,
            Path(keep) / str(example["seed"]),
            symlinks=True,
            ignore=shutil.ignore_patterns("checkpoints"),
        )
    shutil.rmtree(folder)
    return result


def quiet_worker() -> None:
    """Workers print into nothing: their runs have logs of their own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives as long as the process


def make(
    examples: Sequence[Mapping[str, Any]],
    checkpoint: str,
    out: Path,
    workers: int,
    base: Sequence[str],
    keep: str | None,
    deadline: float,
) -> int:
    """Run all examples that `out` does not hold yet; append each as it ends. Returns the count."""
    done = (
        {json.loads(line)["seed"] for line in out.read_text().splitlines()}
        if out.exists()
        else set()
    )
    todo = [e for e in examples if e["seed"] not in done]
    count = 0
    with (
        ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=quiet_worker
        ) as pool,
        out.open("a") as sink,
    ):
        waiting = {pool.submit(run_one, e, checkpoint, base, keep): e for e in todo}
        for future in as_completed(waiting):
            if time.monotonic() > deadline:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            sink.write(json.dumps(future.result()) + "\n")
            sink.flush()
            count += 1
            print(f"{count}/{len(todo)} seed {waiting[future]['seed']}", file=sys.stderr)
    return count


KEPT = (
    *DEFAULT_KEYS,
    "group/zero_std_frac",
    "loss/cispo/capped_frac",
    "loss/cispo/weight_mean",
    "mismatch_kl/mean",
    "rollout/memory_frac",
)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, packed with xz or not."""
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode().splitlines()


def pack(sources: Sequence[Path], out: Path) -> int:
    """Sort by seed, keep what detectors read (six digits), digest again with today's code."""
    lines = (line for source in sources for line in read_lines(source))
    examples = {example["seed"]: example for example in map(json.loads, lines)}
    with lzma.open(out, "wt", preset=9) if out.suffix == ".xz" else out.open("w") as sink:
        for _, example in sorted(examples.items()):
            rows = [
                {"step": row["step"]}
                | {key: float(f"{row[key]:.6g}") for key in KEPT if key in row}
                for row in example["rows"]
            ]
            made = digest(
                RunHistory(rows=rows, config={}, state="done", source="wandb", warnings=[])
            )
            kept = {key: example[key] for key in ("seed", "config", "fault")}
            sink.write(
                json.dumps(
                    {
                        **kept,
                        "digest": made.text,
                        "rows": rows,
                        "marks": sorted(f.name for f in made.findings),
                    }
                )
                + "\n"
            )
    return len(examples)


def verify(count: int, workers: int) -> int:
    """Remake `count` committed examples, one per fault kind first; 0 when their marks agree."""
    committed = [json.loads(line) for line in read_lines(TEST_FILE)]
    chosen: list[dict[str, Any]] = []
    kinds: set[str] = set()
    for row in committed:
        kind = json.dumps(row["fault"])
        if kind not in kinds and len(chosen) < count:
            kinds.add(kind)
            chosen.append(row)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "remade.jsonl"
        make(
            [{k: row[k] for k in ("seed", "config", "fault")} for row in chosen],
            "nano",
            out,
            workers,
            [],
            None,
            math.inf,
        )
        remade = {r["seed"]: r for r in map(json.loads, out.read_text().splitlines())}
    agree = 0
    for row in chosen:
        again = remade[row["seed"]]
        same = again["marks"] == row["marks"]
        agree += same
        print(
            f"seed {row['seed']} fault {row['fault']} {'same marks' if same else 'MARKS DIFFER'}"
            f"\n--- committed\n{row['digest']}\n--- remade\n{again['digest']}\n"
        )
    print(f"{agree} of {len(chosen)} remade digests carry the committed marks")
    return 0 if agree == len(chosen) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(dest="command", required=True)
    maker = sub.add_parser("make")
    maker.add_argument("--set", choices=("train", "test"), required=True)
    maker.add_argument("--count", type=int, required=True)
    maker.add_argument("--first", type=int, default=0)
    maker.add_argument("--checkpoint", default="nano")
    maker.add_argument("--out", type=Path, required=True)
    maker.add_argument("--workers", type=int, default=2)
    maker.add_argument("--keep", help="folder that keeps the run directories")
    maker.add_argument("--minutes", type=float, default=math.inf, help="start nothing after this")
    maker.add_argument("overrides", nargs="*", help="a.b=value for every run")
    checker = sub.add_parser("verify")
    checker.add_argument("--count", type=int, default=5)
    checker.add_argument("--workers", type=int, default=1)
    packer = sub.add_parser("pack")
    packer.add_argument("sources", type=Path, nargs="+")
    packer.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "pack":
        print(f"{pack(args.sources, args.out)} examples in {args.out}")
        return 0
    if args.command == "verify":
        return verify(args.count, args.workers)
    examples = [plan(args.set, i) for i in range(args.first, args.first + args.count)]
    make(
        examples,
        args.checkpoint,
        args.out,
        args.workers,
        args.overrides,
        args.keep,
        time.monotonic() + 60 * args.minutes,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
