"""Russian word forms with their dictionary form (word list of simplemma 2.0.0)."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from agent_tools.mle_bench.special_files import (
    NOT_A_VALUE,
    in_order,
    write_text_answers,
)
from agent_tools.mle_bench.splits import even_folds, rank_of, write_folds

ID = "russian-lemma"
MAGIC = b"SMFC1"
SAME_VALUE, WHOLE_VALUE = 254, 255
TRAIN, TEST = 300_000, 8_000
LETTERS = frozenset("абвгдеёжзийклмнопрстуфхцчшщъыьэюя")


def prepare(raw: Path, public: Path, private: Path) -> None:
    """300,000 training and 8,000 test forms; all forms of a lemma stay on one side.

    A quarter of the lemmas, by hash, is kept for the test, and of each part the forms with the
    lowest hashes are taken.
    """
    data = lzma.decompress((raw / "ru.plzma").read_bytes())
    parts: tuple[list[tuple[str, str, str]], ...] = ([], [])
    side_of: dict[str, bool] = {}
    for form, lemma in _pairs(data):
        if not (set(form) <= LETTERS and set(lemma) <= LETTERS):
            continue
        if lemma not in side_of:
            side_of[lemma] = int(rank_of(lemma, ID)[:8], 16) < 2**30
        parts[side_of[lemma]].append((rank_of(form, ID), form, lemma))
    train, test = (
        pd.DataFrame(
            [(form, lemma) for _, form, lemma in sorted(part)[:size]], columns=["form", "target"]
        )
        for part, size in zip(parts, (TRAIN, TEST), strict=True)
    )
    assert not set(train["target"]) & set(test["target"]) and not NOT_A_VALUE & set(test["form"])
    train, test = in_order(train, ID), in_order(test, ID)
    write_text_answers(train, test, public, private, fill="и")
    write_folds(private, even_folds(list(test["target"]), "folds"))


def _pairs(data: bytes) -> Iterator[tuple[str, str]]:
    """Form and lemma of a front-coded list.

    A record holds how many bytes it shares with the form before, the bytes that follow, and the
    lemma: as before (254), in full (255), or the form less some bytes at its end plus others. With
    the first flag set, forms and lemmas are written backwards.
    """
    if not data.startswith(MAGIC):
        raise ValueError(f"{ID}: the word list is not front-coded: install simplemma 2.0.0")
    place = len(MAGIC)
    backwards = bool(data[place] & 1)
    count, place = _number(data, place + 1)
    form = lemma = b""
    seen = 0
    while place < len(data):
        shared, place = _number(data, place)
        length, place = _number(data, place)
        form = form[:shared] + data[place : place + length]
        place += length
        trim = data[place]
        place += 1
        if trim != SAME_VALUE:
            length, place = _number(data, place)
            kept = b"" if trim == WHOLE_VALUE else form[: len(form) - trim]
            lemma = kept + data[place : place + length]
            place += length
        seen += 1
        pair = (form[::-1], lemma[::-1]) if backwards else (form, lemma)
        yield pair[0].decode(), pair[1].decode()
    if seen != count:
        raise ValueError(f"{ID}: {seen} of {count} words could be read")


def _number(data: bytes, place: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
