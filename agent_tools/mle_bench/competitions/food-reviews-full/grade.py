"""Area under the ROC curve."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """AUC of the probability of a great review; higher is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("auc", submission, answers)
