"""Splits by whole groups, text answers and image files; used by ``prepare``.

Like `tables`, nothing here draws from a random generator, and only pandas and numpy are needed.
Image files are written byte by byte (PNG without compression), so that their hash depends on no
library's version.
"""

from __future__ import annotations

import csv
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.mle_bench.splits import rank_of
from agent_tools.mle_bench.tables import SEED, by_hash

Pixels = npt.NDArray[np.uint8]  # (height, width), grey

NOT_A_VALUE = frozenset(
    (
        *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
        *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", ""),
    )
)
"""Texts that pandas reads as a missing value; rows that hold one are left out."""


def choose_groups(groups: Iterable[str], rows: int, salt: str) -> set[str]:
    """Whole groups, in an order of their hash, that together hold at most ``rows`` rows.

    ``groups`` has one name a row. A group that would pass ``rows`` is left out and the next ones
    are tried.
    """
    sizes = Counter(groups)
    chosen: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: rank_of(name, f"{salt}/groups/{SEED}")):
        if total + sizes[name] <= rows:
            chosen.add(name)
            total += sizes[name]
    return chosen


def in_order(table: pd.DataFrame, salt: str) -> pd.DataFrame:
    """Rows shuffled by their hash, apart from the order that chose them."""
    return by_hash(table, f"{salt}/order/{SEED}")


def write_text_answers(
    train: pd.DataFrame, test: pd.DataFrame, public: Path, private: Path, *, fill: str
) -> None:
    """The four files of `tables.write_tables` for a ``target`` that is a text."""
    public.mkdir(parents=True, exist_ok=True)
    private.mkdir(parents=True, exist_ok=True)
    ids = range(len(train), len(train) + len(test))
    _write_rows(public / "train.csv", range(len(train)), train)
    _write_rows(public / "test.csv", ids, test.drop(columns="target"))
    _write_rows(public / "sample_submission.csv", ids, test[["target"]].assign(target=fill))
    _write_rows(private / "test.csv", ids, test[["target"]])


def _write_rows(path: Path, ids: Iterable[int], table: pd.DataFrame) -> None:
    bad = [name for name in table if table[name].isin(NOT_A_VALUE).any()]
    if bad:
        raise ValueError(f"{path.name}: column {bad[0]} has a text that reads as missing")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *table.columns])
        writer.writerows(zip(ids, *(table[name] for name in table), strict=True))


def png(pixels: Pixels) -> bytes:
    """A grey 8-bit PNG file of (height, width) pixels, its data stored without compression."""
    height, width = pixels.shape
    lines = np.zeros((height, width + 1), dtype=np.uint8)  # a leading 0: no filter
    lines[:, 1:] = pixels
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = _stored(lines.tobytes())
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _stored(data: bytes) -> bytes:
    """A zlib stream of stored blocks."""
    size = 65_535
    blocks = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    parts = [b"\x78\x01"]
    for number, block in enumerate(blocks, start=1):
        last = number == len(blocks)
        parts += [struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block]
    return b"".join([*parts, struct.pack(">I", zlib.adler32(data))])


def write_files(folder: Path, members: Mapping[str, bytes]) -> None:
    """Files by their path under ``folder``, whose sub-folders are made."""
    for name, data in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
