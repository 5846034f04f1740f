"""Grading reports to the headline: any-medal percentage, mean and standard error over seeds.

Reports are read in sorted path order, and the k-th report of each competition forms seed k. A seed
counts only with every competition of the split; surplus reports are dropped, or with
``pad_missing`` absent ones count as failures. Numbers before 2025-11-27 used other rules.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from agent_tools.errors import UserError
from agent_tools.mle_bench import registry
from agent_tools.mle_bench.leaderboards import is_pointer, lite_boards

WANTED_SEEDS = 3
INTERVAL = 1.96
FLAGS = ("gold_medal", "silver_medal", "bronze_medal", "above_median", "submission_exists",
         "valid_submission")  # fmt: skip
GROUPS_FILE = "run_group_experiments.csv"


@dataclass(frozen=True)
class Outcome:
    """What aggregation reads of a competition report."""

    competition_id: str
    gold_medal: bool = False
    silver_medal: bool = False
    bronze_medal: bool = False
    above_median: bool = False
    submission_exists: bool = False
    valid_submission: bool = False

    @property
    def any_medal(self) -> bool:
        """From the three flags, as MLE-bench does, not from the report's own field."""
        return self.gold_medal or self.silver_medal or self.bronze_medal


@dataclass(frozen=True)
class Figure:
    """Mean over seeds, standard error of the mean (0 with one seed), mean ± 1.96 of it."""

    mean: float
    ci_lower: float
    ci_upper: float
    standard_error: float


@dataclass(frozen=True)
class Aggregate:
    """Percentages over the seeds that count, under MLE-bench's names.

    ``per_seed`` holds the any-medal percentage of each seed.
    """

    num_seeds_averaged: int
    num_competitions_per_seed: int
    metrics: dict[str, Figure]
    per_seed: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """MLE-bench's object."""
        return {
            "num_seeds_averaged": self.num_seeds_averaged,
            "num_competitions_per_seed": self.num_competitions_per_seed,
            "metrics": {name: vars(figure) for name, figure in self.metrics.items()},
        }


def read_outcomes(paths: Iterable[Path], *, allow_reported: bool = False) -> list[Outcome]:
    """Outcomes of all reports, in sorted path order, by competition id inside each.

    Raises `UserError` for a file that is no grading report, and for one whose thresholds were
    reported by third parties unless ``allow_reported``.
    """
    outcomes = []
    for path in sorted(paths, key=str):
        data = _read_report(path)
        if "reported_thresholds" in data and not allow_reported:
            raise UserError(
                f"{path}: was graded against reported thresholds, never for a claim: grade with "
                "the leaderboards, or pass --allow-reported and say so wherever the number goes"
            )
        rows = sorted(data["competition_reports"], key=lambda row: str(row["competition_id"]))
        outcomes += [
            Outcome(str(row["competition_id"]), **{flag: bool(row[flag]) for flag in FLAGS})
            for row in rows
        ]
    return outcomes


def complete_seeds(
    outcomes: Sequence[Outcome],
    competition_ids: Sequence[str],
    *,
    seeds: int | None = None,
    pad_missing: bool = False,
) -> list[list[Outcome]]:
    """One list a seed, each with one outcome per competition of the split, in its order.

    ``seeds`` None takes all there are. Outcomes of other competitions are ignored. Raises
    `UserError` if no seed is complete, or fewer than asked for.
    """
    if not competition_ids or len(set(competition_ids)) != len(competition_ids):
        raise UserError("the split is empty or names a competition twice: check the list")
    found: dict[str, list[Outcome]] = {id_: [] for id_ in competition_ids}
    for outcome in outcomes:
        if outcome.competition_id in found:
            found[outcome.competition_id].append(outcome)
    counts = [len(rows) for rows in found.values()]
    available = max(counts) if pad_missing else min(counts)
    if available == 0:
        missing = [id_ for id_, rows in found.items() if not rows]
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if missing[5:] else "")
        hint = "" if pad_missing else ", or pass --pad-missing to count them as failures"
        raise UserError(f"no complete seed: no report of {shown}: grade them{hint}")
    if seeds is not None and not 1 <= seeds <= available:
        raise UserError(
            f"{seeds} seeds asked for, {available} complete: grade more, or leave --num-seeds out"
        )
    return [
        [rows[k] if k < len(rows) else Outcome(id_) for id_, rows in found.items()]
        for k in range(seeds or available)
    ]


def aggregate(seeds: Sequence[Sequence[Outcome]]) -> Aggregate:
    """Mean and standard error over complete seeds; `UserError` without one."""
    if not seeds:
        raise UserError("no seed to average: grade some runs")
    values = {
        "total_competitions": [float(len(seed)) for seed in seeds],
        "submission_exists_percentage": _shares(seeds, "submission_exists"),
        "valid_submissions_percentage": _shares(seeds, "valid_submission"),
        "above_median_percentage": _shares(seeds, "above_median"),
        "gold_medal_percentage": _shares(seeds, "gold_medal"),
        "silver_medal_percentage": _shares(seeds, "silver_medal"),
        "bronze_medal_percentage": _shares(seeds, "bronze_medal"),
        "any_medal_percentage": _shares(seeds, "any_medal"),
    }
    return Aggregate(
        num_seeds_averaged=len(seeds),
        num_competitions_per_seed=len(seeds[0]),
        metrics={name: _figure(numbers) for name, numbers in values.items()},
        per_seed=tuple(values["any_medal_percentage"]),
    )


def split_ids(split: str, checkout: Path | None = None) -> list[str]:
    """Competition ids of a split.

    ``lite`` and ``low`` are the 22; a suite's name is that suite; a path with a suffix is a file
    with one id a line; any other name is a list of the checkout (``experiments/splits``).
    """
    if split in ("lite", "low"):
        return list(lite_boards())
    if split in registry.suite_names():
        return list(registry.load_suite(split).ids())
    path = Path(split)
    if not path.suffix:
        if checkout is None:
            raise UserError(
                f"no split {split!r}: choose lite, a suite ({', '.join(registry.suite_names())}), "
                "a file of ids, or pass --checkout for MLE-bench's lists"
            )
        path = checkout / "experiments" / "splits" / f"{split}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no split list {path} ({error}): name a file with one id a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def experiment_reports(experiment: str, runs_dir: Path) -> list[Path]:
    """The one grading report of each run group of an experiment, by MLE-bench's list of groups.

    Groups without a report are skipped. Raises `UserError` where the list lacks the experiment or
    a group has several reports.
    """
    listing = runs_dir / GROUPS_FILE
    try:
        text = listing.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"no {listing}: name the folder of runs with --runs-dir") from None
    if is_pointer(listing):
        raise UserError(f"{listing}: is a Git LFS pointer: run `git lfs pull` in the checkout")
    rows = [row for row in csv.reader(text.splitlines()) if len(row) >= 2]
    groups = sorted(row[1].strip() for row in rows if row[0].strip() == experiment)
    reports = []
    for group in groups:
        found = sorted((runs_dir / group).glob("*grading_report*.json"))
        if len(found) > 1:
            raise UserError(f"{runs_dir / group}: holds {len(found)} grading reports: keep one")
        reports += found
    if not reports:
        raise UserError(f"no grading report of experiment {experiment!r} under {runs_dir}")
    return reports


def _read_report(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = data["competition_reports"]
        for row in rows:
            [row[key] for key in ("competition_id", *FLAGS)]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}): name grading reports"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if is_pointer(path):
            raise UserError(f"{path}: is a Git LFS pointer: run `git lfs pull` there") from None
        raise UserError(f"{path}: is no grading report ({error!r}): grade again") from None
    assert isinstance(data, dict)
    return data


def _shares(seeds: Sequence[Sequence[Outcome]], flag: str) -> list[float]:
    return [sum(getattr(one, flag) for one in seed) / len(seed) * 100 for seed in seeds]


def _figure(values: Sequence[float]) -> Figure:
    mean = fmean(values)
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Figure(mean, mean - INTERVAL * error, mean + INTERVAL * error, error)
