"""Root mean squared error of the clean pixel."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """RMSE over all asked pixels, in grey levels (0 to 255); lower is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("rmse", submission, answers)
