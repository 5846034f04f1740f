"""Grade a submission: score, medal, percentile, or the reason why it is invalid.

A submission comes from an untrusted script, so nothing in it may raise: whatever is wrong with
the file ends as ``valid=False`` with one line of reason. Faults of our own files do raise.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from agent_tools.errors import UserError
from agent_tools.mle_bench.medals import medal_thresholds, percentile, reaches
from agent_tools.mle_bench.metrics import InvalidSubmissionError, id_text
from agent_tools.mle_bench.registry import FOLDS_FILE, Competition, Which

DIGITS = 5  # scores are rounded before ranking, thresholds are not: MLE-bench's rule
# A submission is refused above this many bytes a row of the answers (plus a small allowance):
# ten class columns at 25 digits fit thrice, and nothing here needs more memory than that.
BYTES_A_ROW = 1_000
BYTES_FREE = 100_000


@dataclass(frozen=True)
class GradeReport:
    """MLE-bench's report of one competition, and ours: ``percentile``, ``error``, ``which``.

    The three medal flags exclude each other. ``percentile`` is 0 and ``score`` None when the
    submission is invalid.
    """

    competition_id: str
    which: Which
    score: float | None
    valid: bool
    error: str | None
    percentile: float
    any_medal: bool
    gold: bool
    silver: bool
    bronze: bool
    above_median: bool
    gold_threshold: float
    silver_threshold: float
    bronze_threshold: float
    median_threshold: float
    is_lower_better: bool
    submission_exists: bool
    fold: int | None = None  # a private fold and its own field; None is the whole test

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def grade(
    competition: Competition,
    submission: Path | bytes,
    which: Which = "private",
    fold: int | None = None,
) -> GradeReport:
    """Grade a CSV file, or its bytes, against the private or dev answers and their field.

    A submission always covers the whole test; with `fold` only the rows of that private fold are
    scored, among the same field on that fold. A path that does not exist is "no submission":
    invalid, ``submission_exists`` False. Raises `UserError` where the competition has no such
    split or fold, or no leaderboard.
    """
    value, error = score(competition, submission, which, fold)
    return report(competition, value, error, which=which, fold=fold)


def score(
    competition: Competition,
    submission: Path | bytes,
    which: Which = "private",
    fold: int | None = None,
) -> tuple[float | None, str | None]:
    """The rounded score and None, or None and the reason; needs no leaderboard."""
    parts = (None,) if fold is None else (fold,)
    values, error = scores(competition, submission, which, parts)
    return (values[0] if values else None), error


def scores(
    competition: Competition,
    submission: Path | bytes,
    which: Which = "private",
    parts: Sequence[int | None] = (None,),
) -> tuple[list[float], str | None]:
    """Rounded scores of several parts of the test (None: the whole) from one reading of the file.

    Empty, with the reason, for an invalid submission: one fault anywhere makes all parts invalid.
    """
    answers = _answers(competition.answers(which))
    grade_fn = _grade_fn(competition.grade_fn)
    values = []
    try:
        table = _read_submission(submission, len(answers))
        whole = grade_fn(table, answers)
        for part in parts:
            value = whole
            if part is not None:
                competition.check_fold(which, part)
                key = answers.columns[0]
                ids = _fold_ids(competition.private_dir / FOLDS_FILE, part)
                value = grade_fn(
                    table[id_text(table[key]).isin(ids)],
                    answers[id_text(answers[key]).isin(ids)],
                )
            if not math.isfinite(value):
                raise InvalidSubmissionError("the score is not a finite number")
            values.append(round(float(value), DIGITS))
    except InvalidSubmissionError as error:
        return [], _printable(str(error))
    return values, None


def report(
    competition: Competition,
    value: float | None,
    error: str | None,
    *,
    which: Which,
    fold: int | None = None,
) -> GradeReport:
    """Rank a score (None is invalid) in the competition's field."""
    field = competition.field(which, fold)
    lower = competition.lower_is_better
    limits = medal_thresholds(field, lower)
    valid = value is not None
    place = math.nan if value is None else value
    gold = reaches(place, limits.gold, lower)
    silver = not gold and reaches(place, limits.silver, lower)
    bronze = not gold and not silver and reaches(place, limits.bronze, lower)
    return GradeReport(
        competition_id=competition.id,
        which=which,
        score=value,
        valid=valid,
        error=error,
        percentile=percentile(place, field, lower) if valid else 0.0,
        any_medal=gold or silver or bronze,
        gold=gold,
        silver=silver,
        bronze=bronze,
        above_median=place < limits.median if lower else place > limits.median,
        gold_threshold=limits.gold,
        silver_threshold=limits.silver,
        bronze_threshold=limits.bronze,
        median_threshold=limits.median,
        is_lower_better=lower,
        submission_exists=error != NO_SUBMISSION,
        fold=fold,
    )


NO_SUBMISSION = "no submission"


def _read_submission(submission: Path | bytes, rows: int) -> pd.DataFrame:
    limit = BYTES_FREE + BYTES_A_ROW * rows
    if isinstance(submission, Path):
        if submission.suffix != ".csv":
            raise InvalidSubmissionError("a submission must be a file ending .csv")
        if not submission.is_file():
            raise InvalidSubmissionError(NO_SUBMISSION)
        try:
            with submission.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise InvalidSubmissionError(f"cannot be read: {error.strerror}") from None
    else:
        data = submission
    if len(data) > limit:
        raise InvalidSubmissionError(f"larger than {limit:,} bytes")
    if not data.strip():
        raise InvalidSubmissionError("the file is empty")
    try:
        # Default NA handling stays on and floats are parsed exactly, as in MLE-bench.
        return pd.read_csv(io.BytesIO(data), float_precision="round_trip")
    except (ValueError, OverflowError) as error:  # ParserError and UnicodeDecodeError are these
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise InvalidSubmissionError(f"is not a CSV file: {first}") from None


@lru_cache(maxsize=32)
def _read_answers(path: Path, modified_ns: int) -> pd.DataFrame:
    return pd.read_csv(path, float_precision="round_trip")


def _answers(path: Path) -> pd.DataFrame:
    # Cached by modification time: a rollout grades thousands of files against the same answers.
    try:
        stamp = path.stat().st_mtime_ns
    except FileNotFoundError:
        raise UserError(
            f"no answers at {path}: run `python -m agent_tools.mle_bench prepare`"
        ) from None
    return _read_answers(path, stamp)


def _fold_ids(path: Path, fold: int) -> frozenset[str]:
    return _read_fold_ids(path, path.stat().st_mtime_ns, fold)


@lru_cache(maxsize=64)
def _read_fold_ids(path: Path, modified_ns: int, fold: int) -> frozenset[str]:
    table = pd.read_csv(path, dtype={"id": str})
    return frozenset(table["id"][table["fold"] == fold])


@lru_cache(maxsize=32)
def _grade_fn(spec: str) -> Any:
    module, _, name = spec.partition(":")
    return getattr(import_module(module), name)


def _printable(text: str) -> str:
    """One short line without control characters: the text may hold a script's own bytes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)[:200]
