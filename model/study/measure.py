"""What one trained model is measured by, as plain numbers that can be added up.

Shapes: B rows, T tokens a row, N rows in all, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import CausalAttend
from model.moe import RoutingTape
from model.mtp import MTP, Shared, ahead
from model.study.batches import heldout_rows
from model.study.corpus import Corpus, Tokens
from model.study.costs import Plan
from model.study.probes import REACHES, TASKS, reach_class
from model.study.train import Joined, Trained
from model.transformer import Transformer

Floats = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int8]


@torch.no_grad()
def measure(plan: Plan, corpus: Corpus, trained: Trained) -> dict[str, Any]:
    """All measures of one run.

    `loss`: package → nats summed and targets counted, by class of position (how many windows of
    text stand before). `repeats`: the same for targets that repeat text, by class of distance.
    `probes`: task → right answers and answers, by class of distance. `load`: coefficient of
    variation and largest excess (max / mean − 1, MaxVio) of the experts' load over held-out text,
    mean over layers. `modules`: share of held-out tokens that each module predicts.
    """
    size, model = plan.size, trained.model
    rows = heldout_rows(size, corpus)
    joined = Joined(plan.config, size.rows, size.context, model.device)
    parts: list[Floats] = []
    loads: list[Tensor] = []
    hits: list[Tensor] = []
    for ids_BT, kept in _batches(rows.text, size.rows, model.device):
        tape = RoutingTape()
        hidden_BTH = joined.hidden(model, ids_BT, tape)
        nats_BT, _ = score(model, hidden_BTH, ids_BT)
        parts.append(nats_BT[:kept].double().cpu().numpy())
        loads.append(tape.load_LE.double())
        if trained.modules is not None:
            hits.append(_hits(model, trained.modules, hidden_BTH, ids_BT)[:, :kept].mean((1, 2)))
    nats_NT = np.concatenate(parts)
    right: list[Floats] = []
    for ids_BT, kept in _batches(rows.probes.ids, size.rows, model.device):
        _, right_BT = score(model, joined.hidden(model, ids_BT, None), ids_BT)
        right.append(right_BT[:kept].double().cpu().numpy())
    positions = [reach_class(t, size.window) for t in range(1, size.context)]
    position_T = np.array(positions, dtype=np.int8)
    names = np.array(rows.package)
    probe_rows = np.concatenate(right)
    reach = rows.probes.reach[:, 1:]
    return {
        "loss": {
            str(name): by_class(
                nats_NT[names == name],
                np.broadcast_to(position_T, nats_NT[names == name].shape),
                total="nats",
            )
            for name in dict.fromkeys(rows.package)
        },
        "repeats": by_class(nats_NT, rows.repeat[:, 1:], total="nats"),
        "probes": {
            task: by_class(
                probe_rows[rows.probes.task == i], reach[rows.probes.task == i], total="right"
            )
            for i, task in enumerate(TASKS)
        },
        "load": load_spread(torch.stack(loads).sum(0).cpu().numpy()),
        "modules": torch.stack(hits).mean(0).tolist() if hits else [],
    }


def score(model: Transformer, hidden_BTH: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each target (B, T−1), and whether it is the likeliest token."""
    target_BT = ids_BT[:, 1:]
    logits_MV = model.head(hidden_BTH[:, :-1]).flatten(0, 1)
    nats_M = F.cross_entropy(logits_MV, target_BT.flatten(), reduction="none")
    right_M = logits_MV.argmax(-1) == target_BT.flatten()
    return nats_M.view_as(target_BT), right_M.view_as(target_BT)


def by_class(values: Floats, classes: Classes, *, total: str) -> dict[str, list[float]]:
    """Sum of values and their number in each class; class −1 is left out."""
    sums = [float(values[classes == i].sum()) for i in range(len(REACHES))]
    counts = [int((classes == i).sum()) for i in range(len(REACHES))]
    return {total: [round(value, 3) for value in sums], "n": list(counts)}


def load_spread(load_LE: Floats) -> dict[str, float]:
    """Coefficient of variation and largest excess over the mean, averaged over layers."""
    share_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    return {
        "cv": round(float(share_LE.std(axis=1).mean()), 4),
        "max_violation": round(float((share_LE.max(axis=1) - 1).mean()), 4),
    }


def _batches(rows: Tokens, count: int, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    """Batches of `count` rows; the last is filled up with rows again, and says how many are new."""
    for start in range(0, len(rows), count):
        kept = min(count, len(rows) - start)
        chosen = [min(start + i, len(rows) - 1) for i in range(count)]
        yield torch.from_numpy(rows[chosen].astype(np.int64)).to(device), kept


def _hits(model: Transformer, modules: MTP, hidden_BTH: Tensor, ids_BT: Tensor) -> Tensor:
    """(modules, B, T − modules − 1): whether each module's likeliest token is the right one."""
    batch, time = ids_BT.shape
    shared, h_MH = Shared.of(model), hidden_BTH.flatten(0, 1)
    position_M = torch.arange(time, device=ids_BT.device).repeat(batch)
    found = []
    for i, module in enumerate(modules.layers, 1):
        attend = CausalAttend(modules.config, batch, time)
        h_MH = module(shared, h_MH, ahead(ids_BT, i).flatten(), position_M, attend)
        guess_BT = module.logits(shared, h_MH).argmax(-1).view(batch, time)
        found.append((guess_BT == ahead(ids_BT, i + 1))[:, : time - modules.count - 1])
    return torch.stack(found).double()
