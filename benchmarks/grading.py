"""What grading costs: `python -m benchmarks.grading --json`

Every prepared competition of a suite is graded 1,000 times from a submission file (read, checked,
scored, ranked), in turns with a bare `pandas.read_csv` of the same file. Figures, from the median
CPU time of each competition, so that a busy machine does not change them: `grades_s` (grades a
second, over the whole suite) and `vs_pandas_read` (time of all grades by time of all reads).
`lite_grades_s` and `lite_vs_pandas_read` are the same for the graders of the 22 MLE-bench Lite
competitions on generated tables of the real test's rows (at most 100,000; 3,000 where the number
is unknown), every fiftieth time. Sealed competitions are never opened.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench import grading
from agent_tools.mle_bench.lite import graders
from agent_tools.mle_bench.lite.catalogue import LITE, LiteCompetition
from agent_tools.mle_bench.lite.tables import read_table, write_table
from agent_tools.mle_bench.registry import (
    DEFAULT_SUITE,
    Competition,
    competition_dir,
    load_competition,
    load_suite,
)
from benchmarks.common import emit, report

MOST_ROWS, UNKNOWN_ROWS, LITE_SHARE = 100_000, 3_000, 50
_MANY_CLASSES = {"dog-breed-identification": 120, "leaf-classification": 99}

Call = Callable[[], object]


def suite_competitions(name: str) -> list[Competition]:
    """The suite's prepared competitions, without sealed ones. `UserError` where there is none."""
    suite = load_suite(name)
    found = [
        load_competition(ref.id, suite=suite)
        for ref in suite.competitions
        if ref.split != "sealed" and (competition_dir(ref.id) / "prepared").is_dir()
    ]
    if not found:
        raise UserError(
            f"nothing of {name} is prepared: run `python -m agent_tools.mle_bench prepare "
            f"--suite {name}`"
        )
    return found


def random_submission(competition: Competition, rng: np.random.Generator) -> pd.DataFrame:
    """The sample with random numbers of full length in it; text stays as it is."""
    sample = pd.read_csv(competition.public("private") / "sample_submission.csv")
    names = [name for name in sample.columns[1:] if sample[name].dtype.kind in "if"]
    if competition.metric == "logloss" and len(names) > 1:
        sample[names] = rng.dirichlet(np.ones(len(names)), len(sample))
    elif names:
        sample[names] = rng.random((len(sample), len(names)))
    return sample


def lite_tables(
    lite: LiteCompetition, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Generated answers, and a random submission with its rows in the order of the sample."""
    rows = min(lite.test_rows or UNKNOWN_ROWS, MOST_ROWS)
    if lite.id.startswith("denoising"):
        rows = MOST_ROWS  # 29 images have several millions
    n_classes = _MANY_CLASSES.get(lite.id, 0)
    names = list(lite.targets) or [f"class_{number}" for number in range(n_classes)]
    keys = pd.DataFrame({lite.key: [f"key_{number}" for number in rng.permutation(rows)]})
    shape = (rows, len(names))
    said: Any = rng.random(shape)
    if lite.metric == "log loss":
        true: Any = np.eye(len(names), dtype=int)[rng.integers(0, len(names), rows)]
        said = rng.dirichlet(np.ones(len(names)), rows)
    elif lite.metric == "equal text":
        true, said = (rng.integers(0, 2, shape).astype(str).astype(object) + " a" for _ in "ts")
    elif lite.metric in ("quadratic kappa", "accuracy"):
        true, said = rng.integers(1, 6, shape), rng.integers(1, 6, shape)
    else:
        true = rng.random(shape) if "rms" in lite.metric else rng.integers(0, 2, shape)
    answers, submission = (
        pd.concat([keys, pd.DataFrame(values, columns=names)], axis=1) for values in (true, said)
    )
    return answers, submission


def timed(name: str, path: Path, grade: Call, repeats: int) -> dict[str, Any]:
    """Median CPU milliseconds of ``repeats`` turns of each call, after one that is not counted.

    ``exact_read_ms`` is the read with exact floats, which grading cannot do without.
    """
    calls: dict[str, Call] = {
        "grade_ms": grade,
        "read_ms": lambda: pd.read_csv(path),
        "exact_read_ms": lambda: read_table(path),
    }
    spent: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(repeats + 1):
        for kind, call in calls.items():
            start = time.process_time()
            call()
            spent[kind].append(1000 * (time.process_time() - start))
    medians = {kind: statistics.median(values[1:]) for kind, values in spent.items()}
    ratio = medians["grade_ms"] / medians["read_ms"]
    return {"competition": name, "repeats": repeats, **medians, "ratio": ratio}


def suite_rows(name: str, repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row a competition. `InfraError` where a submission is not valid."""
    rows, rng = [], np.random.default_rng(0)
    for competition in suite_competitions(name):
        path = folder / f"{competition.id}.csv"
        random_submission(competition, rng).to_csv(path, index=False)
        first = grading.grade(competition, path)
        if not first.valid:
            raise InfraError(f"{competition.id}: the random submission is invalid: {first.error}")

        def grade(competition: Competition = competition, path: Path = path) -> object:
            return grading.grade(competition, path)

        rows.append({"suite": name, **timed(competition.id, path, grade, repeats)})
    return rows


def lite_rows(repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each of the 22."""
    rows, rng = [], np.random.default_rng(0)
    for lite in LITE.values():
        path = folder / f"{lite.id}.csv"
        answers, submission = lite_tables(lite, rng)
        write_table(submission, path)
        grade_fn = getattr(graders, lite.function)

        def grade(
            path: Path = path, answers: pd.DataFrame = answers, grade_fn: Any = grade_fn
        ) -> object:
            return grade_fn(read_table(path), answers)

        rows.append({"suite": "mle-bench-lite", **timed(lite.id, path, grade, repeats)})
    return rows


def measure(suite: str, repeats: int) -> dict[str, Any]:
    """Both suites and the four figures."""
    with tempfile.TemporaryDirectory() as name:
        ours = suite_rows(suite, repeats, Path(name))
        lite = lite_rows(max(1, repeats // LITE_SHARE), Path(name))
    figures = {}
    for prefix, rows in (("", ours), ("lite_", lite)):
        grades = sum(row["grade_ms"] for row in rows)
        figures[f"{prefix}grades_s"] = 1000 * len(rows) / grades
        figures[f"{prefix}vs_pandas_read"] = grades / sum(row["read_ms"] for row in rows)
    return report("grading", figures, ours + lite, ("numpy", "pandas"), suite=suite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grading", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--suite", default=DEFAULT_SUITE)
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args(arguments)
    try:
        if options.repeats < 1:
            raise UserError(f"--repeats is {options.repeats}: give at least 1")
        result = measure(options.suite, options.repeats)
    except (UserError, InfraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    emit(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
