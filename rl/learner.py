"""One learning step: judged episodes in, changed weights and the row's figures out.

Used by the synchronous loop, by retraining from a pool, and by any other process that trains: it
knows nothing of where episodes come from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rl import objectives
from rl.config import RunConfig
from rl.engine import derive_seed
from rl.expert_iteration import ExpertPool, round_ends
from rl.objective_text import objective_text
from rl.objectives import Objective
from rl.run_dir import Row
from rl.samples import advantages_of, check_call, make_batch, rewards_to_go, usable
from rl.step_metrics import lag_metrics, sampled_entropy
from rl.trainer import Sample, Trainer
from rl.types import Episode


class Learner:
    """The run's objective over a `Trainer`. `experts` is state that checkpoints keep."""

    def __init__(self, config: RunConfig, trainer: Trainer, tokenizer_hash: str = "") -> None:
        self.config = config
        self.trainer = trainer
        self.experts = ExpertPool(config.expert_iteration.keep_per_competition)
        self._tokenizer_hash = tokenizer_hash
        self._objective: Objective | None = None
        if config.objective != "expert_iteration":
            self._objective = objectives.of_config(config)

    @property
    def text(self) -> str:
        """What is printed at the start: objective, band, anchor, denominator."""
        return objective_text(self.config)

    def learn(self, step: int, episodes: Sequence[Episode], last: bool = False) -> Row:
        """Update the weights with a step's episodes; `last`: no step follows.

        Raises RecordError or ConfigError for a call that is not this run's training data, and
        DivergedError, before the weights change.
        """
        judged = usable(episodes)
        if self._objective is None:
            return self._imitate(step, judged, last)
        return self._follow(step, judged, self._objective)

    def diverged(self) -> Row:
        """Figures of a step whose update was refused."""
        name = "cispo" if self._objective is None else self.config.objective
        return {f"loss/{name}/loss": math.nan, "policy/grad_norm": math.nan}

    def _follow(self, step: int, judged: Sequence[Episode], objective: Objective) -> Row:
        config, trainer = self.config, self.trainer
        batch = make_batch(judged, config, objective.advantage_std, self._tokenizer_hash)
        lags = lag_metrics(judged, trainer.version)
        if judged and batch.advantages.zero_std_groups == batch.advantages.groups:
            print(
                f"warning: step {step}: no group has spread, nothing is learnt from it",
                file=sys.stderr,
                flush=True,
            )
        lr = trainer.warmup(step, config.optim.lr)
        stats = trainer.update(
            batch.samples,
            objective,
            lr=lr,
            temperature=config.rollout.temperature,
            seed=derive_seed(config.seed, step, "minibatches"),
        )
        loss = f"loss/{objective.name}"
        calls = len(batch.samples) + batch.masked
        return {
            "group/zero_std_frac": batch.advantages.zero_std_frac,
            f"{loss}/loss": stats.loss,
            f"{loss}/weight_mean": stats.weight_mean,
            f"{loss}/weight_max": stats.weight_max,
            f"{loss}/capped_frac": stats.capped_frac,
            "mismatch_kl/mean": stats.kl_mean,
            "mismatch_kl/max": stats.kl_max,
            "policy/entropy": stats.entropy,
            "policy/grad_norm": stats.grad_norm,
            "rollout/nonfinite_logprobs": float(stats.nonfinite),
            "rollout/masked_frac": batch.masked / calls if calls else 0.0,
            "optim/lr": lr,
            "optim/updates": float(len(stats.updates)),
            **lags,
            **stats.figures,
        }

    def _imitate(self, step: int, judged: Sequence[Episode], last: bool) -> Row:
        settings = self.config.expert_iteration
        for episode in judged:
            for call in episode.calls:
                check_call(call, self.config, self._tokenizer_hash)
        found = advantages_of(judged, rewards_to_go(judged, self.config), "batch")
        for episode in judged:
            if len(episode.calls) == len(episode.scripts) == 1:
                call, script = episode.calls[0], episode.scripts[0]
                self.experts.add(
                    episode.task,
                    script.script,
                    episode.reward.outcome,
                    call.prompt_ids,
                    call.response_ids,
                )
        row: Row = {
            "group/zero_std_frac": found.zero_std_frac,
            "policy/entropy": sampled_entropy(judged),
        }
        lr = self.trainer.warmup(step, settings.lr)
        steps = step if last else self.config.budget.steps
        if not round_ends(step, steps, settings.round_steps):
            return row | {"optim/lr": 0.0}
        drawn = self.experts.draw(
            seed=self.config.seed, step=step, updates=settings.updates, batch=settings.batch
        )
        if not drawn:
            return row | {"optim/lr": 0.0}
        batches = [
            [Sample(expert.prompt_ids, expert.response_ids, ()) for expert in batch]
            for batch in drawn
        ]
        loss, norm = self.trainer.imitate(batches, lr=lr)
        return row | {"loss/imitation": loss, "policy/grad_norm": norm, "optim/lr": lr}
