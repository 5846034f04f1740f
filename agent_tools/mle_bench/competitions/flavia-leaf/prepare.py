"""1,907 leaves of 32 species as numbers measured on their pictures (Wu et al. 2007)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.tables import split_by_hash, without_duplicates, write_tables

ID = "flavia-leaf"
TEST = 573
# Botanical descriptions, constant within a species: with them the answer can be looked up.
DESCRIPTIONS = [
    *("apex", "base", "shape", "denate_edge", "lobed_edge", "smooth_edge", "toothed_edge"),
    "undulate_edge",
]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """30 % of the leaves for the test, with equal shares of the species."""
    # The driver has checked the pickle against its committed hash before this loads it.
    source = pd.read_pickle(raw / "leaf_id_flavia.pkl.compress", compression="xz")
    table = source.drop(columns=["rownames", *DESCRIPTIONS]).rename(
        columns={"num_max_ponits": "num_max_points", "eccentriciry": "eccentricity"}
    )
    species = table.pop("species").astype(str)
    table = table.round(6)
    table["target"] = species.str.strip().str.lower().str.replace(r"[^a-z]+", "_", regex=True)
    table = without_duplicates(table)
    train, test = split_by_hash(table, len(table) - TEST, TEST, salt=ID, stratify=True)
    classes = sorted(table["target"].unique())
    write_tables(train, test, public, private, classes=classes, fill=1 / len(classes))
