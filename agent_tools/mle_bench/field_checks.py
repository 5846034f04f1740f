"""Is a fitted field fair? The conditions under which its ranks may be called medals.

1. The gold entry really beats the bronze entry, and that one the median entry, with a
   probability of at least 0.95 each over bootstrap samples of the test rows (both entries scored
   on the same rows).
2. Gold is not at the metric's ceiling, and there are enough test rows.
3. Headroom: a strong solution that is not in the field takes gold, and a plain default boosting
   model misses bronze.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.errors import UserError
from agent_tools.mle_bench.fields import (
    SUBMISSION,
    Entry,
    ranked,
    run_script,
    script_digest,
    submission_path,
    work_dir,
)
from agent_tools.mle_bench.losses import LOSSES_FILE, Name, field_ranks, of_predictions, write
from agent_tools.mle_bench.medals import medal_ranks, medal_thresholds, reaches
from agent_tools.mle_bench.metrics import CEILING, METRICS, grade_values
from agent_tools.mle_bench.recipes import Recipe
from agent_tools.mle_bench.registry import PACKAGE, Competition, Which, load_config
from agent_tools.sandbox import ScriptPool

HEADROOM = PACKAGE / "headroom"
SAMPLES = 2_000
LEAST_P = 0.95
LEAST_ROWS = 500
# the source has no more utterances
ROWS_EXCEPTION = {"vowel-speaker": 250, "vowel-speaker-full": 250}
DEV_LEAST_ROWS = 400
REFIT_TOLERANCE = 0.02  # relative; other processors round differently and trees amplify it


@dataclass(frozen=True)
class FieldCheck:
    """The figures of a field and whether it passes conditions 1 and 2."""

    competition: str
    which: Which
    entries: int
    test_rows: int
    best: float
    gold: float
    silver: float
    bronze: float
    median: float
    worst: float
    p_gold_bronze: float
    p_bronze_median: float
    passed: bool


@dataclass(frozen=True)
class HeadroomCheck:
    """Condition 3: the scores of the two outside solutions and whether they fell as they must."""

    competition: str
    strong: float | None
    strong_gold: bool
    strong_error: str | None
    default: float | None
    default_bronze: bool
    default_error: str | None
    passed: bool


def check_field(
    competition: Competition,
    which: Which,
    entries: Sequence[Entry],
    *,
    data_dir: Path | None = None,
    samples: int = SAMPLES,
) -> FieldCheck:
    """Conditions 1 and 2 of a fitted field, from the submissions that its journal kept."""
    order = ranked(entries, competition.lower_is_better)
    scores = [entry.score for entry in order if entry.score is not None]
    limits = medal_thresholds(scores, competition.lower_is_better)
    gold, _, bronze = medal_ranks(len(order))
    # The upper of the two middle entries: the harder one to beat.
    middle = (len(order) + 1) // 2
    folder = work_dir(competition, which, data_dir)
    answers = pd.read_csv(competition.answers(which), float_precision="round_trip")
    pairs = [
        grade_values(
            competition.metric,
            pd.read_csv(submission_path(folder, order[rank - 1]), float_precision="round_trip"),
            answers,
        )
        for rank in (gold, bronze, middle)
    ]
    p_gold, p_bronze = beat_probabilities(
        competition.metric, pairs[0][0], [predicted for _, predicted in pairs], samples=samples
    )
    rows = ROWS_EXCEPTION.get(competition.id, LEAST_ROWS) if which == "private" else DEV_LEAST_ROWS
    return FieldCheck(
        competition=competition.id,
        which=which,
        entries=len(order),
        test_rows=len(answers),
        best=scores[0],
        gold=limits.gold,
        silver=limits.silver,
        bronze=limits.bronze,
        median=round(limits.median, 6),
        worst=scores[-1],
        p_gold_bronze=round(p_gold, 4),
        p_bronze_median=round(p_bronze, 4),
        passed=min(p_gold, p_bronze) >= LEAST_P
        and limits.gold != CEILING[competition.metric]
        and len(answers) >= rows,
    )


def beat_probabilities(
    metric: str,
    true: npt.NDArray[np.float64],
    predictions: Sequence[npt.NDArray[np.float64]],
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[float]:
    """For each neighbouring pair of predictions: how often the first scores better.

    ``true`` and every prediction are (rows, columns). Each bootstrap sample of the rows scores
    all predictions, so what is common to them cancels; a tie counts one half.
    """
    from agent_tools.mle_bench.metrics import LOWER_IS_BETTER

    sign = -1.0 if LOWER_IS_BETTER[metric] else 1.0
    rng = np.random.default_rng(seed)
    wins = np.zeros(len(predictions) - 1)
    for _ in range(samples):
        rows = rng.integers(0, len(true), len(true))
        scores = np.array([METRICS[metric](true[rows], p[rows]) for p in predictions])
        wins += 0.5 * (1 + np.sign(sign * (scores[:-1] - scores[1:])))
    return [float(share) for share in wins / samples]


@dataclass(frozen=True)
class Outside:
    """A solution that is not in the field: its private score, or the reason why it has none."""

    score: float | None
    error: str | None
    submission: bytes


def run_outside(competition: Competition, pool: ScriptPool) -> dict[Name, Outside]:
    """Run the outside solutions on the private test, under the limits of every script.

    They lie in ``headroom/``: one strong script a competition, and one default boosting script
    for tables and one for texts, where a competition has none of its own.
    """
    kind = "text" if competition.facts.text else "table"
    own = f"default_{competition.id}.py.txt"
    scripts: dict[Name, str] = {
        "strong": f"{competition.id}.py.txt",
        "default": own if (HEADROOM / own).is_file() else f"default_{kind}.py.txt",
    }
    found: dict[Name, Outside] = {}
    for name, file in scripts.items():
        text = (HEADROOM / file).read_text(encoding="utf-8")
        score, error, result = run_script(competition, "private", text, pool)
        found[name] = Outside(score, error, result.files.get(SUBMISSION, b""))
    return found


def check_headroom(
    competition: Competition, outside: Mapping[Name, Outside], field: Sequence[float]
) -> HeadroomCheck:
    """Condition 3, from the scores of a field and of the outside solutions."""
    lower = competition.lower_is_better
    limits = medal_thresholds(field, lower)
    strong, default = outside["strong"], outside["default"]
    takes_gold = strong.score is not None and reaches(strong.score, limits.gold, lower)
    takes_bronze = default.score is not None and reaches(default.score, limits.bronze, lower)
    return HeadroomCheck(
        competition=competition.id,
        strong=strong.score,
        strong_gold=takes_gold,
        strong_error=strong.error,
        default=default.score,
        default_bronze=takes_bronze,
        default_error=default.error,
        passed=takes_gold and default.score is not None and not takes_bronze,
    )


def write_losses(
    competition: Competition,
    entries: Sequence[Entry],
    outside: Mapping[Name, Outside],
    *,
    data_dir: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """Write the per-row losses that `audit` needs into the competition's folder.

    Raises `UserError` where an outside solution has no score.
    """
    for name, solution in outside.items():
        if solution.score is None:
            raise UserError(f"{competition.id}: the {name} solution failed ({solution.error})")
    order = ranked(entries, competition.lower_is_better)
    work = work_dir(competition, "private", data_dir)
    files = {
        name: submission_path(work, order[rank - 1]).read_bytes()
        for name, rank in field_ranks(len(order)).items()
    } | {name: solution.submission for name, solution in outside.items()}
    answers = pd.read_csv(competition.answers("private"), float_precision="round_trip")
    pairs = {
        name: grade_values(
            competition.metric,
            pd.read_csv(io.BytesIO(data), float_precision="round_trip"),
            answers,
        )
        for name, data in files.items()
    }
    config = load_config(competition.id)
    losses = of_predictions(
        competition.metric,
        pairs["gold"][0],
        {name: predicted for name, (_, predicted) in pairs.items()},
        block=config.block,
    )
    path = (folder or config.folder) / LOSSES_FILE
    write(path, losses)
    return path


@dataclass(frozen=True)
class Refit:
    """One entry of the committed leaderboard, fitted again."""

    recipe: str
    rank: int
    committed: float
    refitted: float | None
    error: str | None
    passed: bool


def refit_entries(
    competition: Competition,
    which: Which,
    board: Path,
    recipes: Sequence[Recipe],
    pool: ScriptPool,
    *,
    tolerance: float = REFIT_TOLERANCE,
) -> list[Refit]:
    """Fit the entries at the gold and bronze ranks and the middle one again, and compare.

    Raises `UserError` if a recipe has changed since the board was written.
    """
    with board.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_id = {recipe.id: recipe for recipe in recipes}
    gold, _, bronze = medal_ranks(len(rows))
    refits = []
    for rank in (gold, bronze, (len(rows) + 1) // 2):
        row = rows[rank - 1]
        recipe = by_id.get(row["recipe"])
        if recipe is None or script_digest(recipe.script) != row["script"]:
            raise UserError(
                f"{board}: recipe {row['recipe']} has changed since: fit the whole field again"
            )
        committed = float(row["score"])
        score, error, _ = run_script(competition, which, recipe.script, pool)
        close = score is not None and abs(score - committed) <= tolerance * abs(committed)
        refits.append(Refit(recipe.id, rank, committed, score, error, close))
    return refits
