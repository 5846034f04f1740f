"""Half-hourly electricity demand of Victoria, Australia, in 2014 (R package fpp2)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import even_folds, write_folds
from agent_tools.mle_bench.tables import SEED, by_hash, write_tables

ID = "electricity-demand-full"
HALF_HOURS_A_DAY = 48
TEST_DAYS = 56


def prepare(raw: Path, public: Path, private: Path) -> None:
    """All half-hours of the year's first 309 days to fit, all of its last 56 days to test."""
    # The driver has checked this pickle against its committed hash before this loads it.
    source = pd.read_pickle(raw / "elecdemand.pkl.compress", compression="xz")
    times = pd.Series(pd.date_range("2014-01-01", periods=len(source), freq="30min"))
    table = pd.DataFrame(
        {
            "temperature": source["Temperature"].to_numpy(),
            "workday": source["WorkDay"].to_numpy(),
            "hour": times.dt.hour + times.dt.minute / 60,
            "weekday": times.dt.weekday,
            "month": times.dt.month,
            "day_of_year": times.dt.dayofyear,
            "target": source["Demand"].round(5).to_numpy(),
        }
    )
    cut = len(table) - TEST_DAYS * HALF_HOURS_A_DAY
    train = by_hash(table.iloc[:cut], f"{ID}/order/{SEED}")
    test = by_hash(table.iloc[cut:], f"{ID}/order/{SEED}")
    write_tables(train, test, public, private, fill=4.5)
    write_folds(private, even_folds(test["day_of_year"], f"{ID}/folds/{SEED}"))
