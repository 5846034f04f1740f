"""4,200 tweets, each with the mean of 20 human ratings (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.splits import split_off, take_turns, write_folds
from agent_tools.mle_bench.tables import one_line, without_duplicates, write_tables

ID = "tweet-sentiment-full"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TWEETS = "hutto_ICWSM_2014/tweets_GroundTruth.txt"
TEST_ROWS = 1_260


def prepare(raw: Path, public: Path, private: Path) -> None:
    """1,260 test tweets and all others to fit; tweets of equal letters are there once."""
    with tarfile.open(raw / ARCHIVE) as outer:
        inner = _member(outer, INNER)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = _member(archive, TWEETS).decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    table = pd.DataFrame(
        {"text": [text for _, _, text in rows], "target": [float(mean) for _, mean, _ in rows]}
    )
    table["text"] = one_line(table["text"])
    table["target"] = table["target"].round(4)
    letters = table["text"].str.lower().str.replace(r"[^a-z]", "", regex=True)
    table = without_duplicates(table, keys=[letters.where(letters != "", table["text"])])
    train, test = split_off(table, TEST_ROWS, salt=ID)
    write_tables(train, test, public, private, fill=0.0)
    write_folds(private, take_turns(len(test)))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    if stream is None:
        raise ValueError(f"{name} is not a file in the archive")
    return stream.read()
