"""What other trainers call the metrics and settings that we know.

A dialect is a table: our name of a metric → the trainer's names for it, our word for a setting →
the trainer's keys. Only names that a trainer is known to write are mapped; others stay unread.
Sources: TRL `trl/trainer/grpo_trainer.py`, verl `verl/trainer/ppo/metric_utils.py` and its actor,
prime-rl `src/prime_rl/trainer/rl/train.py` and `src/prime_rl/orchestrator/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent_tools.wandb_logs.history import RunHistory

Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Dialect:
    """How one trainer speaks.

    marks: metric names that only this trainer writes; step: the metric that counts optimiser
    steps, where W&B's own step counts something else; metrics: our name → its names, the first
    that was logged is read; settings: our word → its keys, the one in the run's configuration is
    named, else the first.
    """

    name: str
    marks: frozenset[str]
    metrics: Names
    settings: Names
    step: str = ""


@dataclass(frozen=True)
class Translated:
    """A history under our names.

    renamed: our name → the trainer's, for what was read; unread: the trainer's other metrics.
    """

    history: RunHistory
    dialect: Dialect
    renamed: dict[str, str]
    unread: list[str]

    def setting(self, word: str) -> str | None:
        """The trainer's key for one of our settings; None if it has none."""
        names = self.dialect.settings.get(word, ())
        present = [name for name in names if name in self.history.config]
        return next(iter([*present, *names]), None)


def _same(*names: str) -> Names:
    return {name: (name,) for name in names}


SELFEVO = Dialect(
    name="selfevo",
    marks=frozenset({"reward/mle/mean", "loss/cispo/weight_max", "loss/cispo/capped_frac"}),
    metrics=_same(
        "reward/mle/mean",
        "rollout/valid_frac",
        "rollout/truncated_frac",
        "rollout/timeout_frac",
        "policy/entropy",
        "policy/grad_norm",
        "loss/cispo/weight_max",
        "loss/cispo/capped_frac",
        "group/zero_std_frac",
        "mismatch_kl/mean",
        "optim/lr",
    ),
    settings=_same(
        "optim.lr",
        "optim.warmup_steps",
        "optim.updates_per_batch",
        "rollout.temperature",
        "rollout.max_new_tokens",
        "rollout.group_size",
        "cispo.is_weight_max",
        "env.cpu_seconds",
    ),
)

TRL = Dialect(
    name="TRL",
    marks=frozenset(
        {
            "train/frac_reward_zero_std",
            "frac_reward_zero_std",
            "train/completions/clipped_ratio",
            "completions/clipped_ratio",
            "train/completions/mean_length",
            "completions/mean_length",
        }
    ),
    metrics={
        "reward": ("train/reward", "reward"),
        "reward_std": ("train/reward_std", "reward_std"),
        "group/zero_std_frac": ("train/frac_reward_zero_std", "frac_reward_zero_std"),
        "rollout/truncated_frac": (
            "train/completions/clipped_ratio",
            "completions/clipped_ratio",
        ),
        "rollout/mean_length": ("train/completions/mean_length", "completions/mean_length"),
        "policy/entropy": ("train/entropy", "entropy"),
        "policy/grad_norm": ("train/grad_norm", "grad_norm"),
        "policy/clip_frac": (
            "train/clip_ratio/region_mean",
            "clip_ratio/region_mean",
            "train/clip_ratio",
            "clip_ratio",
        ),
        "policy/kl_reference": ("train/kl", "kl"),
        "optim/lr": ("train/learning_rate", "learning_rate"),
    },
    settings={
        "optim.lr": ("learning_rate",),
        "optim.warmup_steps": ("warmup_steps",),
        "optim.updates_per_batch": ("num_iterations",),
        "optim.grad_clip": ("max_grad_norm",),
        "rollout.temperature": ("temperature",),
        "rollout.max_new_tokens": ("max_completion_length",),
        "rollout.group_size": ("num_generations",),
    },
    step="train/global_step",
)

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
VERL = Dialect(
    name="verl",
    marks=frozenset(
        {
            "critic/score/mean",
            "critic/rewards/mean",
            "actor/pg_loss",
            "actor/ppo_kl",
            "actor/pg_clipfrac",
            "response_length/clip_ratio",
        }
    ),
    metrics={
        "reward": ("critic/score/mean", "critic/rewards/mean"),
        "rollout/truncated_frac": ("response_length/clip_ratio",),
        "rollout/mean_length": ("response_length/mean",),
        "policy/entropy": ("actor/entropy", "actor/entropy_loss"),
        "policy/grad_norm": ("actor/grad_norm",),
        "policy/clip_frac": ("actor/pg_clipfrac",),
        "policy/kl_update": ("actor/ppo_kl",),
        "optim/lr": ("actor/lr",),
    },
    settings={
        "optim.lr": (f"{_ACTOR}optim.lr",),
        "optim.warmup_steps": (f"{_ACTOR}optim.lr_warmup_steps",),
        "optim.updates_per_batch": (f"{_ACTOR}ppo_epochs",),
        "optim.grad_clip": (f"{_ACTOR}grad_clip", f"{_ACTOR}optim.clip_grad"),
        "rollout.temperature": (f"{_ROLLOUT}temperature",),
        "rollout.max_new_tokens": ("data.max_response_length",),
        "rollout.group_size": (f"{_ROLLOUT}n",),
    },
)

PRIME_RL = Dialect(
    name="prime-rl",
    marks=frozenset(
        {
            "reward/all/mean",
            "train/agg/effective/reward/mean",
            "train/agg/all/reward/mean",
            "entropy/all/mean",
            "mismatch_kl/all/mean",
            "optim/zero_grad_ratio",
            "is_truncated/all/mean",
        }
    ),
    metrics={
        "reward": (
            "train/agg/effective/reward/mean",
            "train/agg/all/reward/mean",
            "reward/all/mean",
            "reward/mean",
        ),
        "rollout/truncated_frac": (
            "train/agg/effective/is_truncated/mean",
            "train/agg/all/is_truncated/mean",
            "is_truncated/all/mean",
        ),
        "rollout/mean_length": (
            "train/agg/effective/num_output_tokens/mean",
            "decode_len/all/mean",
        ),
        "policy/entropy": ("entropy/all/mean", "entropy/mean"),
        "policy/grad_norm": ("optim/grad_norm",),
        "mismatch_kl/mean": ("mismatch_kl/all/mean", "mismatch_kl/mean"),
        "optim/lr": ("optim/lr",),
    },
    settings={
        "optim.lr": ("trainer.optim.lr", "optim.lr"),
        "optim.warmup_steps": ("trainer.scheduler.warmup_steps", "scheduler.warmup_steps"),
        "optim.grad_clip": ("trainer.optim.max_norm", "optim.max_norm"),
        "rollout.temperature": (
            "orchestrator.sampling.temperature",
            "orchestrator.train.sampling.temperature",
            "sampling.temperature",
            "train.sampling.temperature",
        ),
        "rollout.max_new_tokens": (
            "orchestrator.sampling.max_tokens",
            "orchestrator.train.sampling.max_tokens",
            "sampling.max_tokens",
            "train.sampling.max_tokens",
        ),
        "rollout.group_size": ("orchestrator.rollouts_per_example", "rollouts_per_example"),
    },
)

PLAIN = Dialect(
    name="plain",
    marks=frozenset(),
    metrics={
        "reward": ("reward", "reward_mean", "mean_reward", "reward/mean", "train/reward"),
        "reward_std": ("reward_std", "train/reward_std"),
        "rollout/truncated_frac": ("truncated_frac", "train/truncated_frac"),
        "policy/entropy": ("entropy", "policy/entropy", "policy_entropy", "train/entropy"),
        "policy/grad_norm": ("grad_norm", "gradient_norm", "optim/grad_norm", "train/grad_norm"),
        "policy/clip_frac": ("clip_frac", "clipfrac", "clip_fraction", "train/clip_fraction"),
        "policy/kl_update": ("approx_kl", "train/approx_kl", "ppo_kl"),
        "optim/lr": ("lr", "learning_rate", "optim/lr", "train/lr", "train/learning_rate"),
    },
    settings={
        "optim.lr": ("learning_rate", "lr", "optim.lr"),
        "optim.warmup_steps": ("warmup_steps", "optim.warmup_steps"),
        "optim.updates_per_batch": ("n_epochs", "update_epochs", "ppo_epochs"),
        "optim.grad_clip": ("max_grad_norm", "grad_clip"),
        "rollout.temperature": ("temperature",),
        "rollout.max_new_tokens": ("max_new_tokens", "max_tokens"),
        "rollout.group_size": ("group_size", "num_generations"),
    },
)

KNOWN = (SELFEVO, TRL, VERL, PRIME_RL)


def recognise(history: RunHistory) -> Dialect:
    """The trainer with the most of its own names in the log; plain names where none has any."""
    keys = set(history.keys())
    best = max(KNOWN, key=lambda dialect: len(dialect.marks & keys))
    return best if best.marks & keys else PLAIN


def translate(history: RunHistory, dialect: Dialect | None = None) -> Translated:
    """The same run under our names; rows of one optimiser step become one row."""
    dialect = dialect or recognise(history)
    keys = set(history.keys())
    renamed: dict[str, str] = {}
    for ours, names in dialect.metrics.items():
        found = next((name for name in names if name in keys), None)
        if found is not None:
            renamed[ours] = found
    rows: dict[int, dict[str, float]] = {}
    for row in history.rows:
        step = int(row.get(dialect.step, row["step"]))
        values = {ours: row[name] for ours, name in renamed.items() if name in row}
        if values:
            rows.setdefault(step, {"step": step}).update(values)
    unread = sorted(keys - set(renamed.values()) - {dialect.step})
    merged = replace(history, rows=[rows[step] for step in sorted(rows)])
    return Translated(merged, dialect, renamed, unread)
