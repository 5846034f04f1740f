"""The supervised loop: loss on reply tokens, float32 masters with a bf16 copy, cosine schedule.

Experts are kept in use by a sign update of the router's selection bias after every step
(`Transformer.balance`), whose size follows the learning rate: it steers selection only, so the
language loss keeps its gradient and no auxiliary loss is needed.

Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import copy
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from model.moe import MoE
from model.scoring import score_tokens
from model.transformer import Transformer
from rl.errors import DivergedError
from rl.sft_config import SftConfig
from rl.sft_data import Examples, MicroBatch, Mixer, pad_rows


@dataclass(frozen=True)
class Prepared:
    """Data of one source: what is trained on, and samples never trained on."""

    name: str
    train: Examples
    fresh: Examples
    share: float
    token_weight: float


# ------------------------------------------------------------------ loss


@dataclass(frozen=True)
class DeviceBatch:
    """`MicroBatch` on the device."""

    ids: Tensor
    lengths: Tensor
    prompt: Tensor
    weight: Tensor


def to_device(batch: MicroBatch, device: torch.device) -> DeviceBatch:
    """Copy; from pinned memory on CUDA, so that the copy overlaps computing."""

    def move(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return DeviceBatch(move(batch.ids), move(batch.lengths), move(batch.prompt), move(batch.weight))


def supervised_loss(model: Transformer, batch: DeviceBatch) -> Tensor:
    """Σ weight · −log p(reply token) over the micro-batch (not divided).

    The head is computed at predictors of reply tokens only, in float32.
    """
    column_T = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    reply_BT = (column_T >= batch.prompt[:, None]) & (column_T < batch.lengths[:, None])
    scores = score_tokens(model, batch.ids, batch.lengths, wanted_BT=reply_BT)
    return -(scores.logp_BT * batch.weight[:, None]).sum()


@torch.no_grad()
def fresh_loss(model: Transformer, examples: Examples, micro_tokens: int) -> float:
    """Mean −log p a reply token (nats) over examples never trained on."""
    order = sorted(range(len(examples)), key=lambda i: -int(examples.lengths[i]))
    total, tokens, first = 0.0, 0, 0
    while first < len(order):
        width = int(examples.lengths[order[first]])
        rows = order[first : first + max(1, micro_tokens // width)]
        batch = pad_rows([(examples, i, 1.0) for i in rows], width)
        total += float(supervised_loss(model, to_device(batch, model.device)))
        tokens += int(batch.denominator)
        first += len(rows)
    return total / max(1, tokens)


# ------------------------------------------------------------------ training


class Precision:
    """float32 master weights, and the model that computes: a bf16 copy, or the master itself.

    Gradients of every micro-batch are added up in float32. The router stays float32 in both.
    """

    def __init__(self, master: Transformer, bf16: bool) -> None:
        self.master = master
        self.compute = copy.deepcopy(master).cast(torch.bfloat16) if bf16 else master
        self._masters: list[Tensor] = list(master.parameters())
        self._copies: list[Tensor] = list(self.compute.parameters())
        self.compute.track_load(True)

    def collect(self) -> None:
        """Move the gradients of one backward pass to the master."""
        if self.compute is self.master:
            return
        for master, copied in zip(self._masters, self._copies, strict=True):
            if copied.grad is None:
                continue
            if master.grad is None:
                master.grad = copied.grad.float()
            else:
                master.grad += copied.grad
            copied.grad = None

    @torch.no_grad()
    def publish(self, balance_rate: float) -> None:
        """After an optimiser step: balance the routers, copy the weights to the computing model."""
        self.compute.balance(balance_rate)
        if self.compute is self.master:
            return
        torch._foreach_copy_(self._copies, self._masters)
        for mine, theirs in zip(self.master.buffers(), self.compute.buffers(), strict=True):
            mine.copy_(theirs)

    def load_max(self) -> float:
        """Largest load of an expert since the last step over the mean load (1 = even)."""
        loads = [m.load_E for m in self.compute.modules() if isinstance(m, MoE)]
        ratios = [
            load.max() / load.float().mean().clamp_min(1) for load in loads if load is not None
        ]
        return float(torch.stack(ratios).max())


class Prefetch:
    """Builds batches in a background thread so that the device never waits for padding."""

    def __init__(self, mixer: Mixer, steps: int, depth: int = 4) -> None:
        self._queue: queue.Queue[list[MicroBatch]] = queue.Queue(depth)
        self._mixer, self._steps = mixer, steps
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        for _ in range(self._steps):
            batch = self._mixer.next()
            while not self._stop.is_set():
                try:
                    self._queue.put(batch, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if self._stop.is_set():
                return

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for _ in range(self._steps):
            yield self._queue.get(timeout=120)

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)


def learning_rate(config: SftConfig, step: int, progress: float) -> float:
    """Linear warm-up over steps, then cosine in `progress` (0 … 1) to `final_lr_frac · lr`."""
    optim = config.optim
    low = optim.final_lr_frac
    rate = optim.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    return rate * warm


def make_optimizer(model: Transformer, config: SftConfig) -> torch.optim.AdamW:
    """Decay on matrices only (not on norms)."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.dim() >= 2],
            "weight_decay": config.optim.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.optim.lr,
        betas=config.optim.betas,
        eps=config.optim.eps,
        fused=model.device.type == "cuda",
    )


@dataclass(frozen=True)
class SftResult:
    """`fresh` holds the loss (nats a reply token) on held-back samples, a source each."""

    steps: int
    seconds: float
    tokens: int
    train_loss: float
    fresh: dict[str, float]
    expert_load_max: float


def train(
    model: Transformer, sources: Sequence[Prepared], config: SftConfig, log: TextIO
) -> SftResult:
    """The loop; `log` gets a JSON line every `log_every` steps. DivergedError if not finite."""
    on_cuda = model.device.type == "cuda"
    bf16 = config.precision == "bf16" or (config.precision == "auto" and on_cuda)
    precision = Precision(model, bf16)
    optimizer = make_optimizer(model, config)
    mixer = Mixer(
        [(s.train, s.share, s.token_weight) for s in sources],
        batch=config.batch,
        micro_tokens=config.micro_tokens,
        seed=config.seed,
    )
    prefetch = Prefetch(mixer, config.steps)
    started = time.monotonic()
    mean_loss, load_max, tokens, step = math.nan, math.nan, 0, 0
    window: list[Tensor] = []
    fresh: dict[str, float] = {}
    try:
        for step, batches in enumerate(prefetch, 1):
            progress = (step - 1) / config.steps
            if config.time_limit_s is not None:
                progress = max(progress, (time.monotonic() - started) / config.time_limit_s)
            rate = learning_rate(config, step - 1, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            denominator = sum(batch.denominator for batch in batches)
            step_loss = torch.zeros((), device=model.device)
            for batch in batches:
                loss = supervised_loss(precision.compute, to_device(batch, model.device))
                loss = loss / denominator
                loss.backward()  # type: ignore[no-untyped-call]
                precision.collect()
                step_loss += loss.detach()
                tokens += int((batch.lengths - batch.prompt).sum())
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            window.append(step_loss)
            last = step == config.steps or progress >= 1.0
            # the host looks at the device only when a line is due: no step waits for another
            due = step % config.log_every == 0 or last
            load_max = precision.load_max() if due else load_max
            precision.publish(config.balance_rate * rate / config.optim.lr)
            if due:
                mean_loss = float(torch.stack(window).mean())
                window.clear()
                if not math.isfinite(mean_loss):
                    raise DivergedError(f"loss is {mean_loss} at step {step}; lower optim.lr")
                evaluate = step % config.eval_every < config.log_every or last
                if evaluate:
                    fresh = {
                        f"fresh_loss/{s.name}": fresh_loss(
                            precision.compute, s.fresh, config.micro_tokens
                        )
                        for s in sources
                    }
                row = {"step": step, "t": time.time(), "loss": mean_loss, "grad_norm": float(norm)}
                row |= {"lr": rate, "expert_load_max": load_max}
                row |= {"tokens_per_s": tokens / (time.monotonic() - started)}
                _emit(log, row | fresh if evaluate else row)
            if last:
                break
    finally:
        prefetch.close()
    return SftResult(step, time.monotonic() - started, tokens, mean_loss, fresh, load_max)


def _emit(log: TextIO, row: Mapping[str, float]) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()
    shown = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "t"))
    print(f"step {row['step']} {shown}", file=sys.stderr, flush=True)
