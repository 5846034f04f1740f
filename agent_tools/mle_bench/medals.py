"""The medal rule of Kaggle as MLE-bench applies it, and the percentile that rewards use.

Positions count from 1 in leaderboard order. The rule is a table over the number of teams and is
not smooth: from 999 to 1,000 teams bronze moves from rank 100 to 10 % of the teams.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Thresholds:
    """Scores that earn a medal (as good or better), and the median (strictly better)."""

    gold: float
    silver: float
    bronze: float
    median: float


def medal_ranks(teams: int) -> tuple[int, int, int]:
    """The ranks whose scores are the gold, silver and bronze thresholds.

    Integer arithmetic throughout: 0.29 * 100 in floats would already fall below 29.
    Raises `ValueError` without teams.
    """
    if teams < 1:
        raise ValueError("a leaderboard needs at least one score")
    if teams < 100:
        return max(1, teams // 10), max(1, teams // 5), max(1, teams * 2 // 5)
    if teams < 250:
        return 10, teams // 5, teams * 2 // 5
    if teams < 1000:
        return 10 + teams // 500, 50, 100
    return 10 + teams // 500, teams // 20, teams // 10


def is_lower_better(leaderboard: Sequence[float]) -> bool:
    """Direction of a leaderboard sorted best first: lower is better if it rises.

    Inferred and not declared, as in MLE-bench; where all scores are equal nothing can be
    inferred, and the answer is False with a warning.
    """
    if not leaderboard:
        raise ValueError("a leaderboard needs at least one score")
    if leaderboard[0] == leaderboard[-1]:
        warnings.warn(
            "first and last score of the leaderboard are equal: taking higher as better",
            stacklevel=2,
        )
    return leaderboard[0] < leaderboard[-1]


def medal_thresholds(scores: Sequence[float], lower_is_better: bool | None = None) -> Thresholds:
    """Thresholds of a leaderboard whose scores are given in any order.

    With ``lower_is_better`` None the scores must be sorted best first (see `is_lower_better`).
    """
    if lower_is_better is None:
        lower_is_better = is_lower_better(scores)
    ranked = sorted(scores, reverse=not lower_is_better)
    gold, silver, bronze = medal_ranks(len(ranked))
    return Thresholds(
        gold=ranked[gold - 1],
        silver=ranked[silver - 1],
        bronze=ranked[bronze - 1],
        median=float(median(ranked)),
    )


def reaches(score: float, threshold: float, lower_is_better: bool) -> bool:
    """At least as good as the threshold; NaN never is."""
    return score <= threshold if lower_is_better else score >= threshold


def percentile(score: float, scores: Sequence[float], lower_is_better: bool) -> float:
    """100 * (strictly worse + half of the equal ones) / all, over a field of scores."""
    if not scores:
        raise ValueError("a field needs at least one score")
    equal = sum(other == score for other in scores)
    if lower_is_better:
        worse = sum(other > score for other in scores)
    else:
        worse = sum(other < score for other in scores)
    return 100.0 * (worse + 0.5 * equal) / len(scores)
