"""Half-hourly electricity demand of Victoria, Australia, in 2014 (R package fpp2)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.tables import split_by_hash, write_tables

ID = "electricity-demand"
HALF_HOURS_A_DAY = 48
TEST_DAYS = 56


def prepare(raw: Path, public: Path, private: Path) -> None:
    """1,000 training half-hours of the year's first 309 days, 1,200 test ones of its last 56."""
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
    train, _ = split_by_hash(table.iloc[:cut], 1_000, 0, salt=ID)
    test, _ = split_by_hash(table.iloc[cut:], 1_200, 0, salt=ID)
    write_tables(train, test, public, private, fill=4.5)
