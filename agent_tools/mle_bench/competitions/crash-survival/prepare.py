"""Occupants of cars in police-reported US crashes, 1997–2002, dead or alive (R package DAAG)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import even_folds, split_groups, write_folds
from agent_tools.mle_bench.tables import SEED, write_tables

ID = "crash-survival"
TEST_SHARE = 0.3
FEATURES = {
    "dvcat": "speed_change",
    "frontal": "frontal",
    "airbag": "airbag",
    "abcat": "airbag_state",
    "seatbelt": "seatbelt",
    "occRole": "role",
    "sex": "sex",
    "ageOFocc": "age",
    "yearVeh": "car_year",
    "yearacc": "crash_year",
}


def prepare(raw: Path, public: Path, private: Path) -> None:
    """Three tenths of the occupants to test; all people of a crash are on one side.

    Left out: the severity of injuries, which tells the answer, and the survey's weight, which
    was set by it. The case number serves to keep crashes whole and is left out too.
    """
    # The driver has checked this pickle against its committed hash before this loads it.
    source = pd.read_pickle(raw / "nassCDS.pkl.compress", compression="xz")
    table = source[list(FEATURES)].rename(columns=FEATURES)
    for name in ("speed_change", "airbag", "airbag_state", "seatbelt", "role", "sex"):
        table[name] = table[name].astype(str)
    # Sampling unit and case; the last part is the vehicle.
    case = source["caseid"].astype(str).str.rsplit(":", n=1).str[0]
    table["crash"] = source["yearacc"].astype(str) + ":" + case
    table["target"] = (source["dead"].astype(str) == "dead").astype(int)
    train, test = split_groups(table, "crash", round(TEST_SHARE * len(table)), salt=ID)
    crashes = test.pop("crash")
    write_tables(train.drop(columns="crash"), test, public, private, fill=0.05)
    write_folds(private, even_folds(crashes, f"{ID}/folds/{SEED}"))
