"""Metrics and the checks of a submission; every competition's ``grade`` is one call into here.

Written out in numpy, because importing scikit-learn costs more than grading; the tests compare
each with scikit-learn's. A bad submission raises `InvalidSubmissionError`, as in MLE-bench, and
its message never holds anything of the answers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]
Metric = Callable[[Array, Array], float]

SUM_TOLERANCE = 1e-6  # MLE-bench's, for rows of probabilities


class InvalidSubmissionError(Exception):
    """The submission cannot be scored; the message says why, in one line."""


def grade_with(
    metric: str, submission: pd.DataFrame, answers: pd.DataFrame, *, id_column: str = "id"
) -> float:
    """Check the submission's columns, ids and values, line it up with the answers, score it.

    Rows may come in any order. Raises `InvalidSubmissionError`; an answers file without
    ``id_column`` is our own fault and an assertion, as in MLE-bench.
    """
    true, predicted = grade_values(metric, submission, answers, id_column=id_column)
    with np.errstate(over="ignore"):  # absurdly large predictions score inf, which is invalid
        return METRICS[metric](true, predicted)


def text_values(
    submission: pd.DataFrame, answers: pd.DataFrame, *, id_column: str = "id"
) -> tuple[Array, Array]:
    """Ones, and 1 where a row's text equals the answer's, 0 where not: (rows, 1) each.

    A missing value equals a missing value only: MLE-bench reads the words NA and null as missing
    on both sides.
    """
    assert id_column in answers.columns, f"answers need a column {id_column}"
    (name,) = (name for name in answers.columns if name != id_column)
    rows = _lined_up(submission, answers, id_column, [name])
    given, wanted = rows[name].reset_index(drop=True), answers[name].reset_index(drop=True)
    same = given.astype(str).eq(wanted.astype(str)) & given.isna().eq(wanted.isna())
    right: Array = np.asarray(same, dtype=np.float64)[:, None]
    return np.ones_like(right), right


def grade_values(
    metric: str, submission: pd.DataFrame, answers: pd.DataFrame, *, id_column: str = "id"
) -> tuple[Array, Array]:
    """The answers and the checked predictions, lined up: (rows, columns) each.

    For whoever needs more than the score: folds and losses. Raises `InvalidSubmissionError`.
    """
    if metric == "exact":
        return text_values(submission, answers, id_column=id_column)
    assert id_column in answers.columns, f"answers need a column {id_column}"
    names = [name for name in answers.columns if name != id_column]
    rows = _lined_up(submission, answers, id_column, names)
    predicted = np.column_stack([_numbers(rows[name], name) for name in names])
    true: Array = np.asarray(answers[names], dtype=np.float64)
    _check_range(metric, predicted)
    return true, predicted


def _lined_up(
    submission: pd.DataFrame, answers: pd.DataFrame, id_column: str, names: list[str]
) -> pd.DataFrame:
    wanted = [id_column, *names]
    missing = [name for name in wanted if name not in submission.columns]
    extra = [str(name) for name in submission.columns if name not in wanted]
    if missing:
        raise InvalidSubmissionError(f"missing column {missing[0]!r}: expected {_listed(wanted)}")
    if extra:
        raise InvalidSubmissionError(f"unknown column {extra[0]!r}: expected {_listed(wanted)}")
    if len(submission) != len(answers):
        raise InvalidSubmissionError(f"{len(submission)} rows, expected {len(answers)}")
    ids, wanted_ids = submission[id_column], answers[id_column]
    if ids.dtype == wanted_ids.dtype and np.array_equal(ids.to_numpy(), wanted_ids.to_numpy()):
        return submission  # in the answers' own order, as most are
    if ids.duplicated().any():
        raise InvalidSubmissionError(f"duplicate value in {id_column!r}")
    order = pd.Index(id_text(ids)).get_indexer(pd.Index(id_text(wanted_ids)))
    if (order < 0).any():
        raise InvalidSubmissionError(f"values of {id_column!r} differ from those of the test set")
    lined_up: pd.DataFrame = submission.iloc[order]
    return lined_up


def id_text(ids: pd.Series) -> pd.Series:
    """Ids as text, so that comparing them can neither fail nor round."""
    if ids.dtype.kind == "f" and (ids.abs() < 2**53).all() and (ids % 1 == 0).all():
        ids = ids.astype("int64")  # pandas writes whole numbers as 7.0 after some joins
    return ids.astype(str)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def _numbers(column: pd.Series, name: str) -> Array:
    if column.dtype == bool:
        column = column.astype(int)
    try:
        values = pd.to_numeric(column).to_numpy(dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidSubmissionError(f"column {name!r} holds something that is no number") from None
    if np.isnan(values).any():
        raise InvalidSubmissionError(f"column {name!r} has missing values (NaN)")
    if np.isinf(values).any():
        raise InvalidSubmissionError(f"column {name!r} has infinite values")
    return values


def _check_range(metric: str, predicted: Array) -> None:
    if metric in ("auc", "logloss") and not ((predicted >= 0) & (predicted <= 1)).all():
        raise InvalidSubmissionError("predictions must be probabilities between 0 and 1")
    if metric == "logloss" and predicted.shape[1] > 1:
        worst = np.abs(predicted.sum(axis=1) - 1).max(initial=0.0)
        if worst > SUM_TOLERANCE:
            raise InvalidSubmissionError("probabilities of a row must sum to 1")
    if metric == "rmsle" and (predicted < 0).any():
        raise InvalidSubmissionError("predictions must not be negative")


def rmse(true: Array, predicted: Array) -> float:
    """Root mean squared error."""
    return float(np.sqrt(np.mean((true - predicted) ** 2)))


def mae(true: Array, predicted: Array) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(true - predicted)))


def rmsle(true: Array, predicted: Array) -> float:
    """Root mean squared error of log(1 + value)."""
    return rmse(np.log1p(true), np.log1p(predicted))


def auc(true: Array, predicted: Array) -> float:
    """Area under the ROC curve, from mean ranks (Mann-Whitney), so ties count one half."""
    labels, scores = true.ravel() > 0.5, predicted.ravel()
    positives = int(labels.sum())
    negatives = len(labels) - positives
    assert positives and negatives, "answers need both classes"
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place]
    above = ranks[labels].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def logloss(true: Array, predicted: Array) -> float:
    """Mean negative log of the probability of the true class; one column means binary.

    Probabilities are clipped by the float64 epsilon, as scikit-learn does.
    """
    if predicted.shape[1] == 1:
        predicted = np.hstack([1 - predicted, predicted])
        true = np.hstack([1 - true, true])
    epsilon = float(np.finfo(np.float64).eps)
    clipped = np.clip(predicted, epsilon, 1 - epsilon)
    return float(-np.mean(np.log(clipped)[true > 0.5]))


def accuracy(true: Array, predicted: Array) -> float:
    """Share of right labels; for one-hot answers the largest column is the label."""
    if true.shape[1] == 1:
        return float(np.mean(true == predicted))
    return float(np.mean(true.argmax(axis=1) == predicted.argmax(axis=1)))


def exact(true: Array, predicted: Array) -> float:
    """Share of right rows, from what `text_values` gives."""
    return float(np.mean(true == predicted))


METRICS: dict[str, Metric] = {
    "auc": auc,
    "logloss": logloss,
    "accuracy": accuracy,
    "rmse": rmse,
    "mae": mae,
    "rmsle": rmsle,
    "exact": exact,
}
LOWER_IS_BETTER = {
    "auc": False,
    "logloss": True,
    "accuracy": False,
    "rmse": True,
    "mae": True,
    "rmsle": True,
    "exact": False,
}
CEILING = {
    "auc": 1.0,
    "logloss": 0.0,
    "accuracy": 1.0,
    "rmse": 0.0,
    "mae": 0.0,
    "rmsle": 0.0,
    "exact": 1.0,
}
