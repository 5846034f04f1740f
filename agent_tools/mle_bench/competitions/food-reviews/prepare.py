"""5,000 reviews of food, each marked "great" or not (R package modeldata)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.tables import one_line, split_by_hash, without_duplicates, write_tables

ID = "food-reviews"
PARTS = ("training_data.pkl.compress", "testing_data.pkl.compress")


def prepare(raw: Path, public: Path, private: Path) -> None:
    """1,000 training and 1,200 test reviews with equal shares of great ones."""
    # The driver has checked both pickles against their committed hashes before this loads them.
    parts = [pd.read_pickle(raw / part, compression="xz") for part in PARTS]
    source = pd.concat(parts, ignore_index=True)
    table = pd.DataFrame(
        {"text": one_line(source["review"]), "target": (source["score"] == "great").astype(int)}
    )
    table = without_duplicates(table, keys=[table["text"].str.lower()])
    train, test = split_by_hash(table, 1_000, 1_200, salt=ID, stratify=True)
    write_tables(train, test, public, private, fill=0.5)
