"""Does RL learn? CISPO and expert iteration from the bundled policy, at equal script executions.

Trains every (objective, seed) at the same time, then samples the start and each final checkpoint
on the private tests of the train competitions and on val. The last checkpoint is the one measured:
nothing is chosen by a score. Intervals: 95 % bootstrap over competitions' samples and over seeds;
those of `generalises` draw the competitions too.
`--summarise samples.jsonl` (or `.xz`) computes the figures of a run again from its samples.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.agent_digests import read_lines

OBJECTIVES = ("cispo", "expert_iteration")
DRAWS = 10_000


def run_all(commands: Sequence[tuple[list[str], Path]], limit_s: float) -> list[int]:
    """Run commands at once, each into its own log; their exit codes.

    Past the limit a command gets SIGTERM, on which a training run saves and stops; -9 if that is
    not enough.
    """
    deadline = time.monotonic() + limit_s
    running = []
    for command, log in commands:
        log.parent.mkdir(parents=True, exist_ok=True)
        running.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
    for process in running:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
    codes = []
    for process in running:
        try:
            codes.append(process.wait(30))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return codes


def samples_of(folder: Path, policy: str, split: str) -> list[dict[str, Any]]:
    """One evaluation's samples, infrastructure errors left out."""
    rows = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
    kept = ("competition", "index", "percentile", "valid", "any_medal")
    return [
        {"policy": policy, "split": split} | {key: row[key] for key in kept}
        for row in rows
        if row["status"] != "infra"
    ]


def mean_of(table: dict[str, list[float]]) -> float:
    """Mean over competitions of their mean percentile."""
    return sum(sum(v) / len(v) for v in table.values()) / len(table)


def interval(
    before: dict[str, list[float]], after: Sequence[dict[str, list[float]]]
) -> tuple[float, float, float]:
    """Rise of the mean percentile and its 95 % bootstrap interval over samples and seeds."""
    rng = random.Random(0)

    def resample(table: dict[str, list[float]]) -> float:
        return mean_of({k: rng.choices(v, k=len(v)) for k, v in table.items()})

    rises = sorted(
        sum(resample(rng.choice(after)) for _ in after) / len(after) - resample(before)
        for _ in range(DRAWS)
    )
    point = sum(map(mean_of, after)) / len(after) - mean_of(before)
    return point, rises[int(0.025 * DRAWS)], rises[int(0.975 * DRAWS)]


def generalises(
    samples: Sequence[Mapping[str, Any]], split: str, figure: str, draws: int = 2_000
) -> dict[str, list[float]]:
    """Rise of a figure over the start, and its 95 % bootstrap interval over competitions, samples
    and seeds, by objective; and of CISPO over expert iteration. Percentages and percentiles."""
    scale = 1.0 if figure == "percentile" else 100.0
    tables: dict[str, dict[str, list[float]]] = {}
    for row in samples:
        if row["split"] == split:
            table = tables.setdefault(row["policy"], {})
            table.setdefault(row["competition"], []).append(scale * float(row[figure]))
    names = sorted(tables.get("start", {}))
    arms = {
        objective: [t for name, t in tables.items() if name.rpartition("-")[0] == objective]
        for objective in OBJECTIVES
    }
    if not names or not all(arms.values()):
        return {}
    rng = random.Random(0)

    def drawn(seeds: Sequence[dict[str, list[float]]], picked: Sequence[str]) -> float:
        chosen = [rng.choice(seeds) for _ in seeds]
        means = [_mean(rng.choices(t[k], k=len(t[k]))) for t in chosen for k in picked]
        return _mean(means)

    points = {k: _mean([mean_of(t) for t in seeds]) for k, seeds in arms.items()}
    start = mean_of(tables["start"])
    pairs: dict[str, list[float]] = {f"{k} - start": [] for k in OBJECTIVES}
    between = " - ".join(OBJECTIVES)
    pairs[between] = []
    for _ in range(draws):
        picked = rng.choices(names, k=len(names))
        base = drawn([tables["start"]], picked)
        found = {k: drawn(arms[k], picked) for k in OBJECTIVES}
        for k in OBJECTIVES:
            pairs[f"{k} - start"].append(found[k] - base)
        pairs[between].append(found[OBJECTIVES[0]] - found[OBJECTIVES[1]])
    exact = {f"{k} - start": points[k] - start for k in OBJECTIVES}
    exact[between] = points[OBJECTIVES[0]] - points[OBJECTIVES[1]]
    return {
        name: [round(x, 2) for x in (exact[name], *_ends(sorted(values)))]
        for name, values in pairs.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ends(ordered: Sequence[float]) -> tuple[float, float]:
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]


def summarise(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean percentile of every policy, and the rise of every objective over the start.

    `mean_percentile` by "policy split"; `rise` by "objective split": rise and its interval.
    """
    tables: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in samples:
        table = tables.setdefault((row["policy"], row["split"]), {})
        table.setdefault(row["competition"], []).append(row["percentile"])
    rise: dict[str, list[float]] = {}
    for objective in OBJECTIVES:
        for split in ("train", "val"):
            after = [
                table
                for (policy, of), table in sorted(tables.items())
                if of == split and policy.rpartition("-")[0] == objective
            ]
            if after and ("start", split) in tables:
                found = interval(tables["start", split], after)
                rise[f"{objective} {split}"] = [round(x, 2) for x in found]
    means = {f"{policy} {of}": round(mean_of(table), 2) for (policy, of), table in tables.items()}
    wide = {
        f"{figure} {split}": risen
        for split in ("train", "val")
        for figure in ("percentile", "any_medal")
        if (risen := generalises(samples, split, figure))
    }
    return {"mean_percentile": means, "rise": rise, "generalises": wide}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument("--summarise", type=Path, help="samples.jsonl of an earlier run")
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--suite", default="offline-small-v0")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the run file")
    parser.add_argument("--eval-splits", nargs="+", default=["train", "val"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--scripts", type=int, default=72)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--workers", type=int, default=4, help="sandbox workers a process")
    parser.add_argument("--eval-workers", type=int, default=2, help="the same, while measuring")
    parser.add_argument("--sandbox", default="bubblewrap")
    parser.add_argument("--minutes", type=float, default=60, help="limit of training")
    parser.add_argument("--eval-minutes", type=float, default=60, help="limit of measuring")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.summarise is not None:
        lines = read_lines(args.summarise)
        print(json.dumps(summarise([json.loads(line) for line in lines]), indent=2))
        return 0
    if args.out is None:
        parser.error("--out is missing; name the folder to write")
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "run.yaml"
    config.write_text("{}\n")
    arms = [(objective, seed) for objective in OBJECTIVES for seed in args.seeds]
    started = time.monotonic()
    trained = run_all(
        [
            (
                [
                    sys.executable,
                    "-m",
                    "rl.train",
                    str(config),
                    "--run-dir",
                    str(args.out / f"{objective}-{seed}"),
                    f"objective={objective}",
                    f"seed={seed}",
                    f"suite={args.suite}",
                    f"model.checkpoint={args.checkpoint}",
                    f"budget.steps={args.steps}",
                    f"budget.scripts_per_step={args.scripts}",
                    "optim.lr=3e-4",
                    "optim.warmup_steps=5",
                    "checkpoint_every=1000",
                    f"sandbox.kind={args.sandbox}",
                    f"sandbox.workers={args.workers}",
                    f"device={args.device}",
                    *args.set,
                ],
                args.out / "logs" / f"{objective}-{seed}.log",
            )
            for objective, seed in arms
        ],
        60 * args.minutes,
    )
    print(
        f"trained: {dict(zip(arms, trained, strict=True))} in {time.monotonic() - started:.0f} s",
        flush=True,
    )
    made = {
        f"{objective}-{seed}": args.out / f"{objective}-{seed}" / "checkpoints" / "latest"
        for objective, seed in arms
    }
    subjects = {"start": args.checkpoint} | {
        name: str(latest) for name, latest in made.items() if latest.exists()
    }
    jobs = [(name, split) for name in subjects for split in args.eval_splits]
    measured = run_all(
        [
            (
                [
                    sys.executable,
                    "-m",
                    "rl.evaluate",
                    "--checkpoint",
                    subjects[name],
                    "--suite",
                    args.suite,
                    "--split",
                    split,
                    "--samples",
                    str(args.samples),
                    "--seed",
                    "1",
                    "--out",
                    str(args.out / "evals" / f"{name}-{split}"),
                    "--sandbox",
                    args.sandbox,
                    "--workers",
                    str(args.eval_workers),
                    "--device",
                    args.device,
                ],
                args.out / "logs" / f"eval-{name}-{split}.log",
            )
            for name, split in jobs
        ],
        60 * args.eval_minutes,
    )
    print(
        f"measured: {dict(zip(jobs, measured, strict=True))} after "
        f"{time.monotonic() - started:.0f} s",
        flush=True,
    )
    steps = {
        name: int(latest.resolve().name.removeprefix("step-"))
        for name, latest in made.items()
        if latest.exists()
    }
    samples = [
        sample
        for (name, split), code in zip(jobs, measured, strict=True)
        if code == 0
        for sample in samples_of(args.out / "evals" / f"{name}-{split}", name, split)
    ]
    (args.out / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    summary = {"steps": steps, "scripts_per_step": args.scripts} | summarise(samples)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))
    return 0 if not any(trained) and not any(measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())
