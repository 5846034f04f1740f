"""What a step reports: pure functions from episodes to figures, and the stop rule. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rl.config import StopSection
from rl.rewards import RewardWeights, episode_returns
from rl.types import Episode

STOP_WINDOW = 10


def usable(episodes: Iterable[Episode]) -> list[Episode]:
    """Episodes that were judged: infrastructure errors and aborted ones are left out."""
    return [e for e in episodes if e.reward.status in ("done", "timeout")]


def returns_by_group(
    episodes: Sequence[Episode], weights: RewardWeights | None = None
) -> list[float]:
    """Return of each episode, in order; speed is judged within its group."""
    groups: dict[int, list[int]] = {}
    for position, episode in enumerate(episodes):
        groups.setdefault(episode.group, []).append(position)
    out = [0.0] * len(episodes)
    for positions in groups.values():
        values = episode_returns([episodes[p].reward for p in positions], weights)
        for position, value in zip(positions, values, strict=True):
            out[position] = value
    return out


@dataclass(frozen=True)
class Counts:
    """Running totals of a run, kept in its checkpoints."""

    scripts: int = 0
    infra: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    seconds: float = 0.0

    def plus(self, episodes: Sequence[Episode], seconds: float) -> Counts:
        """Totals after one more step. An episode that failed as a whole counts as one script."""
        scripts = [s for e in episodes for s in e.scripts]
        lost = sum(e.reward.status == "env_error" for e in episodes if not e.scripts)
        return Counts(
            scripts=self.scripts + len(scripts) + lost,
            infra=self.infra + sum(s.status == "infra" for s in scripts) + lost,
            tokens=self.tokens + sum(len(c.response_ids) for e in episodes for c in e.calls),
            cpu_s=self.cpu_s + sum(s.cpu_s for s in scripts if not s.cached),
            seconds=self.seconds + seconds,
        )

    @property
    def infra_share(self) -> float:
        return self.infra / self.scripts if self.scripts else 0.0


def rollout_metrics(episodes: Sequence[Episode], competitions: Sequence[str]) -> dict[str, float]:
    """`reward/*`, `rollout/*` of one step's episodes; a competition without episodes has no key."""
    judged = usable(episodes)
    calls = [call for e in judged for call in e.calls]
    last = [e.scripts[-1] for e in judged if e.scripts]
    out = {"reward/mle/mean": _mean(e.reward.outcome for e in judged)}
    for name in competitions:
        mine = [e.reward.outcome for e in judged if e.task == name]
        if mine:
            out[f"reward/{name}/mean"] = _mean(mine)
    out |= {
        "rollout/valid_frac": _mean(s.valid for s in last),
        "rollout/medal_frac": _mean(s.any_medal for s in last),
        "rollout/timeout_frac": _mean(s.status == "timeout" for s in last),
        "rollout/memory_frac": _mean(s.status == "memory" for s in last),
        "rollout/truncated_frac": _mean(c.finish_reason == "length" for c in calls),
        "rollout/turns": _mean(len(e.calls) for e in judged),
        "rollout/tokens": _mean(sum(len(c.response_ids) for c in e.calls) for e in judged),
        "rollout/infra_frac": 1.0 - len(judged) / len(episodes) if episodes else 0.0,
    }
    return out


def sampled_entropy(episodes: Sequence[Episode]) -> float:
    """Mean −log p of the sampled ids (nats a token): an unbiased estimate of the entropy."""
    return _mean(-x for e in usable(episodes) for c in e.calls for x in c.logprobs)


def drift(rows: Sequence[dict[str, Any]], rule: StopSection) -> str | None:
    """The drift rule for small policies: why to stop, or None.

    Gradient norm of the last row over `grad_norm_factor` × the median of the ten rows before, while
    its valid share is `valid_drop` or more under their median.
    """
    if rule.rule == "none" or len(rows) <= STOP_WINDOW:
        return None
    before, now = rows[-STOP_WINDOW - 1 : -1], rows[-1]
    norms = [row["policy/grad_norm"] for row in before if "policy/grad_norm" in row]
    if not norms or "policy/grad_norm" not in now:
        return None
    usual_norm = median(norms)
    usual_valid = median(row["rollout/valid_frac"] for row in before)
    norm, valid = now["policy/grad_norm"], now["rollout/valid_frac"]
    if norm > rule.grad_norm_factor * usual_norm and valid <= usual_valid - rule.valid_drop:
        return (
            f"drift at step {now['step']}: gradient norm {norm:.3g} (usually {usual_norm:.3g}), "
            f"valid share {valid:.2f} (usually {usual_valid:.2f}); lower optim.lr"
        )
    return None


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return float(sum(kept)) / len(kept) if kept else 0.0
