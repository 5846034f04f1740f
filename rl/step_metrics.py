"""What a step reports: pure functions from episodes to figures, and the stop rule. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rl.config import StopSection
from rl.samples import CUT, usable
from rl.types import Episode
from rl.window import Window

STOP_WINDOW = 10


@dataclass(frozen=True)
class Counts:
    """Running totals of a run, kept in its checkpoints."""

    scripts: int = 0
    infra: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    seconds: float = 0.0
    attempts: int = 0

    def plus(self, episodes: Sequence[Episode], seconds: float, attempts: int = 0) -> Counts:
        """Totals after one more step. An episode that failed as a whole counts as one script."""
        scripts = [s for e in episodes for s in e.scripts]
        lost = sum(e.reward.status == "env_error" for e in episodes if not e.scripts)
        return Counts(
            scripts=self.scripts + len(scripts) + lost,
            infra=self.infra + sum(s.status == "infra" for s in scripts) + lost,
            tokens=self.tokens + sum(len(c.response_ids) for e in episodes for c in e.calls),
            cpu_s=self.cpu_s + sum(s.cpu_s for s in scripts if not s.cached),
            seconds=self.seconds + seconds,
            attempts=self.attempts + attempts,
        )

    @property
    def infra_share(self) -> float:
        return self.infra / self.scripts if self.scripts else 0.0


def rollout_metrics(episodes: Sequence[Episode], competitions: Sequence[str]) -> dict[str, float]:
    """`reward/*`, `rollout/*` of one step's episodes; a competition without episodes has no key."""
    judged = usable(episodes)
    calls = [call for e in judged for call in e.calls]
    last = [e.scripts[-1] for e in judged if e.scripts]
    out = {
        f"reward/{domain}/mean": _mean(e.reward.outcome for e in judged if e.domain == domain)
        for domain in dict.fromkeys(e.domain for e in judged)
    } or {"reward/mle/mean": 0.0}
    for name in competitions:
        mine = [e.reward.outcome for e in judged if e.task == name]
        if mine:
            out[f"reward/{name}/mean"] = _mean(mine)
    if last or not judged:  # records of a pool have no scripts
        out |= {
            "rollout/valid_frac": _mean(s.valid for s in last),
            "rollout/medal_frac": _mean(s.any_medal for s in last),
            "rollout/timeout_frac": _mean(s.status == "timeout" for s in last),
            "rollout/memory_frac": _mean(s.status == "memory" for s in last),
        }
    out |= {
        "rollout/truncated_frac": _mean(c.finish_reason in CUT for c in calls),
        "rollout/turns": _mean(len(e.calls) for e in judged),
        "rollout/tokens": _mean(sum(len(c.response_ids) for c in e.calls) for e in judged),
        "rollout/infra_frac": 1.0 - len(judged) / len(episodes) if episodes else 0.0,
    }
    return out


def lag_metrics(episodes: Sequence[Episode], version: int) -> dict[str, float]:
    """`lag/*`: how many updates of the policy came between sampling a token and training on it, by
    the version spans of its call (a call without spans counts as sampled now), and the share of
    calls that more than one version made."""
    total = tokens = most = calls = spanning = 0
    for call in (call for e in episodes for call in e.calls):
        calls += 1
        tokens += len(call.response_ids)
        spanning += len({made_by for _, _, made_by in call.versions}) > 1
        for start, end, made_by in call.versions:
            total += (end - start) * (version - made_by)
            most = max(most, version - made_by)
    return {
        "lag/mean": total / tokens if tokens else 0.0,
        "lag/max": float(most),
        "lag/spanning_frac": spanning / calls if calls else 0.0,
    }


def window_metrics(window: Window[Any]) -> dict[str, float]:
    """`window/*`: groups taken since the head was admitted, those of them that lie beyond it,
    finished ones that the window holds back, and slots in use."""
    return {
        "window/head_age": float(window.head_age),
        "window/overtaken": float(window.overtaken),
        "window/blocked_done": float(window.blocked_done),
        "window/inflight": float(window.active),
    }


def perf_metrics(
    episodes: Sequence[Episode],
    seconds: float,
    generate_s: float,
    wait_s: float,
    update_s: float,
    sync_s: float = 0.0,
) -> dict[str, float]:
    """`perf/*` of a step of `seconds`: the trainer waited `wait_s` for its batch, of which
    `generate_s` were spent generating and the rest executing."""
    tokens = sum(len(c.response_ids) for e in episodes for c in e.calls)
    return {
        "perf/tokens_per_s": tokens / seconds,
        "perf/step_s": seconds,
        "perf/generate_s": generate_s,
        "perf/execute_s": max(0.0, wait_s - generate_s),
        "perf/update_s": update_s,
        "perf/wait_batch_s": wait_s,
        "perf/sync_s": sync_s,
    }


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
    if any("rollout/valid_frac" not in row for row in (*before, now)):
        return None  # computed again from records: there are no scripts
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
