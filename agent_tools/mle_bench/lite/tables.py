"""CSV as MLE-bench reads and writes it, zip archives of raw data, and its random split.

Only numpy and pandas are needed. The split is scikit-learn's ``train_test_split`` with
``random_state=0``, which is what the original uses.
"""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from agent_tools.errors import UserError

SEED = 0
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold: archives never differ by it


def read_table(file: Path | str | IO[bytes]) -> pd.DataFrame:
    """A CSV file with exact floats and pandas' own words for missing; an empty file is no column.

    Raises what ``pandas.read_csv`` raises for anything that is no CSV.
    """
    try:
        return pd.read_csv(file, float_precision="round_trip")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()


def write_table(table: pd.DataFrame, path: Path, *, quote_text: bool = False) -> None:
    """Write a CSV without the index; with ``quote_text`` every text is quoted."""
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if quote_text else csv.QUOTE_MINIMAL
    table.to_csv(path, index=False, lineterminator="\n", quoting=quoting)


def random_rows(
    n: int, test_size: float | int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions of the training and of the test rows, both in random order.

    ``test_size`` is a share of ``n``, rounded up, or a number of rows. `UserError` where one of
    the two parts would be empty.
    """
    n_test = test_size if isinstance(test_size, int) else math.ceil(test_size * n)
    if not 0 < n_test < n:
        raise UserError(f"cannot take {n_test} test rows of {n}: the raw data are incomplete")
    order = np.random.RandomState(SEED).permutation(n)
    return order[n_test:], order[:n_test]


def split_table(table: pd.DataFrame, test_size: float | int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and test rows of a table, by `random_rows`; the index is kept."""
    train, test = random_rows(len(table), test_size)
    return table.iloc[train].copy(), table.iloc[test].copy()


def one_hot(table: pd.DataFrame, key: str, target: str, classes: Iterable[str]) -> pd.DataFrame:
    """``key`` and one column of 0 and 1 a class; `UserError` for a label that is no class."""
    names = list(classes)
    unknown = set(table[target]) - set(names)
    if unknown:
        raise UserError(f"column {target!r} has the unknown label {min(map(str, unknown))!r}")
    columns = {name: (table[target] == name).astype(int) for name in names}
    return pd.DataFrame({key: table[key], **columns})


def open_zip(path: Path) -> zipfile.ZipFile:
    """An archive of raw data; `UserError` where it is missing or broken."""
    if not path.is_file():
        raise UserError(f"no {path}: download the competition from Kaggle and unpack it there")
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(f"{path} is no zip archive: download it again") from None


def read_zipped_table(path: Path, member: str) -> pd.DataFrame:
    """`read_table` of a member of an archive; `UserError` where either is missing."""
    with open_zip(path) as archive:
        return read_table(io.BytesIO(read_member(archive, member)))


def read_member(archive: zipfile.ZipFile, member: str) -> bytes:
    """The bytes of a member; `UserError` where it is missing."""
    try:
        return archive.read(member)
    except KeyError:
        raise UserError(f"{archive.filename} has no {member}: download it again") from None


def write_zip(path: Path, members: Mapping[str, bytes]) -> None:
    """An archive that depends on names, order and bytes alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name, _ZIP_TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
