"""A second compute plane: a small program that obeys the run-directory contract in milliseconds.

`python selfevo_double.py train RUN.yaml --run-dir DIR --resume` and
`python selfevo_double.py evaluate --checkpoint DIR … --out DIR`. Its policy is a number that the
learning rate destroys from 1e-3 on. It keeps checkpoints, resumes, and appends to `starts.log`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

KNOWN = {
    "seed",
    "suite",
    "model",
    "competitions",
    "objective",
    "budget",
    "rollout",
    "optim",
    "cispo",
    "env",
    "sandbox",
    "scaffold",
    "wandb",
}


def write(path: Path, value: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


def train(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    config = YAML(typ="safe", pure=True).load(args.config.read_text())
    unknown = sorted(set(config) - KNOWN)
    if unknown:
        print(f"error: {args.config}: unknown key {unknown[0]!r}", file=sys.stderr)
        return 2
    if args.dry_run:
        return 0
    run, lr, seed = args.run_dir, config["optim"]["lr"], config["seed"]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "starts.log").open("a") as file:
        file.write(f"{os.getpid()}\n")
    (run / "config.resolved.yaml").write_text(args.config.read_text())
    write(run / "status.json", {"state": "running", "pid": os.getpid(), "started": time.time()})
    if lr >= 0.09:
        write(run / "status.json", {"state": "failed", "exit_code": 6, "reason": "non-finite loss"})
        return 6
    broken = Path.cwd().parent.parent / "break"  # in the lab: prefixes of jobs that shall fail
    if broken.exists() and run.name.startswith(tuple(broken.read_text().split())):
        print("error: the disk is full", file=sys.stderr)
        return 5
    fluke = (Path.cwd().parent.parent / "fluke").exists()  # no seed of a confirmation goes well
    steps = config["budget"]["steps"]
    done = sorted(int(p.name.split("-")[1]) for p in (run / "checkpoints").glob("step-*"))
    first = done[-1] + 1 if args.resume and done else 1
    metrics = run / "metrics.jsonl"
    part = metrics.with_suffix(".part")
    part.write_text("".join(metrics_line(step, seed, lr, fluke) for step in range(1, first)))
    part.replace(metrics)
    for step in range(first, steps + 1):
        time.sleep(float(os.environ.get("DOUBLE_STEP_S", "0.01")))
        left = quality(step, seed, lr, fluke)
        folder = run / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "policy.json", {"quality": left, "seed": seed, "lr": lr})
        link = run / "checkpoints" / "latest.part"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(run / "checkpoints" / "latest")
        with metrics.open("a") as file:
            file.write(metrics_line(step, seed, lr, fluke))
    write(run / "status.json", {"state": "done", "pid": os.getpid(), "exit_code": 0})
    write(
        run / "result.json",
        {
            "steps": steps,
            "tokens": steps * 1000,
            "seconds": 1.5,
            "checkpoint": f"checkpoints/step-{steps}",
            "metrics": {},
            "versions": {},
        },
    )
    return 0


def quality(step: int, seed: int, lr: float, fluke: bool) -> float:
    return max(0.05, 1 - 0.3 * step) if lr >= 1e-3 or (fluke and seed >= 2**30) else 1.0


def metrics_line(step: int, seed: int, lr: float, fluke: bool) -> str:
    left = quality(step, seed, lr, fluke)
    row = {
        "step": step,
        "t": time.time(),
        "reward/mle/mean": 0.4 * left + random.Random(f"{seed}/{step}").random() / 100,
        "rollout/valid_frac": 0.85 * left,
        "rollout/truncated_frac": 0.0,
        "rollout/timeout_frac": 0.0,
        "policy/entropy": 0.2,
        "policy/grad_norm": 0.1,
        "loss/cispo/weight_max": 1.0,
        "optim/lr": lr,
    }
    return json.dumps(row) + "\n"


def evaluate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("--checkpoint", "--split", "--suite", "--scaffold", "--out"):
        parser.add_argument(name, required=True)
    for name in ("--samples", "--seed"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--json", action="store_true")
    args, _ = parser.parse_known_args(argv)
    policy = json.loads((Path(args.checkpoint) / "policy.json").read_text())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{policy['seed']}/{policy['quality']}/{args.seed}")
    rows = []
    for competition in ("electricity-demand", "vowel-speaker"):
        for index in range(args.samples):
            valid = rng.random() < 0.9 * policy["quality"]
            percentile = round(rng.uniform(30, 60), 1) if valid else 0.0
            rows.append(
                {
                    "competition": competition,
                    "index": index,
                    "valid": valid,
                    "score": 0.5 if valid else None,
                    "percentile": percentile,
                    "any_medal": percentile > 55,
                    "gold": False,
                    "silver": False,
                    "bronze": percentile > 55,
                    "above_median": percentile > 50,
                    "status": "ok" if valid else "error",
                    "cpu_s": 0.1,
                }
            )
    (out / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(out / "result.json", {"mean_percentile": 0.0, "infra_errors": 0, "seconds": 0.5})
    return 0


if __name__ == "__main__":
    try:
        sys.exit({"train": train, "evaluate": evaluate}[sys.argv[1]](sys.argv[2:]))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(5)
