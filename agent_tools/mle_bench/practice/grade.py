"""One grader a metric, named by import string as in any competition folder."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def auc(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Area under the ROC curve; higher is better. Raises `InvalidSubmissionError`."""
    return grade_with("auc", submission, answers)


def logloss(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Mean log loss; lower is better. Raises `InvalidSubmissionError`."""
    return grade_with("logloss", submission, answers)


def rmse(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Root mean squared error; lower is better. Raises `InvalidSubmissionError`."""
    return grade_with("rmse", submission, answers)


def mae(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Mean absolute error; lower is better. Raises `InvalidSubmissionError`."""
    return grade_with("mae", submission, answers)


def rmsle(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Root mean squared error of log(1 + value); lower is better."""
    return grade_with("rmsle", submission, answers)
