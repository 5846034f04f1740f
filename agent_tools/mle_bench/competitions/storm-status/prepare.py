"""Six-hourly positions and strengths of Atlantic storms since 1975 (R package dplyr)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import even_folds, numbered, split_groups, write_folds
from agent_tools.mle_bench.tables import SEED, without_duplicates, write_tables

ID = "storm-status"
TEST_ROWS = 4_880
GAP = pd.Timedelta(days=30)
TIME = ["year", "month", "day", "hour"]
DIAMETERS = ["tropicalstorm_force_diameter", "hurricane_force_diameter"]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """About a quarter of the records, whole storms, to test; the others to fit.

    A storm is a run of records under one name without a gap of a month, so that one that lasts
    into January stays whole. Its name becomes a number. The hurricane category follows from the
    status and is left out.
    """
    # The driver has checked this pickle against its committed hash before this loads it.
    source = pd.read_pickle(raw / "storms.pkl.compress", compression="xz")
    times = pd.to_datetime(source[TIME])
    starts = (source["name"] != source["name"].shift()) | (times.diff().abs() > GAP)
    table = source[[*TIME, "lat", "long", "wind", "pressure", *DIAMETERS]].copy()
    table.insert(0, "storm", numbered(starts.cumsum(), salt=ID).to_numpy())
    table["target"] = source["status"].astype(str).str.replace(" ", "_")
    table = without_duplicates(table, keys=[table["storm"], times])
    classes = sorted(table["target"].unique())
    train, test = split_groups(table, "storm", TEST_ROWS, salt=ID)
    write_tables(train, test, public, private, classes=classes, fill=1 / len(classes))
    write_folds(private, even_folds(test["storm"], f"{ID}/folds/{SEED}"))
