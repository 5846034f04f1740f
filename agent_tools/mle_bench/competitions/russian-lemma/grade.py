"""Share of word forms whose lemma is right."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Share of rows whose lemma is right, 0 to 1; higher is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("exact", submission, answers)
