"""Deterministic splits and the three public files; shared by every competition's ``prepare``.

Order never comes from a random generator, whose stream may change with its library: rows are
ranked by a SHA-256 of their own content and a salt. Only pandas is needed, because this runs in
the prepare environment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

SEED = 0


def row_keys(table: pd.DataFrame, salt: str) -> list[str]:
    """One SHA-256 (hex) a row, over the salt and the text of every cell."""
    rows = zip(*(table[name].astype(str) for name in table), strict=True)
    return [hashlib.sha256("\x1f".join((salt, *row)).encode()).hexdigest() for row in rows]


def by_hash(table: pd.DataFrame, salt: str) -> pd.DataFrame:
    """The rows in the order of their keys, with a fresh index."""
    order = pd.Series(row_keys(table, salt)).sort_values(kind="stable").index
    return table.iloc[order.to_numpy()].reset_index(drop=True)


def without_duplicates(table: pd.DataFrame, *, keys: Sequence[pd.Series] = ()) -> pd.DataFrame:
    """Keep the first row of each set of equal features (or of equal ``keys``, where given).

    Targets are left out of the comparison: a row whose twin is in the test set would tell
    its answer, whether or not the two targets agree.
    """
    seen = pd.concat(list(keys), axis=1) if keys else table.iloc[:, :-1]
    return table[~seen.duplicated().to_numpy()].reset_index(drop=True)


def split_by_hash(
    table: pd.DataFrame, n_first: int, n_second: int, *, salt: str, stratify: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two disjoint samples of the rows, each in an order unrelated to the choice.

    With ``stratify``, each value of the last column gets its share (largest remainders).
    """
    ranked = by_hash(table, f"{salt}/split/{SEED}")
    if not stratify:
        first, second = ranked.iloc[:n_first], ranked.iloc[n_first : n_first + n_second]
    else:
        groups = [group for _, group in ranked.groupby(ranked.columns[-1], sort=True)]
        sizes = [len(group) for group in groups]
        firsts = _quotas(sizes, n_first)
        seconds = _quotas([n - m for n, m in zip(sizes, firsts, strict=True)], n_second)
        first = pd.concat([g.iloc[:m] for g, m in zip(groups, firsts, strict=True)])
        second = pd.concat(
            [g.iloc[m : m + k] for g, m, k in zip(groups, firsts, seconds, strict=True)]
        )
    if (len(first), len(second)) != (n_first, n_second):
        raise ValueError(f"{salt}: {len(table)} rows cannot give {n_first} and {n_second}")
    return (
        by_hash(first, f"{salt}/order/{SEED}"),
        by_hash(second, f"{salt}/order/{SEED}"),
    )


def _quotas(sizes: Sequence[int], total: int) -> list[int]:
    """``total`` shared out in proportion to ``sizes``; integers that sum to it."""
    whole = sum(sizes)
    exact = [total * size / whole for size in sizes]
    quotas = [int(share) for share in exact]
    # Largest remainder first; ties go to the earlier class.
    for index in sorted(range(len(sizes)), key=lambda i: (quotas[i] - exact[i], i)):
        if sum(quotas) < total:
            quotas[index] += 1
    return quotas


def write_tables(
    train: pd.DataFrame,
    test: pd.DataFrame,
    public: Path,
    private: Path,
    *,
    classes: Sequence[str] = (),
    fill: float,
) -> None:
    """Write train.csv, test.csv, sample_submission.csv, and the answers as private/test.csv.

    Both tables end with ``target``; ids are numbered here, training rows first. For several
    classes the answers and the sample have one column a class (one-hot, and ``fill``), so that
    the answers are themselves a perfect submission.
    """
    public.mkdir(parents=True, exist_ok=True)
    private.mkdir(parents=True, exist_ok=True)
    train_ids = pd.Series(range(len(train)), name="id")
    test_ids = pd.Series(range(len(train), len(train) + len(test)), name="id")
    train, test = train.reset_index(drop=True), test.reset_index(drop=True)

    if classes:
        answers = pd.DataFrame({c: (test["target"] == c).astype(int) for c in classes})
    else:
        answers = test[["target"]]
    sample = pd.DataFrame(fill, index=answers.index, columns=answers.columns)
    features = test.drop(columns="target")

    _write(pd.concat([train_ids, train], axis=1), public / "train.csv")
    _write(pd.concat([test_ids, features], axis=1), public / "test.csv")
    _write(pd.concat([test_ids, sample], axis=1), public / "sample_submission.csv")
    _write(pd.concat([test_ids, answers], axis=1), private / "test.csv")


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


def one_line(texts: pd.Series) -> pd.Series:
    """Runs of white space become one space, so that a row of the CSV is a line."""
    return texts.astype(str).str.replace(r"\s+", " ", regex=True).str.strip()
