"""Root mean squared logarithmic error of the price."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """RMSLE over all test diamonds; lower is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("rmsle", submission, answers)
