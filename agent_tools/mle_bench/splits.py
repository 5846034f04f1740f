"""Splits that keep whole groups on one side, and the private folds; for the full-size suite.

As in `tables`, every order comes from a SHA-256 of content. Only pandas is needed, because this
runs in the prepare environment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable
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


def write_folds(
    private: Path, n_train: int, n_test: int, *, salt: str, groups: pd.Series | None = None
) -> None:
    """Write ``folds.csv`` (id, fold) for the test rows, numbered as by `tables.write_tables`.

    Rows without groups take turns, as their order is a hash already. Otherwise each group goes
    whole into the smallest fold so far, the largest groups first, so that folds are near-equal.
    """
    if groups is None:
        folds = [row % FOLDS for row in range(n_test)]
    else:
        sizes = dict(groups.value_counts(sort=False).items())
        order = _hashed(sizes, f"{salt}/folds/{SEED}")
        order.sort(key=lambda key: -sizes[key])
        rows = [0] * FOLDS
        place: dict[Hashable, int] = {}
        for key in order:
            place[key] = rows.index(min(rows))
            rows[place[key]] += sizes[key]
        folds = [place[key] for key in groups]
    ids = range(n_train, n_train + n_test)
    table = pd.DataFrame({"id": ids, "fold": folds})
    table.to_csv(private / FOLDS_FILE, index=False, lineterminator="\n")


def _hashed(keys: Iterable[Hashable], salt: str) -> list[Hashable]:
    digests = {key: hashlib.sha256(f"{salt}\x1f{key}".encode()).hexdigest() for key in keys}
    return sorted(digests, key=lambda key: digests[key])
