"""Competitions from any number of folders: ours, a checkout of MLE-bench, the user's own.

A competition folder is MLE-bench's (``config.yaml``, ``description.md``, ``grade.py``,
``prepare.py``, ``leaderboard.csv``), and either harness reads the other's. The 22 competitions of
MLE-bench Lite are also known without a checkout: our own graders, reported thresholds.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from agent_tools.errors import UserError
from agent_tools.mle_bench.grade_process import GraderSpec
from agent_tools.mle_bench.leaderboards import Board, lite_boards, read_board, reported_board
from agent_tools.mle_bench.lite.catalogue import checksums, lite_competition
from agent_tools.mle_bench.metrics import LOWER_IS_BETTER
from agent_tools.mle_bench.registry import COMPETITIONS, suite_of
from agent_tools.paths import data_dir as our_data_dir
from agent_tools.paths import repo_root

CHECKOUT_VARIABLE = "SELFEVO_MLEBENCH"
DATA_VARIABLE = "SELFEVO_MLEBENCH_DATA"
HASHED = ("csv", "json", "jsonl", "parquet", "bson")  # what MLE-bench's checksums cover
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
IMPORT = re.compile(r"[^:\s]+:[A-Za-z][A-Za-z0-9_]*")

Graders = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Source:
    """A folder of competition folders.

    Attributes:
        competitions: holds ``<id>/config.yaml``.
        root: what ``description`` is relative to, and what goes on the import path.
        data: holds ``<id>/raw`` and ``<id>/prepared``; paths of ``dataset`` are relative to it.
        python: interpreter of its graders.
    """

    competitions: Path
    root: Path
    data: Path
    python: Path = Path(sys.executable)

    def ids(self) -> list[str]:
        """Names of the folders that hold a ``config.yaml``, sorted."""
        return sorted(path.parent.name for path in self.competitions.glob("*/config.yaml"))


@dataclass(frozen=True)
class FolderCompetition:
    """One competition as its ``config.yaml`` describes it; nothing is read or imported yet.

    ``lower_is_better`` is None where only the leaderboard tells. ``leaderboard`` is None for a
    Lite competition without a checkout. ``checksums`` are MD5 of ``zip`` and of the tables, by
    their paths in ``prepared``; empty where nobody states them.
    """

    id: str
    name: str
    competition_type: str
    description: str
    answers: Path
    sample_submission: Path
    gold_submission: Path
    grader_name: str
    grade_fn: str
    preparer: str
    raw_dir: Path
    public_dir: Path
    private_dir: Path
    leaderboard: Path | None
    checksums: Mapping[str, str]
    lower_is_better: bool | None
    roots: tuple[Path, ...]
    python: Path

    @property
    def spec(self) -> GraderSpec:
        """What the grading process needs."""
        return GraderSpec(self.grade_fn, self.roots, self.answers, self.python)

    def missing(self, *, grading_only: bool = True) -> str | None:
        """What keeps the competition from being prepared, by MLE-bench's rule; None if nothing.

        For grading only, a private folder that is not empty and the answers are enough.
        """
        wanted = [self.private_dir] if grading_only else [self.public_dir, self.private_dir]
        for folder in wanted:
            if not folder.is_dir() or not any(folder.iterdir()):
                return f"no files in {folder}"
        files = [self.answers] if grading_only else [self.answers, self.sample_submission]
        return next((f"no {path}" for path in files if not path.is_file()), None)

    def require_prepared(self) -> None:
        """`UserError` that says what to fetch, where to put it and how it is verified."""
        reason = self.missing()
        if reason is not None:
            raise UserError(f"{self.id} is not prepared ({reason}): {self._how_to_prepare()}")

    def _how_to_prepare(self) -> str:
        if self.id in lite_boards() or self.grade_fn.startswith("mlebench."):
            return how_to_get_data(self.id, self.raw_dir.parent, self.checksums)
        if self.grade_fn.startswith("agent_tools.mle_bench.competitions."):
            suite = suite_of(self.id).name
            return (
                f"run `python -m agent_tools.mle_bench prepare --suite {suite} "
                f"--competition {self.id}`"
            )
        return f"run its preparer {self.preparer} on {self.raw_dir}"

    def board(self, *, verify: bool = True, allow_short: bool = False) -> Board:
        """The leaderboard, verified where its SHA-256 is known; see `read_board`."""
        if self.leaderboard is None:
            raise UserError(
                f"{self.id}: no leaderboard without a checkout of MLE-bench: pass --checkout "
                f"FOLDER or set {CHECKOUT_VARIABLE} (--reported ranks against reported thresholds, "
                "marked)"
            )
        return read_board(
            self.leaderboard,
            self.id,
            lower_is_better=self.lower_is_better,
            verify=verify,
            allow_short=allow_short,
        )

    def reported(self) -> Board:
        """The marked fallback; `UserError` outside Lite."""
        return reported_board(self.id)


@dataclass(frozen=True)
class FolderRegistry:
    """Competitions of several sources, and of Lite.

    ``graders`` chooses for Lite competitions between ours and those of the checkout. ``lite_data``
    is the data folder of Lite competitions that no source has.
    """

    sources: tuple[Source, ...]
    lite_data: Path = field(default_factory=lambda: mlebench_data_dir())
    graders: Graders = "ours"

    def ids(self) -> list[str]:
        """Ids of all sources and of Lite, sorted."""
        found = {id_ for source in self.sources for id_ in source.ids()}
        return sorted(found | set(lite_boards()))

    def get(self, competition_id: str) -> FolderCompetition:
        """One competition; `UserError` for an unknown, doubled or unusable id or a bad config."""
        check_id(competition_id)
        homes = [s for s in self.sources if (s.competitions / competition_id).is_dir()]
        if len(homes) > 1:
            where = " and ".join(str(source.competitions) for source in homes)
            raise UserError(f"{competition_id} is in {where}: leave one of the folders out")
        if homes:
            found = read_config(homes[0], competition_id)
        elif competition_id in lite_boards():
            found = _lite_competition(competition_id, self.lite_data)
        else:
            known = self.ids()
            shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if known[8:] else "")
            raise UserError(f"no competition {competition_id!r}: choose one of {shown}")
        if self.graders == "ours" and competition_id in lite_boards():
            return _with_our_graders(found)
        return found


def registry_of(
    *,
    checkout: Path | None = None,
    folders: Sequence[Path] = (),
    data_dir: Path | None = None,
    python: Path | None = None,
    graders: Graders = "ours",
) -> FolderRegistry:
    """Our competitions, then a checkout (default ``SELFEVO_MLEBENCH``), then further folders.

    ``data_dir`` is MLE-bench's (see `mlebench_data_dir`) and also that of further folders; ours
    stay in `agent_tools.paths.data_dir`. ``python`` runs the graders of the checkout.
    """
    data = data_dir or mlebench_data_dir()
    sources = [Source(COMPETITIONS, repo_root(), our_data_dir() / "competitions")]
    named = os.environ.get(CHECKOUT_VARIABLE, "").strip()
    checkout = checkout or (Path(named).expanduser() if named else None)
    others = [*([checkout] if checkout else []), *folders]
    sources += [source_of(folder, data, python) for folder in others]
    return FolderRegistry(tuple(sources), data, graders)


def source_of(folder: Path, data: Path, python: Path | None = None) -> Source:
    """A checkout of MLE-bench, or any folder that holds competition folders.

    The root is the checkout, else the nearest folder upwards from which a description is found.
    Raises `UserError` where there is no competition.
    """
    folder = folder.absolute()
    inner = folder / "mlebench" / "competitions"
    competitions = inner if inner.is_dir() else folder
    first = next(iter(sorted(competitions.glob("*/config.yaml"))), None)
    if first is None:
        raise UserError(
            f"{folder}: holds no competition (no */config.yaml, no mlebench/competitions): name a "
            "clone of github.com/openai/mle-bench, or a folder of competition folders"
        )
    description = str(_mapping(first).get("description", ""))
    roots = [folder] if competitions == inner else [competitions, *competitions.parents]
    root = next((root for root in roots if (root / description).is_file()), roots[0])
    return Source(competitions, root, data.absolute(), python or Path(sys.executable))


def mlebench_data_dir() -> Path:
    """``SELFEVO_MLEBENCH_DATA``, else MLE-bench's own default in the user's cache folder."""
    named = os.environ.get(DATA_VARIABLE, "").strip()
    if named:
        return Path(named).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return Path(cache).expanduser() / "mle-bench" / "data"


def check_id(competition_id: str) -> None:
    """`UserError` unless the id can be a folder's name and survives a run group.

    MLE-bench takes the id of a run as the text before the first underscore of its folder, so an
    underscore would silently grade another competition or none.
    """
    if "_" in competition_id:
        raise UserError(
            f"competition id {competition_id!r} holds an underscore, and MLE-bench cuts the names "
            "of run folders there: rename the competition with hyphens"
        )
    if not ID.fullmatch(competition_id):
        raise UserError(
            f"competition id {competition_id!r}: use letters, digits, hyphens and dots only"
        )


def read_config(source: Source, competition_id: str) -> FolderCompetition:
    """``config.yaml`` of one folder; `UserError` names the file and the key that is wrong."""
    check_id(competition_id)
    path = source.competitions / competition_id / "config.yaml"
    data = _mapping(path)
    if _text(path, data, "id") != competition_id:
        raise UserError(f"{path}: id is {data['id']!r}, but the folder is {competition_id}: rename")
    dataset, grader = _part(path, data, "dataset"), _part(path, data, "grader")
    description = source.root / _text(path, data, "description")
    if not description.is_file():
        raise UserError(f"{path}: description {description} does not exist: it is relative to the "
                        "root of the repository")  # fmt: skip
    answers = source.data / _text(path, dataset, "answers", "dataset.")
    gold = dataset.get("gold_submission")
    base = source.data / competition_id
    ours = data.get("selfevo")
    metric = ours.get("metric") if isinstance(ours, dict) else None
    hashes = source.competitions / competition_id / "checksums.yaml"
    return FolderCompetition(
        id=competition_id,
        name=_text(path, data, "name"),
        competition_type=_text(path, data, "competition_type"),
        description=description.read_text(encoding="utf-8"),
        answers=answers,
        sample_submission=source.data / _text(path, dataset, "sample_submission", "dataset."),
        gold_submission=source.data / str(gold) if gold else answers,
        grader_name=_text(path, grader, "name", "grader."),
        grade_fn=_import_string(path, grader, "grade_fn", "grader."),
        preparer=_import_string(path, data, "preparer"),
        raw_dir=base / "raw",
        public_dir=base / "prepared" / "public",
        private_dir=base / "prepared" / "private",
        leaderboard=source.competitions / competition_id / "leaderboard.csv",
        checksums=_checksums(hashes) if hashes.is_file() else {},
        lower_is_better=LOWER_IS_BETTER.get(str(metric)),
        roots=(source.root,),
        python=source.python,
    )


def how_to_get_data(competition_id: str, base: Path, checksums: Mapping[str, str]) -> str:
    """Three steps, one line: fetch, put, verify."""
    zip_md5 = checksums.get("zip", "that of checksums.yaml")
    return (
        f"accept the rules at kaggle.com/c/{competition_id}/rules with your Kaggle account, "
        f"download the competition's data as one zip (MD5 {zip_md5}) into {base}, then run "
        f"`python -m agent_tools.mle_bench lite-prepare {competition_id}`, which compares the zip "
        "and what it makes with MLE-bench's checksums"
    )


def table_hashes(folder: Path) -> dict[str, str]:
    """MD5 of the tables directly in a folder, by name: what MLE-bench's checksums cover."""
    return {
        path.name: md5(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix[1:] in HASHED
    }


def md5(path: Path) -> str:
    """MD5 of a file in hex: MLE-bench's checksum, no protection against forgery."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _lite_competition(competition_id: str, data: Path) -> FolderCompetition:
    entry, base = lite_competition(competition_id), data / competition_id
    prepared = base / "prepared"
    return FolderCompetition(
        id=competition_id,
        name=entry.title,
        competition_type="simple",
        description="",
        answers=prepared / entry.answers,
        sample_submission=prepared / entry.sample,
        gold_submission=prepared / (entry.gold or entry.answers),
        grader_name=entry.metric,
        grade_fn=f"mlebench.competitions.{competition_id}.grade:grade",
        preparer=f"mlebench.competitions.{competition_id}.prepare:prepare",
        raw_dir=base / "raw",
        public_dir=prepared / "public",
        private_dir=prepared / "private",
        leaderboard=None,
        checksums=checksums(competition_id),
        lower_is_better=entry.lower_is_better,
        roots=(),
        python=Path(sys.executable),
    )


def _with_our_graders(found: FolderCompetition) -> FolderCompetition:
    entry = lite_competition(found.id)
    return replace(
        found,
        grade_fn=entry.grade_fn,
        preparer=entry.preparer or found.preparer,
        checksums=checksums(found.id),
        lower_is_better=entry.lower_is_better,
        roots=(repo_root(),),
        python=Path(sys.executable),
    )


def _checksums(path: Path) -> dict[str, str]:
    data = _mapping(path)
    found = {"zip": str(data["zip"])} if "zip" in data else {}
    for part in ("public", "private"):
        tables = data.get(part) or {}
        if not isinstance(tables, dict):
            raise UserError(f"{path}: {part!r} must map file names to MD5: see docs/mle_bench.md")
        found |= {f"{part}/{name}": str(digest) for name, digest in tables.items()}
    return found


def _mapping(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}: a competition folder needs one") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({str(error).splitlines()[0]}): mend it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys: see docs/mle_bench.md")
    return data


def _part(path: Path, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = data.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{path}: needs a mapping {key!r}: see docs/mle_bench.md")
    return part


def _text(path: Path, data: Mapping[str, Any], key: str, prefix: str = "") -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{path}: needs a text {prefix + key!r}: see docs/mle_bench.md")
    return value


def _import_string(path: Path, data: Mapping[str, Any], key: str, prefix: str = "") -> str:
    value = _text(path, data, key, prefix)
    if not IMPORT.fullmatch(value):
        raise UserError(f"{path}: {prefix + key} must be package.module:function, not {value!r}")
    return value
