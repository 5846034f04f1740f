"""Prepare Lite competitions from what the user downloaded, verified at both ends.

Kaggle's zip is compared with MLE-bench's MD5 before it is unpacked, and the tables made from it
after preparation, so that a prepared folder is the original's or absent. We have preparers for the
small competitions only; for the rest the user's installed MLE-bench prepares (``--engine
mlebench``).
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.folders import (
    FolderCompetition,
    FolderRegistry,
    how_to_get_data,
    md5,
    table_hashes,
)
from agent_tools.mle_bench.leaderboards import is_pointer
from agent_tools.mle_bench.lite.catalogue import lite_competition, lite_ids
from agent_tools.mle_bench.prepare import last_line, run_preparer

PREPARE_SECONDS = 3_600.0

DataState = Literal["missing", "downloaded", "prepared", "verified", "differs"]
BoardState = Literal["missing", "pointer", "wrong", "verified"]


@dataclass(frozen=True)
class LiteStatus:
    """What there is of one Lite competition on this machine.

    Attributes:
        data: ``verified`` where all tables have MLE-bench's MD5; ``prepared`` where there is
            enough to grade but not all to compare.
        preparer: ``ours``, or ``mlebench`` where only the installed program has one.
        reasons: why it cannot be graded, with the next step; empty if it can.
    """

    competition_id: str
    data: DataState
    leaderboard: BoardState
    preparer: str
    reasons: tuple[str, ...]


def lite_status(registry: FolderRegistry) -> list[LiteStatus]:
    """The 22 competitions in the order of the split list; reads, makes nothing."""
    return [_status(registry.get(id_)) for id_ in lite_ids()]


def _status(competition: FolderCompetition) -> LiteStatus:
    reasons = []
    try:
        competition.require_prepared()
    except UserError as error:
        reasons.append(str(error))
    board: BoardState = "verified"
    try:
        competition.board()
    except UserError as error:
        reasons.append(str(error))
        board = "wrong"
        if competition.leaderboard is None or not competition.leaderboard.is_file():
            board = "missing"
        elif is_pointer(competition.leaderboard):
            board = "pointer"
    state = _data_state(competition)
    if state == "differs":
        reasons.append(f"{competition.id}: {first_difference(competition)}: prepare again")
    return LiteStatus(
        competition.id, state, board, "ours" if _ours(competition) else "mlebench", tuple(reasons)
    )


def _ours(competition: FolderCompetition) -> bool:
    return not competition.preparer.startswith("mlebench.")


def _data_state(competition: FolderCompetition) -> DataState:
    if competition.missing() is not None:
        raw, base = competition.raw_dir, competition.raw_dir.parent
        has_raw = raw.is_dir() and any(raw.iterdir())
        return "downloaded" if has_raw or any(base.glob("*.zip")) else "missing"
    if first_difference(competition) is not None:
        return "differs"
    return "verified" if competition.public_dir.is_dir() else "prepared"


def first_difference(competition: FolderCompetition) -> str | None:
    """The first table whose MD5 is not MLE-bench's, in words; None if all there are agree.

    A public folder that is absent is not compared: grading does not need it.
    """
    for part, folder in (("private", competition.private_dir), ("public", competition.public_dir)):
        made = table_hashes(folder) if folder.is_dir() else None
        for name, digest in competition.checksums.items():
            if made is not None and name.startswith(f"{part}/"):
                found = made.get(name.partition("/")[2])
                if found != digest:
                    what = f"has MD5 {found}" if found else "is missing"
                    return f"{name} {what}, MLE-bench's has {digest}"
    return None


def prepare_lite(
    registry: FolderRegistry, competition_id: str, *, verify: bool = True
) -> Literal["unchanged", "prepared"]:
    """Make ``<data>/<id>/prepared`` from the zip in ``<data>/<id>`` or from ``<data>/<id>/raw``.

    ``verify`` False skips both comparisons. Raises `UserError` for a competition we have no
    preparer for, missing data or a wrong MD5, `InfraError` if the preparation fails.
    """
    lite_competition(competition_id)  # an error for any other
    competition = registry.get(competition_id)
    if not _ours(competition):
        raise UserError(
            f"{competition_id}: we have preparers for the small competitions only: run "
            f"`python -m agent_tools.mle_bench lite-prepare {competition_id} --engine mlebench`"
        )
    complete = competition.missing(grading_only=False) is None
    if complete and (not verify or first_difference(competition) is None):
        return "unchanged"
    base = competition.raw_dir.parent
    if not base.is_dir():
        raise UserError(
            f"{competition_id}: no folder {base}: "
            + how_to_get_data(competition_id, base, competition.checksums)
        )
    with _scratch(base) as scratch:
        raw = _raw(competition, scratch, verify=verify)
        _run_preparer(competition, raw, scratch / "prepared")
        made = _moved(competition, scratch / "prepared")
        if verify and (wrong := first_difference(made)) is not None:
            raise UserError(
                f"{competition_id}: {wrong}: the raw data is not the zip that MLE-bench used, or "
                "was changed; fetch it again, or pass --skip-verification"
            )
        if competition.description:
            (made.public_dir / "description.md").write_text(
                competition.description, encoding="utf-8"
            )
        made.private_dir.chmod(0o700)
        target = competition.public_dir.parent
        if target.exists():
            target.rename(scratch / "old")
        (scratch / "prepared").rename(target)
    return "prepared"


def _raw(competition: FolderCompetition, scratch: Path, *, verify: bool) -> Path:
    base = competition.raw_dir.parent
    zips = sorted(base.glob("*.zip"))
    if len(zips) > 1:
        raise UserError(f"{base}: holds {len(zips)} zip files: keep the one that Kaggle gave")
    if zips:
        expected, found = str(competition.checksums.get("zip")), md5(zips[0]) if verify else ""
        if verify and found != expected:
            raise UserError(
                f"{zips[0]}: MD5 {found}, but MLE-bench used {expected}: download it again whole, "
                "or pass --skip-verification if Kaggle has changed it"
            )
    if competition.raw_dir.is_dir() and any(competition.raw_dir.iterdir()):
        return competition.raw_dir
    if not zips:
        how = how_to_get_data(competition.id, base, competition.checksums)
        raise UserError(f"{competition.id}: no data in {base}: {how}")
    try:
        with zipfile.ZipFile(zips[0]) as archive:
            archive.extractall(scratch / "raw")
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{zips[0]}: is not a whole zip file ({error}): download again") from None
    return scratch / "raw"


def _run_preparer(competition: FolderCompetition, raw: Path, prepared: Path) -> None:
    done = run_preparer(
        Path(sys.executable),
        competition.roots[0],
        competition.preparer,
        raw,
        prepared,
        competition.id,
        seconds=PREPARE_SECONDS,
    )
    if done.returncode != 0:
        last = last_line(done.stderr)
        _, told, text = last.partition("UserError: ")
        if told:
            raise UserError(f"{competition.id}: {text}")
        raise InfraError(f"{competition.id}: preparation failed ({last}): is {raw} complete?")


def _moved(competition: FolderCompetition, prepared: Path) -> FolderCompetition:
    from dataclasses import replace

    return replace(competition, public_dir=prepared / "public", private_dir=prepared / "private")


@contextmanager
def _scratch(base: Path) -> Iterator[Path]:
    """A folder beside the data of the competition, which must be there."""
    scratch = base.with_name(f".{base.name}.new")
    if scratch.exists():
        shutil.rmtree(scratch)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)
