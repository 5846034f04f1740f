"""The rows of each training step and of the measurements, on the device before a run starts.

Which text a row holds and which tasks are written depend on the seed alone, so variants of one
seed read the same rows in the same order; a longer run begins with those of a shorter one.
Shapes: S steps, B rows a step, T tokens a row, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.errors import ModelError
from model.study.corpus import Corpus, Package, Tokens
from model.study.probes import ProbeRows, make_rows, reach_class
from model.study.variants import Size

_REPEATED = 4
_MEASURED = 10**6  # seed of what is measured: the same for all runs


@dataclass(frozen=True)
class Batch:
    """`ids_BT`, and `weight_BT` of each target in the loss: entry t is for predicting token t.

    Text rows weigh 1 together, the answers of probe rows `Size.probe_weight` together; nothing else
    of probe rows counts, because keys and values cannot be predicted.
    """

    ids_BT: Tensor
    weight_BT: Tensor
    text_rows: int


class Batches:
    """All batches of one run."""

    def __init__(
        self, size: Size, corpus: Corpus, seed: int, steps: int, device: torch.device
    ) -> None:
        self.size = size
        self.text_rows = size.rows - size.probe_rows
        tokens = train_tokens(corpus)
        starts = row_starts(len(tokens), size.context, steps * self.text_rows, seed)
        self.starts_SB = torch.from_numpy(starts).view(steps, self.text_rows).to(device)
        self.text = torch.from_numpy(tokens.astype(np.int32)).to(device)
        self.column_T = torch.arange(size.context, device=device)
        short = min(steps, size.short_steps)
        self.probes = [
            _Probes(probe_rows(shape, corpus, seed, count * shape.probe_rows), device)
            for shape, count in ((size.short, short), (size, steps - short))
            if count
        ]

    def __getitem__(self, step: int) -> Batch:
        short = step < self.size.short_steps
        shape = self.size.short if short else self.size
        text_BT = self.text[self.starts_SB[step][:, None] + self.column_T]
        text_BT = text_BT.view(-1, shape.context)
        probes = self.probes[0 if short else -1]
        first = (step if short else step - self.size.short_steps) * shape.probe_rows
        ids_BT = torch.cat([text_BT, probes.ids_NT[first : first + shape.probe_rows]]).long()
        answers_BT = probes.answers_NT[first : first + shape.probe_rows].float()
        weights = [
            torch.ones_like(text_BT, dtype=torch.float32) / (text_BT.numel() - len(text_BT)),
            answers_BT * (shape.probe_weight / answers_BT.sum().clamp_min(1)),
        ]
        return Batch(ids_BT, torch.cat(weights), len(text_BT))


class _Probes:
    """Probe rows on the device, and which of their tokens are answers."""

    def __init__(self, rows: ProbeRows, device: torch.device) -> None:
        self.ids_NT = torch.from_numpy(rows.ids.astype(np.int32)).to(device)
        self.answers_NT = torch.from_numpy(rows.reach >= 0).to(device)


def row_starts(tokens: int, context: int, rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Where each row starts: all places of a grid in drawn order, then of a shifted grid, …

    Raises ModelError for a corpus shorter than two rows.
    """
    if tokens < 2 * context:
        raise ModelError(f"the corpus has {tokens} tokens of training; a row takes {context}")
    draw = np.random.default_rng(seed)
    parts: list[npt.NDArray[np.int64]] = []
    made = 0
    while made < rows:
        shift = int(draw.integers(context))
        grid = np.arange(shift, tokens - context + 1, context)
        parts.append(draw.permutation(grid))
        made += len(grid)
    return np.concatenate(parts)[:rows].astype(np.int64)


@lru_cache(maxsize=1)
def train_tokens(corpus: Corpus) -> Tokens:
    """The train split as one array."""
    return corpus.train_tokens()


@lru_cache(maxsize=4)
def probe_rows(size: Size, corpus: Corpus, seed: int, count: int) -> ProbeRows:
    """Training rows with tasks; their text is drawn apart from that of text rows."""
    tokens = train_tokens(corpus)
    draw = np.random.default_rng([seed, 1])
    starts = draw.integers(len(tokens) - size.context, size=count)
    text = tokens[starts[:, None] + np.arange(size.context)]
    return make_rows(text, window=size.window, seed=seed, heldout=False, vocabulary=size.vocabulary)


@dataclass(frozen=True)
class Heldout:
    """Rows of held-out text, each within one package, and measured rows with tasks.

    `repeat` (N, T) is the class of distance (as of probes) to the last place where a token and the
    three before it stood already, else -1: retrieval as it occurs in real text.
    """

    text: Tokens
    package: tuple[str, ...]
    repeat: npt.NDArray[np.int8]
    probes: ProbeRows


@lru_cache(maxsize=1)
def heldout_rows(size: Size, corpus: Corpus) -> Heldout:
    """What every run is measured on. Packages give rows in turns, until there are enough."""
    rows: list[Tokens] = []
    names: list[str] = []
    packages = corpus.split("heldout")
    longest = max(package.end - package.start for package in packages)
    for place in range(0, longest - size.context + 1, size.context):
        for package in packages:
            if len(rows) < size.eval_rows and _fits(package, place, size.context):
                start = package.start + place
                rows.append(np.asarray(corpus.tokens[start : start + size.context]))
                names.append(package.name)
    if not rows:
        raise ModelError(f"no held-out package has a row of {size.context} tokens")
    draw = np.random.default_rng(_MEASURED)
    count = 4 * size.eval_probe_rows
    text = np.stack(rows)
    background = text[draw.integers(len(text), size=count)]
    probes = make_rows(
        background, window=size.window, seed=_MEASURED, heldout=True, vocabulary=size.vocabulary
    )
    repeat = np.stack([repeats(row, size.window) for row in text])
    return Heldout(text, tuple(names), repeat, probes)


def repeats(ids_T: Tokens, window: int) -> npt.NDArray[np.int8]:
    """See `Heldout.repeat`, of one row."""
    out = np.full(len(ids_T), -1, dtype=np.int8)
    last: dict[tuple[int, ...], int] = {}
    ids = ids_T.tolist()
    for t in range(_REPEATED - 1, len(ids)):
        words = tuple(ids[t - _REPEATED + 1 : t + 1])
        if words in last:
            out[t] = reach_class(t - last[words], window)
        last[words] = t
    return out


def _fits(package: Package, place: int, context: int) -> bool:
    return package.start + place + context <= package.end
