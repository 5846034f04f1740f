"""The metrics of the 22 competitions, vectorised, each equal to scikit-learn's.

Inputs are checked beforehand (`checks`): arrays of equal length, finite numbers. Labels without
both classes are a fault of the answers and so an assertion, as in MLE-bench.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.bool_]

EPSILON = float(np.finfo(np.float64).eps)


def auc(labels: Labels, scores: Floats) -> float:
    """Area under the ROC curve of one column; tied scores count one half.

    ``labels`` and ``scores`` have shape (rows,). Counted in whole numbers, so it is exact up to
    the last division.
    """
    order = np.argsort(scores)
    placed, hits = scores[order], np.cumsum(labels[order])
    ends = np.flatnonzero(np.append(placed[1:] != placed[:-1], True))  # last row of each tie
    positives = np.diff(hits[ends], prepend=0)
    negatives = np.diff(ends + 1, prepend=0) - positives
    n_positive, n_negative = int(positives.sum()), int(negatives.sum())
    assert n_positive and n_negative, "answers need both classes"
    below = np.cumsum(negatives) - negatives
    twice = int((positives * (2 * below + negatives)).sum())
    return twice / (2 * n_positive * n_negative)


def mean_auc(labels: Labels, scores: Floats) -> float:
    """The mean of the AUC of each column; both of shape (rows, columns)."""
    columns = range(labels.shape[1])
    return float(np.mean([auc(labels[:, column], scores[:, column]) for column in columns]))


def log_loss(truth: Labels, probabilities: Floats) -> float:
    """Mean negative log of the probability of the true class; both (rows, classes).

    Probabilities are clipped by the float64 epsilon and rows are not rescaled.
    """
    clipped = np.clip(probabilities, EPSILON, 1 - EPSILON)
    return float(-np.log(clipped[truth]).sum() / len(truth))


def binary_log_loss(labels: Labels, probabilities: Floats) -> float:
    """`log_loss` for one column of probabilities of the positive class; both (rows,)."""
    assert labels.any() and not labels.all(), "answers need both classes"
    clipped = np.clip(probabilities, EPSILON, 1 - EPSILON)
    return float(-np.mean(np.log(np.where(labels, clipped, 1 - clipped))))


def rmse(truth: Floats, predicted: Floats) -> float:
    """Root mean squared error; infinite where a square overflows, as in scikit-learn."""
    with np.errstate(over="ignore"):
        return float(np.sqrt(np.mean((truth - predicted) ** 2)))


def rmsle(truth: Floats, predicted: Floats) -> float:
    """Root mean squared error of log(1 + value); values must be above -1."""
    return rmse(np.log1p(truth), np.log1p(predicted))


def quadratic_kappa(truth: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    """Cohen's kappa with quadratic weights, on integer labels of shape (rows,).

    The distance of two labels is that of their places among the labels that occur at all, as in
    scikit-learn, so a label that nobody uses takes no room. NaN where only one label occurs.
    """
    labels, places = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    ours, theirs = np.split(places.astype(np.float64), 2)
    observed = np.mean((ours - theirs) ** 2)
    # The mean squared distance of independent draws, from the moments: no matrix is needed.
    expected = ours.var() + theirs.var() + (ours.mean() - theirs.mean()) ** 2
    return float(1 - observed / expected) if len(labels) > 1 else math.nan
