"""Share of records whose status is right."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Accuracy over all test records; the largest column is the answer. Higher is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("accuracy", submission, answers)
