"""Leaderboards as MLE-bench ranks in them: read, verified, and the marked fallback.

MLE-bench keeps its leaderboards in Git LFS. We carry none of them: the user's own pull is read and
compared with the size and SHA-256 that the repository's pointers state for the 22 Lite files.
Without a pull there are only *reported* thresholds: single numbers that third parties printed,
partly rounded. They serve planning, and whatever is graded with them is marked.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pandas as pd

from agent_tools.errors import UserError
from agent_tools.mle_bench.medals import Thresholds, medal_ranks

REPORTED = Path(__file__).resolve().parent / "lite_thresholds_reported.csv"
POINTER = b"version https://git-lfs.github.com/spec/"
PAGE_ROWS = 20  # one page of Kaggle's API: the most rows that a later download command got
COPIED = 1 << 20

Origin = Literal["verified", "unverified", "reported"]


@dataclass(frozen=True)
class LiteBoard:
    """What is known of a Lite competition's leaderboard without having it; None is unknown."""

    competition_id: str
    metric: str
    lower_is_better: bool
    gold: float
    silver: float | None
    bronze: float
    median: float
    size: int
    sha256: str


@dataclass(frozen=True)
class Board:
    """A leaderboard to rank in.

    Attributes:
        origin: ``verified`` equals the SHA-256 list; ``unverified`` is a file that the list does
            not cover, or that was read without the check; ``reported`` holds thresholds only.
        scores: in the file's order, which is the rank; empty when reported. May hold NaN.
        thresholds: silver is NaN where nobody reported it.
        notes: what a reader of the medals should know, one line each.
    """

    competition_id: str
    origin: Origin
    scores: tuple[float, ...]
    lower_is_better: bool
    thresholds: Thresholds
    sha256: str | None
    notes: tuple[str, ...]


@lru_cache(maxsize=1)
def lite_boards() -> dict[str, LiteBoard]:
    """The 22 competitions of MLE-bench Lite in the order of its split list."""
    with REPORTED.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["competition"]: LiteBoard(
            competition_id=row["competition"],
            metric=row["metric"],
            lower_is_better=row["is_lower_better"] == "True",
            gold=float(row["gold"]),
            silver=float(row["silver"]) if row["silver"] else None,
            bronze=float(row["bronze"]),
            median=float(row["median"]),
            size=int(row["leaderboard_csv_bytes"]),
            sha256=row["leaderboard_csv_sha256"],
        )
        for row in rows
    }


def positional_thresholds(scores: Sequence[float]) -> Thresholds:
    """Thresholds at the ranks of the medal rule, *in the order given*; the median skips NaN.

    Differs from `medals.medal_thresholds` only where a leaderboard is not sorted: MLE-bench never
    sorts. Raises `ValueError` without scores.
    """
    gold, silver, bronze = medal_ranks(len(scores))
    return Thresholds(
        gold=scores[gold - 1],
        silver=scores[silver - 1],
        bronze=scores[bronze - 1],
        median=float(pd.Series(scores, dtype="float64").median()),
    )


def read_board(
    path: Path,
    competition_id: str,
    *,
    lower_is_better: bool | None = None,
    verify: bool = True,
    allow_short: bool = False,
) -> Board:
    """The leaderboard file of a competition, checked.

    ``lower_is_better`` is the direction if it is known from elsewhere (for Lite it is); otherwise
    it is inferred as MLE-bench does. ``verify`` False skips size and SHA-256 of a Lite file.
    Raises `UserError` for a missing file, an LFS pointer, a wrong hash, a wrong direction, or (but
    for ``allow_short``) a file of at most 20 rows.
    """
    known = lite_boards().get(competition_id)
    digest = check_file(path, known if verify else None)
    scores = _scores(path)
    if len(scores) <= PAGE_ROWS and not allow_short:
        raise UserError(
            f"{path}: has only {len(scores)} rows, as a download of one page of Kaggle's API has: "
            "medal thresholds from it would be far too hard; get the whole leaderboard, or pass "
            "--allow-short if there were no more teams"
        )
    if known is not None:
        lower_is_better = known.lower_is_better
    inferred = scores[0] < scores[-1]
    notes = _oddities(path, scores)
    # False when the ends are equal, and then the file says nothing about the direction.
    if lower_is_better is not None and scores[0] != scores[-1] and inferred != lower_is_better:
        better = "lower" if lower_is_better else "higher"
        raise UserError(
            f"{path}: is sorted worst first, which would turn the metric round ({better} is "
            f"better in {competition_id}): sort it best first"
        )
    return Board(
        competition_id=competition_id,
        origin="verified" if verify and known is not None else "unverified",
        scores=scores,
        lower_is_better=inferred,
        thresholds=positional_thresholds(scores),
        sha256=digest,
        notes=tuple(notes),
    )


def reported_board(competition_id: str) -> Board:
    """Third-party-reported thresholds of a Lite competition; `UserError` for any other."""
    known = lite_boards().get(competition_id)
    if known is None:
        raise UserError(
            f"no thresholds were reported for {competition_id}: they exist for the 22 competitions "
            "of MLE-bench Lite only; pass --checkout with the leaderboards pulled"
        )
    missing = ["nobody reported silver: what reaches bronze counts as bronze"]
    return Board(
        competition_id=competition_id,
        origin="reported",
        scores=(),
        lower_is_better=known.lower_is_better,
        thresholds=Thresholds(
            gold=known.gold,
            silver=known.silver if known.silver is not None else float("nan"),
            bronze=known.bronze,
            median=known.median,
        ),
        sha256=None,
        notes=(
            "thresholds reported by third parties, not computed: never for a claim",
            *(missing if known.silver is None else []),
        ),
    )


def check_file(path: Path, known: LiteBoard | None) -> str:
    """SHA-256 of a leaderboard file, in hex; `UserError` if it is not the one in the list."""
    if not path.is_file():
        raise UserError(f"no leaderboard {path}: {how_to_pull(path)}")
    if is_pointer(path):
        raise UserError(f"{path}: is a Git LFS pointer, not the file: {how_to_pull(path)}")
    size, digest = path.stat().st_size, _sha256(path)
    if known is not None and size != known.size:
        raise UserError(
            f"{path}: {size:,} bytes where the list has {known.size:,}: {how_to_pull(path)}"
        )
    if known is not None and digest != known.sha256:
        raise UserError(
            f"{path}: SHA-256 {digest[:12]}… where the list has {known.sha256[:12]}…: "
            f"{how_to_pull(path)}"
        )
    return digest


def is_pointer(path: Path) -> bool:
    """Whether a file is only Git LFS's note of where its content lies."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def how_to_pull(path: Path) -> str:
    """The next step for whoever has no leaderboard."""
    return (
        f"in {path.parent}, run `git lfs install && git lfs pull -I '**/leaderboard.csv'`; a Lite "
        "file is then compared with lite_thresholds_reported.csv by size and SHA-256"
    )


def _scores(path: Path) -> tuple[float, ...]:
    try:
        # With pandas' default float parsing, because MLE-bench reads leaderboards so: it can be
        # one unit in the last place off, and a score equal to the threshold decides a medal.
        table = pd.read_csv(path)
        column = pd.to_numeric(table["score"])
    except KeyError:
        raise UserError(f"{path}: needs a column `score`: {how_to_pull(path)}") from None
    except (ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{path}: is not a table of scores ({first}): {how_to_pull(path)}"
        ) from None
    if column.empty:
        raise UserError(f"{path}: has no rows: {how_to_pull(path)}")
    return tuple(float(value) for value in column)


def _oddities(path: Path, scores: Sequence[float]) -> list[str]:
    present = [score for score in scores if score == score]
    notes = []
    if len(present) < len(scores):
        notes.append(f"{path}: {len(scores) - len(present)} rows have no score")
    if len(set(present)) <= 1:
        notes.append(
            f"{path}: all scores are tied, so the direction is unknown and higher is taken as "
            "better: whoever reaches the tie gets gold"
        )
    elif scores[0] == scores[-1]:
        notes.append(f"{path}: first and last score are equal: higher is taken as better")
    elif present != sorted(present, reverse=not scores[0] < scores[-1]):
        notes.append(f"{path}: is not sorted; thresholds are taken by position, as MLE-bench does")
    return notes


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(COPIED):
            digest.update(block)
    return digest.hexdigest()
