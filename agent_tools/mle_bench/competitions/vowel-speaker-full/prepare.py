"""640 utterances of two vowels by nine speakers, as 12 cepstral series (Kudo et al. 1999)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.tables import split_by_hash, without_duplicates, write_tables

ID = "vowel-speaker-full"
FILES = ("JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts")
TEST = 256
CLASSES = [f"speaker_{number}" for number in range(1, 10)]
COEFFICIENTS = [f"c{number}" for number in range(1, 13)]


def prepare(raw: Path, public: Path, private: Path) -> None:
    """384 training and 256 test utterances with equal shares of the speakers.

    The tables hold the number of frames; ``train_series.csv`` and ``test_series.csv`` hold the
    frames themselves: id, frame (from 0), and 12 coefficients as the source writes them.
    """
    lines = [
        line
        for name in FILES
        for line in (raw / name).read_text(encoding="utf-8").splitlines()
        if line and line[0] not in "#@"
    ]
    # Hashed and split as text; frames are cut out afterwards.
    table = pd.DataFrame([line.rsplit(":", 1) for line in lines], columns=["series", "target"])
    table["target"] = "speaker_" + table["target"].str.strip()
    table = without_duplicates(table)
    train, test = split_by_hash(table, len(table) - TEST, TEST, salt=ID, stratify=True)
    write_tables(
        _summary(train), _summary(test), public, private, classes=CLASSES, fill=1 / len(CLASSES)
    )
    _write_series(train, 0, public / "train_series.csv")
    _write_series(test, len(train), public / "test_series.csv")


def _frames(series: str) -> list[tuple[str, ...]]:
    """``v,v,…:v,v,…:…`` with 12 series as one tuple of 12 texts a frame."""
    return list(zip(*(values.split(",") for values in series.split(":")), strict=True))


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    frames = table["series"].map(lambda series: len(_frames(series)))
    return pd.DataFrame({"frames": frames, "target": table["target"]})


def _write_series(table: pd.DataFrame, first_id: int, path: Path) -> None:
    rows = [
        (row_id, number, *values)
        for row_id, series in enumerate(table["series"], start=first_id)
        for number, values in enumerate(_frames(series))
    ]
    long = pd.DataFrame(rows, columns=["id", "frame", *COEFFICIENTS])
    long.to_csv(path, index=False, lineterminator="\n")
