"""Small answers and submissions for each of the 22 competitions, and edits of a submission's CSV.

Everything passes through CSV text and `read_table`, so that types are those that pandas infers.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import import_module

import numpy as np
import pandas as pd

from agent_tools.mle_bench.lite.catalogue import LITE
from agent_tools.mle_bench.lite.tables import read_table

Edit = Callable[[pd.DataFrame], pd.DataFrame]
INTEGER_KEYS = {"dogs-vs-cats", "leaf", "mlsp", "nomad", "tabular"}
CLASSES = {
    "dog-breed-identification": [f"breed-{letter}" for letter in "abcdef"],
    "leaf-classification": [f"Acer_{letter}" for letter in "ABCDE"],
    "spooky-author-identification": ["EAP", "HPL", "MWS"],
}
TOKENS = ["one", "NA", "null", "", "5", "5.0", "True", "два", "old sea"]


def through_csv(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is read back."""
    return read_table(io.BytesIO(table.to_csv(index=False).encode()))


def grade(competition_id: str, submission: pd.DataFrame, answers: pd.DataFrame) -> float:
    """The grader that the catalogue names; neither frame may change."""
    module, _, name = LITE[competition_id].grade_fn.partition(":")
    kept = submission.copy(), answers.copy()
    value = getattr(import_module(module), name)(submission, answers)
    pd.testing.assert_frame_equal(submission, kept[0])
    pd.testing.assert_frame_equal(answers, kept[1])
    assert type(value) is float
    return value


def answers_of(competition_id: str, seed: int = 0, rows: int = 30) -> pd.DataFrame:
    """Answers with every class, and what is special: -1 rows, repeated comments, NA tokens."""
    rng = np.random.default_rng(seed)
    lite = LITE[competition_id]
    table = pd.DataFrame({lite.key: _keys(competition_id, rng, rows)})
    names = list(lite.targets) or CLASSES[competition_id]
    for name in names:
        table[name] = _column(lite.metric, rng, rows)
    if lite.metric == "log loss":
        table[names] = np.eye(len(names), dtype=int)[rng.integers(0, len(names), rows)]
    if competition_id.startswith("jigsaw"):
        table.loc[rows - 4 :, names] = -1
    return through_csv(table)


def _keys(competition_id: str, rng: np.random.Generator, rows: int) -> Sequence[object]:
    numbers = rng.permutation(np.arange(1, 1000))[:rows]
    if competition_id.startswith(tuple(INTEGER_KEYS)):
        return numbers.tolist()
    if competition_id.startswith("detecting-insults"):
        return [f'"comment, {number}"' for number in numbers[:-3]] + ['"comment, again"'] * 3
    return [f"key{number}_{number % 7}" for number in numbers]


def _column(metric: str, rng: np.random.Generator, rows: int) -> np.ndarray:
    if metric == "equal text":
        return rng.choice(np.array(TOKENS, dtype=object), rows)
    if metric in ("quadratic kappa", "accuracy"):
        return rng.permutation(np.arange(rows) % 5 + (metric == "accuracy"))
    if "rmse" in metric or "rmsle" in metric:
        return rng.random(rows).round(4)
    return np.append(rng.permutation(np.arange(rows - 4) % 2), [0, 1, 0, 1])


def submission_of(competition_id: str, answers: pd.DataFrame, seed: int = 1) -> pd.DataFrame:
    """A valid submission with the answers' rows in another order."""
    rng = np.random.default_rng(seed)
    lite = LITE[competition_id]
    names = list(lite.targets) or CLASSES[competition_id]
    table = answers[[lite.key, *names]].copy()
    rows = len(table)
    if lite.metric == "log loss":
        table[names] = rng.dirichlet(np.ones(len(names)), rows)
    elif lite.metric in ("quadratic kappa", "accuracy"):
        noise = rng.permutation(table[names[0]].to_numpy())
        table[names[0]] = np.where(rng.random(rows) < 0.5, noise, table[names[0]])
    elif lite.metric == "equal text":
        wrong = rng.random(rows) < 0.4
        table["after"] = table["after"].where(~wrong, "something else")
    else:
        for name in names:
            table[name] = rng.random(rows).round(2)  # two digits, so that some values are equal
    if competition_id.startswith("nomad"):
        return through_csv(table)  # paired by position
    return through_csv(table.iloc[rng.permutation(rows)])


def cell(column: str, value: object, row: int = 0) -> Edit:
    """Put a value into one cell."""

    def edit(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype(object)
        table.iloc[row, list(table.columns).index(column)] = value
        return table

    return edit


def column(name: str, value: object) -> Edit:
    """Set, or add, a column: a value or a function of the table."""
    return lambda table: table.assign(**{name: value})


def drop(name: str) -> Edit:
    """Leave a column out."""
    return lambda table: table.drop(columns=name)


def rows(order: slice | list[int]) -> Edit:
    """Take these rows."""
    return lambda table: table.iloc[order]


def columns(order: Callable[[list[str]], list[str]]) -> Edit:
    """Take the columns in another order."""
    return lambda table: table[order(list(table.columns))]
