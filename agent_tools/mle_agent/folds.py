"""What a search may see of a competition, and cross-validation inside its public rows.

Only public files are read here. A fold is itself a competition folder: part of the training rows
to fit, the others as its test, with their known targets as answers beside it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pandas as pd

from agent_tools.errors import UserError
from agent_tools.mle_bench.registry import Competition

_TABLES = ("train.csv", "test.csv", "sample_submission.csv")
_MOST_SUBMISSION_BYTES = 64 << 20
_SHARE_LATER = 0.2  # of the rows, held out by one fold of a split in time

Rule = Literal["random", "group", "time"]


def public_view(competition: Competition) -> Competition:
    """The competition without any way to its answers or its field: grading it raises."""
    nowhere = competition.public_dir / "no-answers-here"
    return replace(
        competition,
        private_dir=nowhere,
        dev_public_dir=None,
        dev_private_dir=None,
        leaderboard=(),
        dev_leaderboard=None,
        folds=1,
        fold_leaderboards=(),
    )


def can_split(public: Path) -> bool:
    """Whether the public folder is a table whose rows can be held out."""
    return _plan(public) is not None


def split_rule(public: Path, *, time: bool) -> tuple[Rule, str]:
    """How the test rows differ from the training rows, found in the public tables.

    ("time", column) where the task says so and the column's test values all lie above those of the
    training rows; ("group", column) where its values come several times each and none is in
    both tables; else ("random", "").
    """
    train, test = _read(public / "train.csv"), _read(public / "test.csv")
    shared = [name for name in train.columns[1:] if name in test.columns]
    if time:
        for name in shared:
            if train[name].dtype.kind in "iuf" and test[name].min() > train[name].max():
                return "time", name
        return "random", ""
    for name in shared:
        if train[name].dtype.kind == "f":
            continue
        ours, theirs = set(train[name].dropna()), set(test[name].dropna())
        several = len(train) >= 2 * len(ours) and len(test) >= 2 * len(theirs)
        if several and len(ours) >= 10 and len(theirs) > 1 and not ours & theirs:
            return "group", name
    return "random", ""


def make_folds(view: Competition, count: int, seed: int, folder: Path) -> list[Competition]:
    """`count` folds below `folder`, made from the public rows only; each a competition to grade.

    Random and group folds cover all rows once, classes in equal shares; folds in time hold out the
    last fifth, the fifth before, …, and fit on what is earlier. The same arguments give the same
    folds. Raises `UserError` where the public folder is no table or holds too few rows.
    """
    plan = _plan(view.public_dir)
    if plan is None:
        raise UserError(
            f"{view.id}: its public files are no train.csv, test.csv and sample_submission.csv "
            "with a common id, so no rows can be held out: use --set folds=0"
        )
    targets, classes = plan
    train = _read(view.public_dir / "train.csv")
    if len(train) < 4 * count:
        raise UserError(f"{view.id}: {len(train)} training rows are too few for {count} folds")
    rule, column = split_rule(view.public_dir, time=view.facts.time)
    held = _held_out(train, targets, rule, column, count, seed)
    folds = []
    for number, (fit, score) in enumerate(held):
        base = folder / f"{number}"
        if not (base / "done").is_file():
            shutil.rmtree(base, ignore_errors=True)
            _write_fold(view.public_dir, train, fit, score, targets, classes, base)
            (base / "done").touch()
        folds.append(replace(view, public_dir=base / "public", private_dir=base / "private"))
    return folds


def check_form(public: Path, submission: bytes) -> str | None:
    """Why a submission does not fit the public sample, or None; says nothing about answers."""
    if len(submission) > _MOST_SUBMISSION_BYTES:
        return f"larger than {_MOST_SUBMISSION_BYTES >> 20} MiB"
    samples = sorted(public.glob("sample*ubmission*.csv"))
    if not samples:
        return None if submission.strip() else "the file is empty"
    import io

    sample = _read(samples[0])
    try:
        table = pd.read_csv(io.BytesIO(submission))
    except (ValueError, OverflowError) as error:
        return f"is not a CSV file: {(str(error).splitlines() or [''])[0]}"
    if sorted(map(str, table.columns)) != sorted(map(str, sample.columns)):
        return f"has columns {', '.join(map(str, table.columns[:12]))[:120]}"
    if len(table) != len(sample):
        return f"has {len(table)} rows, expected {len(sample)}"
    key = sample.columns[0]
    if set(table[key].astype(str)) != set(sample[key].astype(str)):
        ours, theirs = table[key], sample[key]
        if ours.dtype.kind != "f" or set(ours.astype("float")) != set(theirs.astype("float")):
            return f"has other values of {key!r} than the sample"
    if table[[name for name in sample.columns if name != key]].isna().to_numpy().any():
        return "has missing values"
    return None


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, float_precision="round_trip", low_memory=False)


def _plan(public: Path) -> tuple[list[str], list[str]] | None:
    """Target columns of train.csv, and the classes where the sample has one column for each."""
    if not all((public / name).is_file() for name in _TABLES):
        return None
    train, test, sample = (_head(public / name) for name in _TABLES)
    key, *outputs = sample.columns
    if not outputs or key not in train.columns or key not in test.columns:
        return None
    if set(outputs) <= set(train.columns) and not set(outputs) & set(test.columns):
        return outputs, []
    extra = [name for name in train.columns if name not in test.columns]
    if len(extra) != 1 or len(outputs) < 2:
        return None
    values = set(pd.read_csv(public / "train.csv", usecols=extra)[extra[0]].astype(str))
    return (extra, outputs) if values <= set(outputs) else None


def _head(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, nrows=5)


def _held_out(
    train: pd.DataFrame, targets: list[str], rule: Rule, column: str, count: int, seed: int
) -> list[tuple[pd.Series, pd.Series]]:
    """A mask of rows to fit and one of rows to score, for each fold."""
    if rule == "time":
        place = train[column].rank(method="first")
        size = int(len(train) * min(_SHARE_LATER, 0.8 / count))
        ends = [len(train) - size * number for number in range(count)]
        return [(place <= end - size, (place > end - size) & (place <= end)) for end in ends]
    unit = train[column] if rule == "group" else train.iloc[:, 0]
    frame = pd.DataFrame({"unit": unit.astype(str)})
    frame["key"] = [hashlib.sha256(f"{seed}/{text}".encode()).hexdigest() for text in frame["unit"]]
    label = train[targets[0]]
    few = rule == "random" and label.nunique() <= max(20, count) and label.dtype.kind != "f"
    frame["label"] = label.astype(str) if few else ""
    if rule == "group":
        units = frame.drop_duplicates("key").sort_values("key").reset_index(drop=True)
        fold_of = {key: number % count for number, key in enumerate(units["key"])}
        fold = frame["key"].map(fold_of)
    else:
        order = frame.sort_values(["label", "key"], kind="stable").index
        fold = pd.Series(range(len(order)), index=order).sort_index() % count
    return [(fold != number, fold == number) for number in range(count)]


def _write_fold(
    public: Path,
    train: pd.DataFrame,
    fit: pd.Series,
    score: pd.Series,
    targets: list[str],
    classes: list[str],
    base: Path,
) -> None:
    sample = _read(public / "sample_submission.csv")
    key = sample.columns[0]
    test = _head(public / "test.csv")
    held = train[score]
    if classes:
        labels = held[targets[0]].astype(str)
        answers = pd.DataFrame({name: (labels == name).astype(int) for name in classes})
    else:
        answers = held[targets].copy()
    answers.insert(0, key, held[key])
    form = answers.copy()
    for name in answers.columns[1:]:
        form[name] = sample[name].iloc[0]
    (base / "private").mkdir(parents=True)
    _copy_others(public, base / "public")
    _write(train[fit], base / "public" / "train.csv")
    _write(held[[name for name in test.columns if name in held.columns]], base / "public/test.csv")
    _write(form, base / "public" / "sample_submission.csv")
    _write(answers, base / "private" / "test.csv")


def _copy_others(public: Path, target: Path) -> None:
    """Everything beside the tables, as links to the same data where the disk allows it."""

    def link(source: str, place: str) -> None:
        try:
            os.link(source, place)
        except OSError:
            shutil.copyfile(source, place)

    def skip(folder: str, names: list[str]) -> set[str]:
        top = Path(folder) == public
        return {name for name in names if top and (name in _TABLES or name.startswith("sample"))}

    shutil.copytree(public, target, copy_function=link, ignore=skip)


def _write(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\n")
