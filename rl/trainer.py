"""One optimiser over the policy: policy-gradient updates and imitation updates.

The optimiser works in float32, whatever the model's weights are (`rl.masters`); the router's
selection bias is not trained. What computes a gradient is `rl.backward`; what is kept of a trainer,
`rl.trainer_state`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from model.transformer import Transformer
from rl import objectives
from rl.backward import Backward, Sums, backward_rows, rows_of, score_rows, trained_counts
from rl.config import OptimSection
from rl.errors import DivergedError
from rl.masters import MasterAdamW
from rl.objectives import Objective
from rl.samples import Sample, minibatches
from rl.trainer_state import TrainerState, read_info

MAX_NONFINITE_SHARE = 0.10
MAX_WEIGHT = 1e6


@dataclass(frozen=True)
class UpdateStats:
    """Figures of a step's updates: of the first one, before any change, but for `weight_max` and
    `capped_frac`, the worst of all. `updates` has each one's own sums, in order."""

    loss: float
    grad_norm: float
    tokens: int
    nonfinite: int
    weight_mean: float
    weight_max: float
    capped_frac: float
    kl_mean: float
    kl_max: float
    entropy: float
    updates: tuple[Sums, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


NO_UPDATE = UpdateStats(0.0, 0.0, 0, 0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)


class Trainer(TrainerState):
    """AdamW over a `Transformer` that is also the one that generates (weights change in place)."""

    def __init__(
        self,
        model: Transformer,
        optim: OptimSection,
        backward: Backward = backward_rows,
        budget: int | None = None,
    ) -> None:
        """`backward` computes gradients, in pieces of `budget` (default: `optim.micro_batch`)."""
        super().__init__(model, MasterAdamW(list(model.parameters()), optim))
        self.optim = optim
        self.backward = backward
        self.budget = budget or optim.micro_batch

    def warmup(self, step: int, lr: float) -> float:
        """Linear warm-up over steps (from 1), then constant."""
        return lr * min(1.0, step / self.optim.warmup_steps) if self.optim.warmup_steps else lr

    def update(
        self,
        samples: Sequence[Sample],
        objective: Objective,
        *,
        lr: float,
        temperature: float,
        seed: int = 0,
    ) -> UpdateStats:
        """`updates_per_batch` optimiser updates over minibatches drawn with `seed`.

        Non-finite recorded log-probs are masked and counted. DivergedError on a non-finite loss or
        gradient, before the weights change; and when over a tenth of the recorded log-probs are not
        finite. Without a trained token nothing happens, and the version stays.
        """
        tokens, _, nonfinite = trained_counts(samples)
        if nonfinite > MAX_NONFINITE_SHARE * (tokens + nonfinite):
            raise DivergedError(f"{nonfinite} recorded log-probs are not finite; lower optim.lr")
        if nonfinite:
            print(
                f"warning: {nonfinite} of {tokens + nonfinite} recorded log-probs are not finite; "
                "their tokens are not trained",
                file=sys.stderr,
                flush=True,
            )
        if tokens == 0:
            return NO_UPDATE
        done: list[Sums] = []
        norms: list[float] = []
        plan = minibatches(samples, self.optim.updates_per_batch, self.optim.passes, seed)
        for part in plan:
            if trained_counts(part)[0] == 0:
                continue
            sums = self.backward(self.model, part, objective, temperature, self.budget)
            norms.append(self._step(sums.loss, lr))
            done.append(sums)
        self.version += 1
        return _stats(done, norms[0], tokens, nonfinite)

    def cispo_update(
        self,
        samples: Sequence[Sample],
        *,
        lr: float,
        is_weight_max: float,
        temperature: float,
    ) -> UpdateStats:
        """`update` with CISPO."""
        objective = objectives.cispo(is_weight_max)
        return self.update(samples, objective, lr=lr, temperature=temperature)

    def imitate(
        self, batches: Sequence[Sequence[Sample]], *, lr: float, temperature: float = 1.0
    ) -> tuple[float, float]:
        """One update a batch: mean −log p of the response ids. Returns the mean loss (nats a token)
        and the mean gradient norm. DivergedError as in `update`."""
        losses, norms = [], []
        for samples in batches:
            denominator = sum(len(s.response_ids) for s in samples)
            order = sorted(samples, key=lambda s: -s.length)
            loss_value = 0.0
            for i in range(0, len(order), self.optim.micro_batch):
                rows = rows_of(order[i : i + self.optim.micro_batch], self.model)
                scores = score_rows(self.model, rows, temperature)
                loss = -(scores.logp_BT * rows.mask).sum() / denominator
                loss.backward()  # type: ignore[no-untyped-call]
                loss_value += float(loss.detach())
            norms.append(self._step(loss_value, lr))
            losses.append(loss_value)
        self.version += 1
        return sum(losses) / len(losses), sum(norms) / len(norms)

    def _step(self, loss: float, lr: float) -> float:
        norm = float(self._optimizer.clip())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._optimizer.forget()
            raise DivergedError(
                f"loss {loss}, gradient norm {norm} at policy version {self.version}; "
                "lower optim.lr"
            )
        self._optimizer.step(lr)
        self._optimizer.forget()
        return norm

    @torch.no_grad()
    def check_alive(self, prompts: Sequence[Sequence[int]]) -> None:
        """Finite weights may still make non-finite logits: look before anything is sampled.

        DivergedError if the logits after one of the prompts are not finite, or a weight is beyond
        `MAX_WEIGHT`.
        """
        largest = max(float(p.abs().max()) for p in self.model.parameters())
        if not largest <= MAX_WEIGHT:
            raise DivergedError(f"a weight has grown to {largest:.3g}; lower optim.lr")
        for ids in prompts:
            logits_BTV = self.model(torch.tensor([list(ids)], device=self.model.device))
            if not bool(logits_BTV[0, -1].isfinite().all()):
                raise DivergedError(
                    f"the policy's logits are not finite at version {self.version}; lower optim.lr"
                )


def _stats(done: Sequence[Sums], norm: float, tokens: int, nonfinite: int) -> UpdateStats:
    first = done[0]
    return UpdateStats(
        loss=first.loss,
        grad_norm=norm,
        tokens=tokens,
        nonfinite=nonfinite,
        weight_mean=first.weight_sum / first.tokens,
        weight_max=max(s.weight_max for s in done),
        capped_frac=max(s.capped / s.tokens for s in done),
        kl_mean=first.kl_sum / first.tokens,
        kl_max=first.kl_max,
        entropy=first.entropy_sum / first.tokens,
        updates=tuple(done),
        figures=first.figures,
    )


__all__ = ["NO_UPDATE", "Sample", "Trainer", "UpdateStats", "read_info"]
