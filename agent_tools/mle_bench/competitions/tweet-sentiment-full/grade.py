"""Root mean squared error of the rating."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """RMSE over all test tweets; lower is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("rmse", submission, answers)
