"""Splits that keep whole groups on one side, and the private folds; for the full-size suite.

As in `tables`, every order comes from a SHA-256 of content. Only pandas is needed, because this
runs in the prepare environment.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.tables import SEED, by_hash, split_by_hash

FOLDS = 3
FOLDS_FILE = "folds.csv"


def split_off(
    table: pd.DataFrame, n_test: int, *, salt: str, stratify: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All other rows, and ``n_test`` test rows; each in an order unrelated to the choice."""
    return split_by_hash(table, len(table) - n_test, n_test, salt=salt, stratify=stratify)


def split_groups(
    table: pd.DataFrame, group: str, n_test: int, *, salt: str
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test rows with each value of column ``group`` on one side only.

    Groups are taken in the order of their hash while the test has fewer than ``n_test`` rows, so
    it has up to one group's rows more.
    """
    sizes = dict(table[group].value_counts(sort=False).items())
    chosen: set[Hashable] = set()
    rows = 0
    for key in _hashed(sizes, f"{salt}/groups/{SEED}"):
        if rows >= n_test:
            break
        chosen.add(key)
        rows += sizes[key]
    if rows < n_test or len(chosen) == len(sizes):
        raise ValueError(f"{salt}: {len(sizes)} groups cannot give {n_test} test rows and others")
    test = table[group].isin(chosen)
    order = f"{salt}/order/{SEED}"
    return by_hash(table[~test], order), by_hash(table[test], order)


def numbered(groups: pd.Series, *, salt: str) -> pd.Series:
    """The groups as numbers from 0 in the order of their hash, which tells nothing of their own."""
    order = _hashed(groups.unique(), f"{salt}/names/{SEED}")
    return groups.map({key: number for number, key in enumerate(order)})


def even_folds(groups: Iterable[Hashable], salt: str) -> list[int]:
    """A fold 0, 1 or 2 for each row; a group lies in one fold, and the folds are near-equal.

    The largest group comes first and goes to the smallest fold so far.
    """
    rows = list(groups)
    sizes = Counter(rows)
    filled = [0] * FOLDS
    fold_of: dict[Hashable, int] = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], rank_of(key, salt))):
        fold_of[key] = filled.index(min(filled))
        filled[fold_of[key]] += sizes[key]
    return [fold_of[key] for key in rows]


def take_turns(rows: int) -> list[int]:
    """Folds of rows without groups, whose order is a hash already."""
    return [row % FOLDS for row in range(rows)]


def write_folds(private: Path, folds: Sequence[int]) -> None:
    """``folds.csv`` (id, fold) for the answers in ``private/test.csv``, in their order."""
    ids = pd.read_csv(private / "test.csv", usecols=["id"])["id"]
    if len(ids) != len(folds):
        raise ValueError(f"{len(folds)} folds for {len(ids)} answers")
    table = pd.DataFrame({"id": ids, "fold": list(folds)})
    table.to_csv(private / FOLDS_FILE, index=False, lineterminator="\n")


def rank_of(key: Hashable, salt: str) -> str:
    """SHA-256 (hex) by which groups are put in order."""
    return hashlib.sha256(f"{salt}\x1f{key}".encode()).hexdigest()


def _hashed(keys: Iterable[Hashable], salt: str) -> list[Hashable]:
    return sorted(keys, key=lambda key: rank_of(key, salt))
