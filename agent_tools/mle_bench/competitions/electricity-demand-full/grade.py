"""Mean absolute error of the demand."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """MAE in gigawatts over all test half-hours; lower is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("mae", submission, answers)
