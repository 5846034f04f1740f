"""Prices in dollars of round-cut diamonds, with their size, cut, colour and clarity."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import split_off, take_turns, write_folds
from agent_tools.mle_bench.tables import without_duplicates, write_tables

ID = "diamonds-price-full"
FEATURES = ["carat", "cut", "color", "clarity", "depth", "table", "x", "y", "z"]
TEST_ROWS = 8_000


def prepare(raw: Path, public: Path, private: Path) -> None:
    """8,000 test diamonds and all others to fit; every stone is there once.

    The source lists many stones twice with length and width exchanged (and the grade of the cut
    or the table a little changed), some at another price: rows of equal weight, colour, clarity
    and sizes are one stone.
    """
    table = pd.read_csv(raw / "diamonds.csv", float_precision="round_trip")
    table = table[[*FEATURES, "price"]].rename(columns={"price": "target"})
    sizes = table[["x", "y"]]
    table = without_duplicates(
        table,
        keys=[
            *(table[name] for name in ("carat", "color", "clarity", "z")),
            sizes.min(axis=1),
            sizes.max(axis=1),
        ],
    )
    train, test = split_off(table, TEST_ROWS, salt=ID)
    write_tables(train, test, public, private, fill=2_400.0)
    write_folds(private, take_turns(len(test)))
