"""Prices in dollars of round-cut diamonds, with their size, cut, colour and clarity."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.tables import split_by_hash, without_duplicates, write_tables

ID = "diamonds-price"
FEATURES = ["carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z"]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """1,000 training and 1,200 test diamonds."""
    table = pd.read_csv(raw / "diamonds.csv", float_precision="round_trip")
    table = table[[*FEATURES, "price"]].rename(columns={"price": "target"})
    table = without_duplicates(table)
    train, test = split_by_hash(table, 1_000, 1_200, salt=ID)
    write_tables(train, test, public, private, fill=2_400.0)
