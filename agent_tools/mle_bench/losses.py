"""Per-row losses of a few entries of a field: enough to test its ranks without the data.

`losses.npz` of a competition holds the entries at the gold, silver, bronze and median ranks, and
the two outside solutions, `strong` and `default`. It has no labels and no row ids: rows are
shuffled by the system's randomness, alike for all entries. Means over many losses of one row
group are kept where a competition has more test rows than it has independent ones (`block`).

Shapes: E entries, n rows, p positives, m negatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from agent_tools.errors import UserError
from agent_tools.mle_bench.medals import medal_ranks
from agent_tools.mle_bench.metrics import LOWER_IS_BETTER, Array

LOSSES_FILE = "losses.npz"
Name = Literal["gold", "silver", "bronze", "median", "strong", "default"]
NAMES: tuple[Name, ...] = get_args(Name)
SAMPLES = 2_000
_EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Losses:
    """`rows` (E, n), or for AUC `rows` (E, p) and `negatives` (E, m): placement values.

    A positive's placement is the share of negatives that score below it, a negative's the share
    of positives that score above it, ties counted half; the mean of either is the AUC.
    """

    metric: str
    rows: Array
    negatives: Array | None = None

    def score(self, name: Name) -> float:
        """The metric of one entry, as its leaderboard has it but for the rounding of losses."""
        return float(_scores(self.metric, self.rows[NAMES.index(name)][None])[0])

    @property
    def test_rows(self) -> int:
        """Independent test rows."""
        parts = [self.rows] if self.negatives is None else [self.rows, self.negatives]
        return sum(part.shape[1] for part in parts)


def field_ranks(entries: int) -> dict[Name, int]:
    """The ranks of the field's entries whose losses are kept. Of the two entries in the middle
    the upper one counts as the median: it is the harder one to beat."""
    gold, silver, bronze = medal_ranks(entries)
    return {"gold": gold, "silver": silver, "bronze": bronze, "median": (entries + 1) // 2}


def of_predictions(
    metric: str, true: Array, predictions: Mapping[Name, Array], *, block: int = 1
) -> Losses:
    """Losses of aligned predictions, (rows, columns) each as the metric takes them, unshuffled.

    `block`: that many successive rows make one independent row, of which the mean is kept.
    """
    if metric == "auc":
        label = true.ravel() > 0.5
        parts = [placements(label, predictions[name].ravel()) for name in NAMES]
        return Losses(metric, np.stack([p for p, _ in parts]), np.stack([n for _, n in parts]))
    rows = np.stack([row_losses(metric, true, predictions[name]) for name in NAMES])
    if block > 1:
        rows = rows.reshape(len(rows), -1, block).mean(axis=2)
    return Losses(metric, rows)


def row_losses(metric: str, true: Array, predicted: Array) -> Array:
    """One loss a row: squared, absolute or squared logarithmic error, negative log, 0 or 1."""
    loss: Array
    if metric == "rmse":
        loss = (true - predicted) ** 2
    elif metric == "rmsle":
        loss = (np.log1p(true) - np.log1p(predicted)) ** 2
    elif metric == "mae":
        loss = np.abs(true - predicted)
    elif metric == "logloss":
        if predicted.shape[1] == 1:
            predicted, true = np.hstack([1 - predicted, predicted]), np.hstack([1 - true, true])
        clipped = np.clip(predicted, _EPSILON, 1 - _EPSILON)
        loss = -np.log(clipped)[true > 0.5][:, None]
    elif metric in ("accuracy", "exact"):
        if true.shape[1] > 1:
            true, predicted = true.argmax(axis=1)[:, None], predicted.argmax(axis=1)[:, None]
        loss = (true != predicted).astype(np.float64)
    else:
        raise UserError(f"metric {metric!r} is no mean over rows: it has no per-row losses")
    rows: Array = loss.mean(axis=1)
    return rows


def placements(label: npt.NDArray[np.bool_], score: Array) -> tuple[Array, Array]:
    """Placement values of positives and negatives, in the order of the rows."""
    positive, negative = np.sort(score[label]), np.sort(score[~label])

    def below(sorted_: Array, at: Array) -> Array:
        left, right = (np.searchsorted(sorted_, at, side) for side in ("left", "right"))
        share: Array = (left + right) / (2 * len(sorted_))
        return share

    return below(negative, score[label]), 1 - below(positive, score[~label])


def beat(losses: Losses, first: Name, second: Name, *, samples: int = SAMPLES) -> float:
    """How often `first` scores better than `second` over bootstrap samples of the rows; a tie
    counts half. Both are scored on the same rows. For AUC positives and negatives are drawn
    apart, and a sample's AUC is that of the placement values (its first-order expansion)."""
    rng = np.random.default_rng(0)
    pair = [NAMES.index(first), NAMES.index(second)]
    sign = -1.0 if LOWER_IS_BETTER[losses.metric] else 1.0
    wins = 0.0
    for _ in range(samples):
        drawn = _drawn(losses.rows[pair], rng)
        scores = _scores(losses.metric, drawn)
        if losses.negatives is not None:
            negatives = losses.negatives[pair]
            scores = scores + _drawn(negatives, rng).mean(axis=1) - negatives.mean(axis=1)
        wins += 0.5 * (1 + np.sign(sign * (scores[0] - scores[1])))
    return float(wins / samples)


def _drawn(values: Array, rng: np.random.Generator) -> Array:
    drawn: Array = values[:, rng.integers(0, values.shape[1], values.shape[1])]
    return drawn


def _scores(metric: str, rows: Array) -> Array:
    mean: Array = rows.mean(axis=1)
    if metric in ("rmse", "rmsle"):
        return np.asarray(np.sqrt(mean))
    return 1 - mean if metric in ("accuracy", "exact") else mean


def write(path: Path, losses: Losses) -> None:
    """Shuffle the rows and write them, half precision, compressed."""
    # Half precision ends at 65,504.
    scale = max(1.0, float(losses.rows.max()) / 1_000)
    arrays = {
        "metric": np.array(losses.metric),
        "scale": np.array(scale),
        "rows": _packed(losses.rows / scale),
    }
    if losses.negatives is not None:
        arrays["negatives"] = _packed(losses.negatives)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def _packed(values: Array) -> npt.NDArray[np.float16]:
    # Not a seeded shuffle: nobody must be able to undo it.
    order = np.random.default_rng().permutation(values.shape[1])
    return values[:, order].astype(np.float16)


def read(path: Path) -> Losses:
    """What `write` wrote; `UserError` for a missing or broken file."""
    try:
        with np.load(path, allow_pickle=False) as found:
            negatives = found.get("negatives")
            losses = Losses(
                str(found["metric"]),
                found["rows"].astype(np.float64) * float(found["scale"]),
                None if negatives is None else negatives.astype(np.float64),
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(
            f"{path}: no per-row losses ({error}): restore it with git, or run "
            "`python -m agent_tools.mle_bench fit` for the competition"
        ) from None
    if losses.metric not in LOWER_IS_BETTER or losses.rows.shape[:1] != (len(NAMES),):
        raise UserError(f"{path}: needs a known metric and {len(NAMES)} entries: refit it")
    return losses
