"""What a submission must hold before it is scored, and which of its rows belongs to which answer.

Every refusal is an `InvalidSubmissionError` of one line that tells nothing of the answers but
their number. Frames are as `tables.read_table` gives them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.mle_bench.lite.scores import Floats, Labels
from agent_tools.mle_bench.metrics import InvalidSubmissionError

Rows = npt.NDArray[np.intp] | slice
EVERY_ROW = slice(None)
SUM_TOLERANCE = 1e-6  # added to numpy's relative 1e-5, so a row may miss 1 by 1.1e-5


def need_columns(submission: pd.DataFrame, answers: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse a submission without one of the columns; answers without one are an assertion."""
    for name in names:
        assert name in answers.columns, f"answers need a column {name}"
        if name not in submission.columns:
            shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
            raise InvalidSubmissionError(f"missing column {name!r}: needed are {shown}")


def need_only_columns(submission: pd.DataFrame, names: Sequence[str]) -> None:
    """Refuse any further column."""
    for name in submission.columns:
        if name not in names:
            raise InvalidSubmissionError(f"unknown column {str(name)!r}")


def need_rows(submission: pd.DataFrame, answers: pd.DataFrame) -> None:
    """Refuse another number of rows."""
    if len(submission) != len(answers):
        raise InvalidSubmissionError(f"{len(submission)} rows, expected {len(answers)}")


def numbers(column: pd.Series, *, lenient: bool = False) -> Floats:
    """The column as finite floats, shape (rows,).

    Text is refused; ``lenient`` takes what numpy reads as a number, because some of the original
    graders hand a column of text to scikit-learn, which does.
    """
    if column.dtype.kind not in "biuf" and not lenient:
        raise InvalidSubmissionError(f"column {column.name!r} holds something that is no number")
    try:
        values = column.to_numpy(dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidSubmissionError(
            f"column {column.name!r} holds something that is no number"
        ) from None
    if not np.isfinite(values).all():
        what = "missing" if np.isnan(values).any() else "infinite"
        raise InvalidSubmissionError(f"column {column.name!r} has {what} values")
    return values


def table_of_numbers(table: pd.DataFrame, names: Sequence[str], *, lenient: bool = False) -> Floats:
    """`numbers` of several columns, shape (rows, columns)."""
    return np.column_stack([numbers(table[name], lenient=lenient) for name in names])


def whole_numbers(column: pd.Series) -> npt.NDArray[np.int64]:
    """The column as integers, shape (rows,); 2.0 is one, 2.5 is refused."""
    values = numbers(column)
    with np.errstate(invalid="ignore"):
        integers = values.astype(np.int64)
    if (integers != values).any():
        raise InvalidSubmissionError(f"column {column.name!r} must hold whole numbers")
    return integers


def flags(column: pd.Series) -> Labels:
    """A column of answers, 0 or 1, as booleans of shape (rows,)."""
    values = column.to_numpy()
    assert column.dtype.kind in "biuf", f"answers need numbers in {column.name}"
    assert ((values == 0) | (values == 1)).all(), f"answers need 0 or 1 in {column.name}"
    return values.astype(bool)


def table_of_flags(table: pd.DataFrame, names: Sequence[str]) -> Labels:
    """`flags` of several columns, shape (rows, columns)."""
    return np.column_stack([flags(table[name]) for name in names])


def need_probabilities(values: Floats, what: str) -> None:
    """Refuse anything outside [0, 1]."""
    if values.size and (values.min() < 0 or values.max() > 1):
        raise InvalidSubmissionError(f"{what} must be probabilities between 0 and 1")


def need_rows_that_sum_to_one(table: pd.DataFrame) -> None:
    """Refuse rows that miss 1 by more than 1e-6 plus numpy's relative tolerance."""
    if not np.isclose(table.sum(axis=1), 1, atol=SUM_TOLERANCE).all():
        raise InvalidSubmissionError("the probabilities of each row must sum to 1")


def in_key_order(submission: pd.DataFrame, answers: pd.DataFrame, key: str) -> tuple[Rows, Rows]:
    """Rows of the submission and of the answers, so that the two selections have equal keys.

    The submission may have its rows in any order; its keys must be those of the answers, each
    as often. Equal in value is enough (7.0 for 7), but the text "7" is not the number.
    """
    need_rows(submission, answers)
    theirs, ours = submission[key], answers[key]
    if equal(theirs, ours):
        return EVERY_ROW, EVERY_ROW
    refused = InvalidSubmissionError(f"values of {key!r} differ from those of the test set")
    if theirs.isna().any():
        raise refused
    wanted, found = pd.Index(ours), pd.Index(theirs)
    if wanted.is_unique:
        if not found.is_unique:
            raise InvalidSubmissionError(f"duplicate values of {key!r}")
        rows = found.get_indexer(wanted)
        if (rows < 0).any():
            raise refused
        return rows, EVERY_ROW
    # Equal keys are matched by the place that one and the same sort gives them.
    theirs_sorted, ours_sorted = sorted_rows(theirs), sorted_rows(ours)
    if not equal(theirs.iloc[theirs_sorted], ours.iloc[ours_sorted]):
        raise refused
    return theirs_sorted, ours_sorted


def equal(left: pd.Series, right: pd.Series) -> bool:
    """Whether type and values are equal in this order; a missing value equals nothing."""
    return left.dtype == right.dtype and np.array_equal(left.to_numpy(), right.to_numpy())


def sorted_rows(column: pd.Series) -> npt.NDArray[np.intp]:
    """Rows in the order that ``DataFrame.sort_values`` gives, equal keys included."""
    numbered = pd.DataFrame({"key": column.to_numpy()})
    try:
        return numbered.sort_values("key").index.to_numpy()
    except TypeError:
        raise InvalidSubmissionError(f"values of {column.name!r} are of several types") from None
