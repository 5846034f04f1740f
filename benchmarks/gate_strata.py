"""What the practice third buys the gate: the smallest detectable effect with it and without.

`python -m benchmarks.gate_strata --json [--seeds 4] [--work DIR]` trains the bundled model with the
first lab's healthy settings (5 steps × 24 scripts) under each train seed, measures every result on
both val sets as the gate would, and hands pairs of seeds to `selfevo.gate.decide` as two arms. Runs
and measurements in DIR are kept, so a killed benchmark goes on.

Figures: `effect_two` and `effect_practice` are mean smallest detectable effects in percentile
points at 2 train seeds an arm; `ratio` is the first over the second; `executions_ratio` is what the
practice third costs in scripts; `ratio_equal` compares them at the same number of scripts;
`sampling_two` and `sampling_practice` are the standard deviations of a seed's score that sampling
scripts alone explains, which no longer training can undercut. Exit code 1 if `ratio` is below 2 or
`executions_ratio` above 4.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from agent_tools.errors import InfraError
from benchmarks.common import ROOT, emit, report
from selfevo.gate import SeedScore, decide, seed_score

ALPHA, ROUNDS = 0.05, 2  # the lab template's
TRAIN = """\
suite: offline-small-v0
seed: {seed}
budget: {{steps: 5, scripts_per_step: 24}}
optim: {{lr: 3.0e-4, warmup_steps: 1}}
wandb: {{mode: disabled}}
"""
SETS = {"two": ("offline-small-v0", 16), "practice": ("practice-v1", 4)}
STEP_SECONDS = 3_600

Percentiles = Mapping[str, Sequence[float]]


def measure(seeds: int, work: Path) -> dict[str, Any]:
    """Train, evaluate and compare; the benchmark's object."""
    found: dict[str, list[Percentiles]] = {name: [] for name in SETS}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        checkpoint = train(seed, work / f"train-{seed}")
        for name, (suite, samples) in SETS.items():
            out = work / f"{name}-{seed}"
            result = evaluate(checkpoint, suite, samples, out)
            found[name].append(percentiles(out / "scores.jsonl"))
            row = {"seed": seed, "set": name, "seconds": result["seconds"]}
            rows.append(row | {"mean_percentile": result["mean_percentile"]})
    return report("gate_strata", figures(found, rows), rows, ("numpy", "torch", "scikit-learn"))


def figures(
    found: Mapping[str, Sequence[Percentiles]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures of percentiles by set, seed and competition."""
    scores = {
        name: [seed_score(seed, values) for seed, values in enumerate(seeds)]
        for name, seeds in found.items()
    }
    executions = {name: fmean(score.samples for score in seeds) for name, seeds in scores.items()}
    effects = {name: effect(seeds) for name, seeds in scores.items()}
    equal = effect_at(found["practice"], round(executions["two"]))
    seconds = [row["seconds"] for row in rows if row["set"] == "practice"]
    return {
        "effect_two": effects["two"],
        "effect_practice": effects["practice"],
        "ratio": effects["two"] / effects["practice"],
        "executions_ratio": executions["practice"] / executions["two"],
        "effect_practice_equal": equal,
        "ratio_equal": effects["two"] / equal,
        **{f"sampling_{name}": sampling_sd(seeds) for name, seeds in scores.items()},
        "competitions": len(found["practice"][0]),
        "practice_seconds": fmean(seconds),
    }


def sampling_sd(seeds: Sequence[SeedScore]) -> float:
    """Standard deviation of a seed's score from sampling a finite number of scripts."""
    return math.sqrt(fmean(score.sampling_var for score in seeds))


def effect(seeds: Sequence[SeedScore]) -> float:
    """Mean smallest detectable effect over all ways to make two arms of two seeds."""
    arms = [
        (one, other)
        for one, other in combinations(list(combinations(seeds, 2)), 2)
        if not set(one) & set(other)
    ]
    if not arms:
        raise ValueError("two arms of two seeds need four train seeds")
    found = [decide(one, other, alpha=ALPHA, rounds=ROUNDS).smallest_effect for one, other in arms]
    return fmean(value for value in found if value is not None)


def effect_at(seeds: Sequence[Percentiles], executions: int) -> float:
    """The same with as many scripts as competitions allow within `executions`, taken in turn.

    What sampling explains is still told by all scripts: one a competition shows no spread.
    """
    per = max(1, executions // len(seeds[0]))
    offsets = range(min(len(v) for values in seeds for v in values.values()) // per)
    found = []
    for offset in offsets:
        part = slice(offset * per, (offset + 1) * per)
        scores = []
        for seed, values in enumerate(seeds):
            whole = [variance(v) for v in values.values() if len(v) > 1]
            within = sum(whole) / per / len(whole) ** 2
            score = seed_score(seed, {name: v[part] for name, v in values.items()})
            scores.append(replace(score, sampling_var=within))
        found.append(effect(scores))
    return fmean(found)


def percentiles(path: Path) -> dict[str, list[float]]:
    """Percentiles by competition, those lost to the machine left out."""
    found: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["status"] != "infra":
            found.setdefault(row["competition"], []).append(row["percentile"])
    return found


def train(seed: int, folder: Path) -> Path:
    """The checkpoint of a train seed; a finished run is kept, a broken one goes on."""
    config = folder.with_suffix(".yaml")
    config.write_text(TRAIN.format(seed=seed), encoding="utf-8")
    if not (folder / "result.json").is_file():
        _run(["rl.train", str(config), "--run-dir", str(folder), "--resume"])
    return folder / "checkpoints" / "latest"


def evaluate(checkpoint: Path, suite: str, samples: int, out: Path) -> dict[str, Any]:
    """`rl.evaluate` on a suite's val competitions, as the gate calls it."""
    if not (out / "result.json").is_file():
        arguments = ["--checkpoint", str(checkpoint), "--suite", suite, "--split", "val"]
        arguments += ["--samples", str(samples), "--out", str(out)]
        _run(["rl.evaluate", *arguments, "--ledger", str(out.parent / "val_ledger.jsonl")])
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return result


def _run(module: Sequence[str]) -> None:
    argv = [sys.executable, "-m", *module]
    try:
        done = subprocess.run(
            argv, cwd=ROOT, capture_output=True, text=True, timeout=STEP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise InfraError(f"{module[0]} took over {STEP_SECONDS} s: try a faster machine") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InfraError(f"{module[0]} ended with exit code {done.returncode}: {last}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if the practice third buys too little."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate_strata", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--seeds", type=int, default=4, help="train seeds, four or more")
    parser.add_argument("--work", type=Path, help="folder of runs to keep")
    options = parser.parse_args(arguments)
    if options.seeds < 4:
        parser.error("--seeds must be 4 or more: two arms of two")
    work = options.work or Path(tempfile.mkdtemp(prefix="gate-strata-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(options.seeds, work)
    except InfraError as error:
        print(f"error: {error} (runs are kept in {work})", file=sys.stderr)
        return error.exit_code
    emit(result, options.json)
    shown = result["figures"]
    return 0 if shown["ratio"] >= 2 and shown["executions_ratio"] <= 4 else 1


if __name__ == "__main__":
    sys.exit(main())
