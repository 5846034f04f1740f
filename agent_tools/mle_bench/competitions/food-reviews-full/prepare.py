"""5,000 reviews of food, each marked "great" or not (R package modeldata)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import split_off, take_turns, write_folds
from agent_tools.mle_bench.tables import one_line, without_duplicates, write_tables

ID = "food-reviews-full"
PARTS = ("training_data.pkl.compress", "testing_data.pkl.compress")
TEST_ROWS = 1_500
SAME_START = 60


def prepare(raw: Path, public: Path, private: Path) -> None:
    """1,500 test reviews and all others to fit, with equal shares of great ones.

    A review that begins with the same 60 letters as an earlier one is a copy of it.
    """
    # The driver has checked both pickles against their committed hashes before this loads them.
    parts = [pd.read_pickle(raw / part, compression="xz") for part in PARTS]
    source = pd.concat(parts, ignore_index=True)
    table = pd.DataFrame(
        {"text": one_line(source["review"]), "target": (source["score"] == "great").astype(int)}
    )
    letters = table["text"].str.lower().str.replace(r"[^a-z]", "", regex=True)
    table = without_duplicates(table, keys=[letters.str[:SAME_START]])
    train, test = split_off(table, TEST_ROWS, salt=ID, stratify=True)
    write_tables(train, test, public, private, fill=0.5)
    write_folds(private, take_turns(len(test)))
