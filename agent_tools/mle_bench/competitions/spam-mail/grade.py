"""Log loss of the probability of spam."""

from __future__ import annotations

import pandas as pd

from agent_tools.mle_bench.metrics import grade_with


def grade(submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """Binary log loss over all test mails; lower is better.

    Raises `InvalidSubmissionError`.
    """
    return grade_with("logloss", submission, answers)
