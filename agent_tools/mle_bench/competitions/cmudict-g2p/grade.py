"""Share of words whose pronunciation is right."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Share of rows whose phones are all right, 0 to 1; higher is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("exact", submission, answers)
