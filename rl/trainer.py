"""One optimiser over the policy: CISPO updates and imitation updates, and their durable state.

Shape legend: B rows, T tokens (right-padded). The optimiser works in float32, whatever the model's
weights are (`rl.masters`); the router's selection bias is not trained.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import save_checkpoint
from model.scoring import TokenScores, score_tokens
from model.transformer import Transformer
from rl.cispo import cispo_terms
from rl.config import OptimSection
from rl.errors import CheckpointStateError, DivergedError
from rl.masters import MasterAdamW
from rl.objectives import Terms

MAX_NONFINITE_SHARE = 0.10
MAX_WEIGHT = 1e6
STATE_FILE = "state.safetensors"
INFO_FILE = "trainer.json"


@dataclass(frozen=True)
class Sample:
    """One call to train on: ids = prompt + response, one recorded log-prob a response id."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float = 0.0

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class UpdateStats:
    """Figures of a step's updates; log-prob figures are of the first pass, before any change."""

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


@dataclass(frozen=True)
class _Batch:
    ids: Tensor
    lengths: Tensor
    mask: Tensor
    rollout: Tensor
    advantage: Tensor


class Trainer:
    """AdamW over a `Transformer` that is also the one that generates (weights change in place)."""

    def __init__(self, model: Transformer, optim: OptimSection) -> None:
        self.model = model
        self.optim = optim
        self.version = 0
        self._names = [name for name, _ in model.named_parameters()]
        self._optimizer = MasterAdamW(list(model.parameters()), optim)

    # -------------------------------------------------------------- updates

    def warmup(self, step: int, lr: float) -> float:
        """Linear warm-up over steps (from 1), then constant."""
        return lr * min(1.0, step / self.optim.warmup_steps) if self.optim.warmup_steps else lr

    def cispo_update(
        self,
        samples: Sequence[Sample],
        *,
        lr: float,
        is_weight_max: float,
        temperature: float,
    ) -> UpdateStats:
        """`updates_per_batch` optimiser updates, each over all samples.

        The denominator is counted before the first backward pass. Non-finite recorded log-probs are
        masked and counted. DivergedError on a non-finite loss or gradient, before the weights
        change; and when over a tenth of the recorded log-probs are not finite.
        """
        nonfinite = sum(not math.isfinite(x) for s in samples for x in s.logprobs)
        denominator = sum(len(s.response_ids) for s in samples) - nonfinite
        if nonfinite > MAX_NONFINITE_SHARE * (denominator + nonfinite):
            raise DivergedError(f"{nonfinite} recorded log-probs are not finite; lower optim.lr")
        if denominator == 0:
            return UpdateStats(0.0, 0.0, 0, 0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
        order = sorted(samples, key=lambda s: -s.length)
        size = self.optim.micro_batch
        batches = [self._batch(order[i : i + size]) for i in range(0, len(order), size)]
        first: UpdateStats | None = None
        worst_weight, capped, norm = 0.0, 0.0, 0.0
        for _ in range(self.optim.updates_per_batch):
            terms, entropy = [], 0.0
            for batch in batches:
                scores = self._score(batch, temperature)
                term = cispo_terms(
                    scores.logp_BT,
                    batch.rollout,
                    batch.advantage,
                    batch.mask,
                    is_weight_max=is_weight_max,
                    denominator=denominator,
                )
                term.loss.backward()  # type: ignore[no-untyped-call]
                entropy += float(scores.entropy_BT.sum())
                terms.append(term)
            norm = self._step(sum(float(t.loss.detach()) for t in terms), lr)
            stats = _stats(terms, norm, denominator, nonfinite, entropy)
            first = first or stats
            worst_weight = max(worst_weight, stats.weight_max)
            capped = max(capped, stats.capped_frac)
        assert first is not None
        self.version += 1
        return UpdateStats(
            **{
                **first.__dict__,
                "weight_max": worst_weight,
                "capped_frac": capped,
                "grad_norm": norm if self.optim.updates_per_batch == 1 else first.grad_norm,
            }
        )

    def imitate(
        self, batches: Sequence[Sequence[Sample]], *, lr: float, temperature: float = 1.0
    ) -> tuple[float, float]:
        """One update a batch: mean −log p of the response ids. Returns the mean loss (nats a token)
        and the mean gradient norm. DivergedError as in `cispo_update`."""
        losses, norms = [], []
        for rows in batches:
            denominator = sum(len(s.response_ids) for s in rows)
            order = sorted(rows, key=lambda s: -s.length)
            loss_value = 0.0
            for i in range(0, len(order), self.optim.micro_batch):
                batch = self._batch(order[i : i + self.optim.micro_batch])
                scores = self._score(batch, temperature)
                loss = -(scores.logp_BT * batch.mask).sum() / denominator
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

    def _score(self, batch: _Batch, temperature: float) -> TokenScores:
        # one number a row, in the logits' own type: exact in float64 too
        temperature_B = torch.full(
            (len(batch.ids),), temperature, dtype=self.model.dtype, device=self.model.device
        )
        return score_tokens(
            self.model,
            batch.ids,
            batch.lengths,
            temperature=temperature_B,
            wanted_BT=batch.mask,
        )

    def _batch(self, rows: Sequence[Sample]) -> _Batch:
        width = max(s.length for s in rows)
        dtype = self.model.dtype
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        rollout = torch.zeros(len(rows), width, dtype=torch.float64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for b, s in enumerate(rows):
            start, end = len(s.prompt_ids), s.length
            ids[b, :end] = torch.from_numpy(np.array(s.prompt_ids + s.response_ids))
            if s.logprobs:  # imitated scripts have none
                rollout[b, start:end] = torch.from_numpy(np.array(s.logprobs))
            mask[b, start:end] = True
        mask &= rollout.isfinite()
        device = self.model.device
        return _Batch(
            ids.to(device),
            torch.tensor([s.length for s in rows], device=device),
            mask.to(device),
            rollout.to(device, dtype),
            torch.tensor([s.advantage for s in rows], device=device, dtype=dtype),
        )

    # -------------------------------------------------------------- state

    def save(
        self,
        folder: Path,
        info: dict[str, Any],
        *,
        tokenizer_from: Path,
        with_state: bool,
        metadata: dict[str, Any],
    ) -> None:
        """Fill `folder`: bf16 weights in Hugging Face layout; `trainer/` with exact float32 weights
        and both moments (only `with_state`) and `trainer.json` = `info` + version."""
        weights = folder / "weights"
        save_checkpoint(self.model, weights, tokenizer_from=tokenizer_from, metadata=metadata)
        for path in weights.iterdir():
            path.rename(folder / path.name)
        weights.rmdir()
        trainer = folder / "trainer"
        trainer.mkdir()
        if with_state:
            save_file(self._tensors(), trainer / STATE_FILE)
            _fsync_file(trainer / STATE_FILE)
        moments = self._optimizer.moments(0)
        step = float(moments["step"]) if moments else 0
        text = json.dumps(info | {"version": self.version, "optimizer_step": step})
        (trainer / INFO_FILE).write_text(text + "\n", encoding="utf-8")
        _fsync_file(trainer / INFO_FILE)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote, return its `info`; CheckpointStateError says what is off."""
        info = read_info(folder)
        path = folder / "trainer" / STATE_FILE
        if not path.is_file():
            raise CheckpointStateError(
                f"{path} is missing: the checkpoint can be served or started from, not resumed"
            )
        tensors = load_file(path)
        for name, tensor in self._exact_weights():
            stored = tensors.get(f"weight.{name}")
            if stored is None or stored.shape != tensor.shape:
                raise CheckpointStateError(f"{path}: no tensor weight.{name} of that shape")
        step = torch.tensor(float(info["optimizer_step"]))
        for index, name in enumerate(self._names):
            moments = None  # where nothing was updated before the checkpoint
            if f"exp_avg.{name}" in tensors:
                keys = ("exp_avg", "exp_avg_sq")
                moments = {"step": step.clone()} | {key: tensors[f"{key}.{name}"] for key in keys}
            self._optimizer.restore(index, tensors[f"weight.{name}"], moments)
        for name, buffer in self._biases():
            buffer.copy_(tensors[f"weight.{name}"])
        self.version = int(info["version"])
        return info

    def _exact_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self._names, self._optimizer.masters, strict=True)
        yield from self._biases()

    def _biases(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                yield name, buffer

    def _tensors(self) -> dict[str, Tensor]:
        out = {
            f"weight.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in self._exact_weights()
        }
        for index, name in enumerate(self._names):
            for key, moment in (self._optimizer.moments(index) or {}).items():
                if key != "step":
                    out[f"{key}.{name}"] = moment.detach().cpu().contiguous()
        return out


def read_info(folder: Path) -> dict[str, Any]:
    """`trainer.json` of a step checkpoint."""
    path = folder / "trainer" / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointStateError(f"{path}: unreadable; remove this checkpoint") from error
    if not isinstance(info, dict):
        raise CheckpointStateError(f"{path}: not a JSON object; remove this checkpoint")
    return info


def _stats(
    terms: Sequence[Terms], norm: float, denominator: int, nonfinite: int, entropy: float
) -> UpdateStats:
    return UpdateStats(
        loss=sum(float(t.loss.detach()) for t in terms),
        grad_norm=norm,
        tokens=denominator,
        nonfinite=nonfinite,
        weight_mean=sum(t.weight_sum for t in terms) / denominator,
        weight_max=max(t.weight_max for t in terms),
        capped_frac=sum(t.capped for t in terms) / denominator,
        kl_mean=sum(t.kl_sum for t in terms) / denominator,
        kl_max=max(t.kl_max for t in terms),
        entropy=entropy / denominator,
    )


def _fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
