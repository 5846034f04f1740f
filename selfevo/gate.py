"""The gate: a pure function from scores to accept, reject or indecisive, with every number.

Score of a train seed = mean percentile (0-100) over the val competitions, equal samples each.
Test: two-sample t, one-sided, α a round = α of the campaign / planned rounds. Its variance is the
larger of (a) the variance between train seeds, pooled over every arm of the campaign at this
budget, and (b) the sampling variance within seeds; df = Σ(seeds − 1) over those arms
(docs/gate.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Verdict = Literal["accept", "reject", "indecisive"]
Confirmed = Literal["confirmed", "failed", "unconfirmed"]
#: Seed indices from here on belong to confirmations, and are used by nothing else.
FRESH = 1_000_000


@dataclass(frozen=True)
class SeedScore:
    """One train seed of an arm, measured.

    `score` in percentile points; `sampling_var` is the variance of `score` that comes from
    sampling a finite number of scripts (points squared); `infra` of `samples` + `infra` scripts
    failed for reasons of the machine and are not in `score`.
    """

    seed: int
    score: float
    sampling_var: float
    samples: int
    infra: int = 0


@dataclass(frozen=True)
class Budget:
    """What a job was allowed to spend."""

    episodes: int
    tokens_per_script: int
    cpu_seconds_per_script: float

    def ratio(self, other: Budget) -> float:
        """The largest ratio of this budget to `other`, over the three limits."""
        return max(
            self.episodes / other.episodes,
            self.tokens_per_script / other.tokens_per_script,
            self.cpu_seconds_per_script / other.cpu_seconds_per_script,
        )


@dataclass(frozen=True)
class GateResult:
    """Verdict and all numbers behind it; percentile points where not said otherwise."""

    verdict: Verdict
    reason: str
    control_mean: float
    candidate_mean: float
    difference: float
    control_seeds: int
    candidate_seeds: int
    seed_sd: float
    """Standard deviation between seeds, pooled over all arms."""
    sampling_sd: float
    """Standard deviation of a seed's score that sampling alone explains."""
    standard_error: float
    df: int
    t: float | None
    p_better: float | None
    p_worse: float | None
    alpha_round: float
    smallest_effect: float | None
    """The smallest difference that this test would have accepted."""
    budget_ratio: float
    infra_share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def seed_score(seed: int, percentiles: Mapping[str, Sequence[float]], infra: int = 0) -> SeedScore:
    """A seed's score from the percentiles of its scripts by competition (0 for an invalid one).

    Mean over competitions of the mean over scripts; sampling variance = Σ_c s_c²/n_c / C², with
    s_c² the unbiased variance inside competition c. Raises ValueError without any script.
    """
    filled = {name: list(values) for name, values in percentiles.items() if values}
    if not filled:
        raise ValueError("no graded script: nothing to score")
    means, variances = [], []
    for values in filled.values():
        n = len(values)
        mean = math.fsum(values) / n
        spread = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else 0.0
        means.append(mean)
        variances.append(spread / n)
    count = len(means)
    return SeedScore(
        seed=seed,
        score=math.fsum(means) / count,
        sampling_var=math.fsum(variances) / count**2,
        samples=sum(len(values) for values in filled.values()),
        infra=infra,
    )


def pooled_variance(arms: Sequence[Sequence[SeedScore]]) -> tuple[float, int]:
    """Variance between seeds inside arms, and its degrees of freedom Σ(seeds − 1)."""
    total, df = 0.0, 0
    for arm in arms:
        if len(arm) < 2:
            continue
        mean = math.fsum(s.score for s in arm) / len(arm)
        total += math.fsum((s.score - mean) ** 2 for s in arm)
        df += len(arm) - 1
    return (total / df if df else 0.0), df


def decide(
    control: Sequence[SeedScore],
    candidate: Sequence[SeedScore],
    others: Sequence[Sequence[SeedScore]] = (),
    *,
    alpha: float,
    rounds: int,
    budget_ratio: float = 1.0,
    max_budget_ratio: float = 1.1,
    max_infra_share: float = 0.1,
) -> GateResult:
    """Compare two arms. `others` are the campaign's further arms at this budget (for the variance).

    Both arms need at least one seed. Accept if p < α/rounds and the allowed budgets are
    comparable; reject if the mirrored test passes; indecisive otherwise.
    """
    from scipy.special import stdtr, stdtrit  # scipy takes long to import

    alpha_round = alpha / rounds
    n0, n1 = len(control), len(candidate)
    mean0 = math.fsum(s.score for s in control) / n0
    mean1 = math.fsum(s.score for s in candidate) / n1
    difference = mean1 - mean0
    between, df = pooled_variance([control, candidate, *others])
    both = [*control, *candidate]
    within = math.fsum(s.sampling_var for s in both) / len(both)
    variance = max(between, within)
    error = math.sqrt(variance * (1 / n0 + 1 / n1))
    infra = sum(s.infra for s in both)
    infra_share = infra / max(1, infra + sum(s.samples for s in both))

    t: float | None = None
    p_better: float | None = None
    smallest: float | None = None
    if df > 0:
        smallest = float(stdtrit(df, 1 - alpha_round)) * error
        if error > 0:
            t = difference / error
            p_better = float(stdtr(df, -t))
        elif difference != 0:
            p_better = 0.0 if difference > 0 else 1.0
    p_worse = None if p_better is None else 1.0 - p_better
    if t is not None:
        p_worse = float(stdtr(df, t))

    verdict: Verdict = "indecisive"
    if infra_share > max_infra_share:
        reason = f"{infra_share:.0%} of the scripts failed for reasons of the machine"
    elif df == 0:
        reason = "no arm has two seeds, so there is no variance to test against"
    elif p_better is None or p_worse is None:
        reason = "no difference and no variance"
    elif p_better < alpha_round:
        if budget_ratio > max_budget_ratio:
            reason = (
                f"better, but its allowed budget is {budget_ratio:.2f} times the control's "
                f"(limit {max_budget_ratio:g})"
            )
        else:
            verdict, reason = "accept", f"better: p {p_better:.2g} < {alpha_round:.3g}"
    elif p_worse < alpha_round:
        verdict, reason = "reject", f"worse: p {p_worse:.2g} < {alpha_round:.3g}"
    else:
        reason = f"the difference of {difference:+.1f} is below what this test can see" + (
            f" ({smallest:.1f})" if smallest is not None else ""
        )
    return GateResult(
        verdict=verdict,
        reason=reason,
        control_mean=mean0,
        candidate_mean=mean1,
        difference=difference,
        control_seeds=n0,
        candidate_seeds=n1,
        seed_sd=math.sqrt(between),
        sampling_sd=math.sqrt(within),
        standard_error=error,
        df=df,
        t=t,
        p_better=p_better,
        p_worse=p_worse,
        alpha_round=alpha_round,
        smallest_effect=smallest,
        budget_ratio=budget_ratio,
        infra_share=infra_share,
    )


def confirm(
    control: Sequence[SeedScore],
    candidate: Sequence[SeedScore],
    others: Sequence[Sequence[SeedScore]] = (),
    *,
    alpha: float,
    max_infra_share: float = 0.1,
) -> tuple[Confirmed, GateResult]:
    """Test a kept change again on seeds that had no part in keeping it.

    The gate's own test at level `alpha`, alone: `confirmed` if the candidate is better, `failed`
    if the test could tell and did not find that, `unconfirmed` where it could not tell (too many
    scripts lost to the machine, no arm with two seeds). A change without effect is confirmed with
    probability `alpha` at most.
    """
    result = decide(
        control, candidate, others, alpha=alpha, rounds=1, max_infra_share=max_infra_share
    )
    if result.verdict == "accept":
        return "confirmed", result
    if result.infra_share > max_infra_share or result.df == 0:
        return "unconfirmed", result
    if result.verdict == "reject":
        return "failed", result
    p = "" if result.p_better is None else f": p {result.p_better:.2g} ≥ {alpha:.3g}"
    return "failed", replace(result, reason=f"not better on fresh seeds{p}")
