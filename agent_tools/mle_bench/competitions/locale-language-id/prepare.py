"""Messages of Django in 21 languages that are close to others (human translations)."""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.special_files import (
    NOT_A_VALUE,
    choose_groups,
    in_order,
)
from agent_tools.mle_bench.splits import even_folds, write_folds
from agent_tools.mle_bench.tables import one_line, write_tables

ID = "locale-language-id"
ARCHIVE = "Django-5.2.tar.gz"
MAGIC = 0x950412DE
SHARE = 0.4
LEAST_LETTERS = 12
CLASSES = sorted(
    [
        *("da", "nb", "nn", "sv"),
        *("ca", "es", "gl", "it", "pt"),
        *("cs", "dsb", "hr", "hsb", "sk", "sl", "sr_Latn"),
        *("be", "bg", "mk", "ru", "uk"),
    ]
)


def prepare(raw: Path, public: Path, private: Path) -> None:
    """60 % of the English source messages with all their translations to fit, 40 % to test.

    A text that two languages share is left out, as its language cannot be told.
    """
    rows: dict[tuple[str, str], str] = {}
    with tarfile.open(raw / ARCHIVE) as archive:
        for language, data in _catalogues(archive):
            for source, text in _messages(data):
                rows.setdefault((language, text), source)
    table = pd.DataFrame(
        [(text, source, language) for (language, text), source in sorted(rows.items())],
        columns=["text", "source", "target"],
    )
    table["text"] = one_line(table["text"])
    letters = table["text"].str.len() >= LEAST_LETTERS
    table = table[letters & ~table["text"].isin(NOT_A_VALUE) & (table["text"] != table["source"])]
    table = table[~table["text"].str.lower().duplicated(keep=False)].reset_index(drop=True)
    held_out = choose_groups(table["source"], round(SHARE * len(table)), ID)
    in_test = table["source"].isin(held_out).to_numpy()
    train, test = in_order(table[~in_test], ID), in_order(table[in_test], ID)
    write_tables(
        train.drop(columns="source"),
        test.drop(columns="source"),
        public,
        private,
        classes=CLASSES,
        fill=1 / len(CLASSES),
    )
    write_folds(private, even_folds(list(test["source"]), "folds"))


def _catalogues(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    """Language and content of each compiled catalogue of Django itself, not of its tests."""
    for member in archive:
        if not (member.name.startswith("Django-5.2/django/") and member.name.endswith(".mo")):
            continue
        path = member.name.split("/")
        language = path[path.index("locale") + 1]
        stream = archive.extractfile(member)
        if language in CLASSES and stream is not None:
            yield language, stream.read()


def _messages(data: bytes) -> Iterator[tuple[str, str]]:
    """Source message and translation (of plurals the first form) of a GNU catalogue."""
    magic, _, count, sources, texts = struct.unpack_from("<5I", data)
    if magic != MAGIC:
        raise ValueError(f"{ID}: a catalogue has another byte order")
    for number in range(count):
        pair = [_text(data, table + 8 * number) for table in (sources, texts)]
        source, text = (part.split("\0")[0] for part in pair)
        if source:  # the first one is the catalogue's head
            yield source.split("\4")[-1], text


def _text(data: bytes, place: int) -> str:
    length, start = struct.unpack_from("<2I", data, place)
    return data[start : start + length].decode("utf-8")
