"""640 utterances of two vowels by nine speakers, as 12 cepstral series (Kudo et al. 1999)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from agent_tools.mle_bench.tables import split_by_hash, without_duplicates, write_tables

ID = "vowel-speaker"
FILES = ("JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts")
CLASSES = [f"speaker_{number}" for number in range(1, 10)]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """384 training and 256 test utterances with equal shares of the speakers.

    A series of varying length becomes its mean, standard deviation and quartiles.
    """
    rows = [
        _summary(line)
        for name in FILES
        for line in (raw / name).read_text(encoding="utf-8").splitlines()
        if line and line[0] not in "#@"
    ]
    table = without_duplicates(pd.DataFrame(rows))
    train, test = split_by_hash(table, 384, 256, salt=ID, stratify=True)
    write_tables(train, test, public, private, classes=CLASSES, fill=1 / len(CLASSES))


def _summary(line: str) -> dict[str, float | str]:
    """One utterance: ``v,v,…:v,v,…:…:class`` with 12 series."""
    *series, speaker = line.split(":")
    row: dict[str, float | str] = {}
    for number, text in enumerate(series, start=1):
        values = np.array([float(value) for value in text.split(",")])
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        figures = {
            "mean": values.mean(),
            "sd": values.std(),
            "q1": low,
            "median": middle,
            "q3": high,
        }
        # Six decimals, as the source has, so that no processor's last bit shows in the file.
        row |= {f"c{number}_{name}": round(float(x), 6) for name, x in figures.items()}
    row["target"] = f"speaker_{speaker.strip()}"
    return row
