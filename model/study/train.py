"""Training of one variant and seed: bf16 weights with float32 masters on a GPU, else float32.

Shapes: B rows, T tokens a row, M = B·T, H hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attend, CausalAttend
from model.config import WINDOW, ModelConfig
from model.errors import ModelError
from model.moe import MoE, RoutingTape
from model.mtp import MTP, MTPSchedule, mtp_loss
from model.study.batches import Batch, Batches
from model.study.corpus import Corpus
from model.study.costs import Plan
from model.study.variants import Size, full_config
from model.transformer import Transformer
from model.visible import VisibleAttend, row_visibility

_LAST_RATE = 0.05  # of the peak
_CURVE_POINTS = 24


@dataclass(frozen=True)
class Trained:
    """A trained model, its modules if any, and (step, loss of text, loss of answers) on the way."""

    model: Transformer
    modules: MTP | None
    curve: list[tuple[int, float, float]]
    seconds: float


class Joined:
    """Rows of equal length in one flat pass: positions, and who sees whom in a model's layers."""

    def __init__(self, config: ModelConfig, rows: int, context: int, device: torch.device) -> None:
        self.shape = (rows, context)
        self.position_M = torch.arange(context, device=device).repeat(rows)
        self.attend: Attend = CausalAttend(config, rows, context)
        if WINDOW in config.attn_type_list and device.type == "cuda":
            visible = row_visibility(torch.full((rows,), context, device=device))
            self.attend = VisibleAttend(visible, config)

    def hidden(self, model: Transformer, ids_BT: Tensor, tape: RoutingTape | None) -> Tensor:
        """Normed hidden states (B, T, H)."""
        x_MH = model.run(ids_BT.flatten(), self.position_M, self.attend, tape)
        return x_MH.view(*self.shape, -1)


class Masters:
    """AdamW on float32 copies of the weights that are shorter, on the weights themselves else."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.weights = list(weights)
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for p in self.weights
        ]
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": 0.1},
            {"params": [m for m in self.masters if m.dim() == 1], "weight_decay": 0.0},
        ]
        cuda = self.weights[0].is_cuda
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=cuda or None)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Clip the gradient to norm 1, take one step, and write the weights from the masters."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)
            master.grad = None


def rate_at(size: Size, step: int, steps: int) -> float:
    """Learning rate: linear warm-up, constant, linear decay."""
    warm = max(1, round(size.warmup * steps))
    decay = max(1, round(size.decay * steps))
    left = (steps - step) / decay
    return size.rate * min((step + 1) / warm, 1.0, _LAST_RATE + (1 - _LAST_RATE) * left)


def new_model(plan: Plan, seed: int, device: torch.device) -> tuple[Transformer, MTP | None]:
    """Fresh weights, and modules, the same for one seed and shape."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer(plan.config, seed=seed).cast(dtype).to(device)
    modules = None
    if plan.variant.mtp:
        modules = MTP(plan.config, plan.variant.mtp, seed=seed).cast(dtype).to(device)
    return model, modules


def layers_of_experts(model: Transformer, modules: MTP | None) -> list[MoE]:
    """The experts of the model's layers and of its modules."""
    found = [layer.block_sparse_moe for layer in model.layers]
    return found + [m.block.block_sparse_moe for m in modules.layers] if modules else found


def train(
    plan: Plan,
    corpus: Corpus,
    seed: int,
    device: torch.device,
    note: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train a fresh model of this plan. Raises ModelError where the loss stops being finite."""
    batches = Batches(plan.size, corpus, seed, plan.steps, device)
    model, modules = new_model(plan, seed, device)
    steps = stepper(plan, batches, model, modules)
    curve: list[tuple[int, float, float]] = []
    every = max(1, plan.steps // _CURVE_POINTS)
    start = time.perf_counter()
    for step, (text, answers) in enumerate(steps):
        if step % every == 0 or step == plan.steps - 1:
            curve.append((step, round(text.item(), 4), round(answers.item(), 4)))
            if not curve[-1][1] < float("inf"):
                raise ModelError(
                    f"{plan.variant.name}, seed {seed}: the loss at step {step} is {curve[-1][1]}; "
                    "lower the size's rate"
                )
            note(f"step {step}/{plan.steps} text {curve[-1][1]:.3f} answers {curve[-1][2]:.3f}")
    seconds = time.perf_counter() - start
    return Trained(model, modules, curve, seconds)


def stepper(
    plan: Plan, batches: Batches, model: Transformer, modules: MTP | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Take the plan's steps; after each, the mean losses of text and of answers (on the device)."""
    size, variant, device = plan.size, plan.variant, model.device
    kinds = {False: full_config(plan.config), True: plan.config}  # by whether it is converted
    joined = {
        (shape.rows, after): Joined(config, shape.rows, shape.context, device)
        for shape in (size.short, size)
        for after, config in kinds.items()
    }
    masters = Masters([*model.parameters(), *(modules.parameters() if modules else ())])
    experts = layers_of_experts(model, modules)
    for layer in experts:
        layer.track_load(variant.bias_rate > 0)
    schedule = MTPSchedule(steps=plan.steps, decay_steps=round(size.decay * plan.steps))
    converted = round(variant.convert_at * plan.steps)
    for step in range(plan.steps):
        batch = batches[step]
        tape = RoutingTape() if variant.aux else None
        rows = joined[len(batch.ids_BT), step >= converted]
        hidden_BTH = rows.hidden(model, batch.ids_BT, tape)
        text, answers = losses(model, hidden_BTH, batch)
        loss = text + answers
        if tape is not None:
            loss = loss + variant.aux * tape.aux_loss
        if modules is not None:
            loss = loss + schedule.weight(step) * _modules_loss(model, modules, hidden_BTH, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        masters.step(rate_at(size, step, plan.steps))
        if variant.bias_rate:
            for layer in experts:
                layer.balance(variant.bias_rate)
        yield text.detach(), answers.detach()


def losses(model: Transformer, hidden_BTH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy (nats) of text and of answers."""
    target_BT = batch.ids_BT[:, 1:]
    logits_MV = model.head(hidden_BTH[:, :-1]).flatten(0, 1)
    loss_M = F.cross_entropy(logits_MV, target_BT.flatten(), reduction="none")
    weighted_BT = loss_M.view_as(target_BT) * batch.weight_BT[:, 1:]
    return weighted_BT[: batch.text_rows].sum(), weighted_BT[batch.text_rows :].sum()


def _modules_loss(model: Transformer, modules: MTP, hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """Of text rows only: what follows in a probe row cannot be predicted."""
    rows = batch.text_rows
    ids_BT = batch.ids_BT[:rows]
    lengths_B = torch.full((rows,), ids_BT.shape[1], device=ids_BT.device)
    return mtp_loss(model, modules, hidden_BTH[:rows], ids_BT, lengths_B)
