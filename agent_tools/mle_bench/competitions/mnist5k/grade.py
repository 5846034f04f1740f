"""Log loss over ten digits."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Mean negative log-probability of the true digit; lower is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("logloss", submission, answers)
