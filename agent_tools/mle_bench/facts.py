"""What a solver is told about a competition in numbers: `TaskFacts`, computed from public files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["binary", "multiclass", "regression", "text"]
ColumnType = Literal["numeric", "categorical", "text"]


@dataclass(frozen=True)
class TaskFacts:
    """A competition's public training table in numbers.

    Attributes:
        kind: what is predicted.
        metric: ``auc``, ``logloss``, ``accuracy``, ``rmse``, ``mae``, ``rmsle`` or ``exact``.
        rows: training rows.
        numeric, categorical, text: feature columns of each type.
        levels: most distinct values in one categorical column; 0 without one.
        missing: share of feature cells that are empty, 0 to 1.
        classes: 0 for regression and for texts.
        skew_or_balance: skewness of a regression target; else the share of the rarest class; 0
            for texts.
        time: the test rows lie later in time than the training rows.
    """

    kind: Kind
    metric: str
    rows: int
    numeric: int
    categorical: int
    text: int
    levels: int
    missing: float
    classes: int
    skew_or_balance: float
    time: bool


def facts_of(public_dir: Path, metric: str, kind: Kind, *, time: bool = False) -> TaskFacts:
    """Facts of ``public_dir/train.csv`` (first column id, last column target)."""
    import pandas as pd

    table = pd.read_csv(public_dir / "train.csv", float_precision="round_trip")
    features = table.iloc[:, 1:-1]
    target = table.iloc[:, -1]
    types = [column_type(features[name]) for name in features]
    levels = [
        int(features[name].nunique())
        for name, type_ in zip(features, types, strict=True)
        if type_ == "categorical"
    ]
    if kind == "regression":
        classes, shape = 0, cast(float, target.skew())
    elif kind == "text":
        classes, shape = 0, 0.0
    else:
        shares = target.value_counts(normalize=True)
        classes, shape = len(shares), float(shares.min())
    return TaskFacts(
        kind=kind,
        metric=metric,
        rows=len(table),
        numeric=types.count("numeric"),
        categorical=types.count("categorical"),
        text=types.count("text"),
        levels=max(levels, default=0),
        missing=round(float(features.isna().to_numpy().mean()), 3),
        classes=classes,
        skew_or_balance=round(shape, 2),
        time=time,
    )


def column_type(values: pd.Series) -> ColumnType:
    """Numbers are numeric; strings are text if most differ and they have 3 words or more."""
    if values.dtype.kind in "biuf":
        return "numeric"
    present = values.dropna().astype(str)
    wordy = len(present) > 0 and present.map(lambda text: len(text.split())).mean() >= 3
    return "text" if wordy and present.nunique() > len(present) / 2 else "categorical"
