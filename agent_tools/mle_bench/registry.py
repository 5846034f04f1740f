"""Suites and competitions: what exists in the repository and what is prepared on this machine."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import Kind, TaskFacts, facts_of
from agent_tools.mle_bench.medals import is_lower_better
from agent_tools.mle_bench.metrics import LOWER_IS_BETTER
from agent_tools.paths import data_dir as default_data_dir

PACKAGE = Path(__file__).resolve().parent
COMPETITIONS = PACKAGE / "competitions"
SUITES = PACKAGE / "suites"
DEFAULT_SUITE = "offline-small-v0"
FOLDS_FILE = "folds.csv"
PRACTICE = "practice-"  # ids of competitions that a catalogue describes, without a folder

Split = Literal["train", "val", "sealed"]
Which = Literal["private", "dev"]
Answer = Literal["number", "text"]


@dataclass(frozen=True)
class CompetitionRef:
    """A suite's line: the competition's id, its split and its stratum."""

    id: str
    split: Split
    strata: str


@dataclass(frozen=True)
class ScriptLimits:
    """What one script of a suite may use: the same for its field and for whoever is scored."""

    cpu_seconds: float = 3.0
    memory_mb: int = 1536


@dataclass(frozen=True)
class SuiteException:
    """A rule of the audit that a competition is known to break, with the number it has."""

    id: str
    rule: str
    value: float
    why: str


@dataclass(frozen=True)
class Suite:
    """A named, versioned list of competitions; suites are never mixed in one comparison.

    `medals` False: too small a field for the medal rule, only percentiles are reported.
    """

    name: str
    version: int
    competitions: tuple[CompetitionRef, ...]
    limits: ScriptLimits = ScriptLimits()
    medals: bool = True
    exceptions: tuple[SuiteException, ...] = ()

    def ids(self, split: Split | None = None) -> tuple[str, ...]:
        """Ids in the suite's order, of one split or of all."""
        return tuple(ref.id for ref in self.competitions if split in (None, ref.split))


@dataclass(frozen=True)
class Config:
    """The parts of a competition's ``config.yaml`` that we read.

    `dev`: public rows are split once more into rows to fit and rows to score. `folds`: disjoint
    parts of the private test that are ranked on their own (1: there is only the whole). `block`:
    that many successive test rows belong together (the pixels of an image).
    """

    id: str
    name: str
    grade_fn: str
    preparer: str
    kind: Kind
    metric: str
    time: bool
    raw: tuple[str, ...]
    dev: bool
    answer: Answer = "number"
    folds: int = 1
    block: int = 1

    @property
    def folder(self) -> Path:
        return COMPETITIONS / self.id

    @property
    def lower_is_better(self) -> bool:
        return LOWER_IS_BETTER[self.metric]


@dataclass(frozen=True)
class Competition:
    """A prepared competition. Leaderboards are best first; empty or None before they are fitted.

    `fold_leaderboards`: the same field, scored on one private fold each; empty for one fold.
    """

    id: str
    split: Split
    strata: str
    metric: str
    lower_is_better: bool
    grade_fn: str
    public_dir: Path
    private_dir: Path
    dev_public_dir: Path | None
    dev_private_dir: Path | None
    leaderboard: tuple[float, ...]
    dev_leaderboard: tuple[float, ...] | None
    description: str
    facts: TaskFacts
    suite: str = DEFAULT_SUITE
    answer: Answer = "number"
    folds: int = 1
    fold_leaderboards: tuple[tuple[float, ...], ...] = ()
    limits: ScriptLimits = ScriptLimits()

    def public(self, which: Which) -> Path:
        """Folder of train.csv, test.csv and sample_submission.csv; `UserError` without dev."""
        return self.public_dir if which == "private" else self._dev(self.dev_public_dir)

    def answers(self, which: Which) -> Path:
        """The file of answers; `UserError` without dev."""
        folder = self.private_dir if which == "private" else self._dev(self.dev_private_dir)
        return folder / "test.csv"

    def field(self, which: Which, fold: int | None = None) -> tuple[float, ...]:
        """The leaderboard that scores are ranked in; `UserError` if it has not been fitted."""
        scores = self.leaderboard if which == "private" else self.dev_leaderboard
        if which == "dev":
            self._dev(self.dev_public_dir)
        if fold is not None:
            self.check_fold(which, fold)
            scores = self.fold_leaderboards[fold] if self.fold_leaderboards else ()
        if not scores:
            raise UserError(
                f"{self.id} has no {which} leaderboard: run `python -m agent_tools.mle_bench fit "
                f"--competition {self.id} --which {which}`"
            )
        return scores

    def check_fold(self, which: Which, fold: int) -> None:
        """`UserError` unless the private test has a fold of this number."""
        if which != "private" or not 0 <= fold < self.folds or self.folds == 1:
            raise UserError(
                f"{self.id} ({which}) has no fold {fold}: "
                + (f"give 0 to {self.folds - 1}" if self.folds > 1 else "leave it out")
            )

    def _dev(self, folder: Path | None) -> Path:
        if folder is None:
            raise UserError(f"{self.id} ({self.split}) has no dev split: use `private`")
        return folder


def suite_names() -> tuple[str, ...]:
    """Names of all suites, sorted."""
    return tuple(sorted(path.stem for path in SUITES.glob("*.yaml")))


def competition_ids() -> tuple[str, ...]:
    """Ids of all competition folders, sorted."""
    return tuple(sorted(path.parent.name for path in COMPETITIONS.glob("*/config.yaml")))


def load_suite(name: str = DEFAULT_SUITE) -> Suite:
    """The suite ``suites/<name>.yaml``; `UserError` for an unknown name."""
    if name not in suite_names():
        raise UserError(f"no suite {name!r}: choose one of {', '.join(suite_names())}")
    data = _read_yaml(SUITES / f"{name}.yaml")
    refs = tuple(CompetitionRef(**entry) for entry in data["competitions"])
    return Suite(
        name=data["name"],
        version=int(data["version"]),
        competitions=refs,
        limits=ScriptLimits(**data.get("limits", {})),
        medals=bool(data.get("medals", True)),
        exceptions=tuple(SuiteException(**entry) for entry in data.get("exceptions", ())),
    )


def load_config(competition_id: str) -> Config:
    """A competition's configuration; `UserError` for an unknown id."""
    if competition_id.startswith(PRACTICE):
        from agent_tools.mle_bench.practice.loading import config_of

        return config_of(competition_id)
    if competition_id not in competition_ids():
        raise UserError(
            f"no competition {competition_id!r}: choose one of {', '.join(competition_ids())}"
        )
    data = _read_yaml(COMPETITIONS / competition_id / "config.yaml")
    ours = data["selfevo"]
    return Config(
        id=data["id"],
        name=data["name"],
        grade_fn=data["grader"]["grade_fn"],
        preparer=data["preparer"],
        kind=cast(Kind, ours["kind"]),
        metric=ours["metric"],
        time=bool(ours["time"]),
        raw=tuple(ours["raw"]),
        dev=bool(ours["dev"]),
        answer=cast(Answer, ours.get("answer", "number")),
        folds=int(ours.get("folds", 1)),
        block=int(ours.get("block", 1)),
    )


def suite_of(competition_id: str) -> Suite:
    """The suite that a competition belongs to; `UserError` if none has it."""
    for name in suite_names():
        suite = load_suite(name)
        if competition_id in suite.ids():
            return suite
    raise UserError(f"competition {competition_id!r} is not in any suite")


def ref_of(competition_id: str, suite: Suite | None = None) -> CompetitionRef:
    """The suite's line for a competition; without a suite, that of the one which has it."""
    suite = suite or suite_of(competition_id)
    for ref in suite.competitions:
        if ref.id == competition_id:
            return ref
    raise UserError(f"competition {competition_id!r} is not in suite {suite.name}")


def load_competition(
    competition_id: str, data_dir: Path | None = None, *, suite: Suite | None = None
) -> Competition:
    """A prepared competition with its leaderboards and facts.

    ``data_dir`` None means `agent_tools.paths.data_dir`. Raises `UserError` for an unknown id,
    missing data, or a leaderboard that is broken or sorted the wrong way.
    """
    config = load_config(competition_id)
    suite = suite or suite_of(competition_id)
    if competition_id.startswith(PRACTICE):
        from agent_tools.mle_bench.practice.loading import load

        return load(competition_id, data_dir, suite)
    ref = ref_of(competition_id, suite)
    base = competition_dir(competition_id, data_dir)
    public, private = base / "prepared" / "public", base / "prepared" / "private"
    needed = [public / "train.csv", private / "test.csv"]
    if config.folds > 1:
        needed.append(private / FOLDS_FILE)
    dev_public = dev_private = None
    if config.dev:
        dev_public, dev_private = base / "dev" / "public", base / "dev" / "private"
        needed += [dev_public / "train.csv", dev_private / "test.csv"]
    for path in needed:
        if not path.is_file():
            raise UserError(
                f"{competition_id} is not prepared (no {path}): run "
                f"`python -m agent_tools.mle_bench prepare --suite {suite.name}`"
            )
    board_file = config.folder / "leaderboard.csv"
    dev_board = None
    if config.dev:
        dev_board = read_leaderboard(config.folder / "dev_leaderboard.csv", config.lower_is_better)
    return Competition(
        id=config.id,
        split=ref.split,
        strata=ref.strata,
        metric=config.metric,
        lower_is_better=config.lower_is_better,
        grade_fn=config.grade_fn,
        public_dir=public,
        private_dir=private,
        dev_public_dir=dev_public,
        dev_private_dir=dev_private,
        leaderboard=read_leaderboard(board_file, config.lower_is_better),
        dev_leaderboard=dev_board,
        description=(config.folder / "description.md").read_text(encoding="utf-8"),
        facts=facts_of(public, config.metric, config.kind, time=config.time),
        suite=suite.name,
        answer=config.answer,
        folds=config.folds,
        fold_leaderboards=_fold_leaderboards(board_file, config),
        limits=suite.limits,
    )


def competition_dir(competition_id: str, data_dir: Path | None = None) -> Path:
    """``<data>/competitions/<id>``, which may not exist."""
    return (data_dir or default_data_dir()) / "competitions" / competition_id


def _fold_leaderboards(path: Path, config: Config) -> tuple[tuple[float, ...], ...]:
    """The columns ``fold_0``, ``fold_1``, …, each best first; empty before the field is fitted."""
    if config.folds == 1 or not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        columns = [[float(row[f"fold_{k}"]) for row in rows] for k in range(config.folds)]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path}: needs columns fold_0 to fold_{config.folds - 1} of numbers: refit it"
        ) from None
    return tuple(tuple(sorted(c, reverse=not config.lower_is_better)) for c in columns)


def read_leaderboard(path: Path, lower_is_better: bool) -> tuple[float, ...]:
    """The ``score`` column, best first; empty if there is no file yet.

    MLE-bench infers the direction from first and last score, so a file sorted the wrong way
    would silently turn the metric round: here it is a `UserError`.
    """
    if not path.is_file():
        return ()
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        scores = tuple(float(row["score"]) for row in rows)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: needs a column `score` of numbers: refit it") from None
    if not scores or not all(math.isfinite(score) for score in scores):
        raise UserError(f"{path}: needs at least one score, all finite: refit it")
    if scores[0] != scores[-1] and is_lower_better(scores) != lower_is_better:
        raise UserError(f"{path}: is sorted worst first: sort it best first")
    return scores


def _read_yaml(path: Path) -> dict[str, Any]:
    return _parsed(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _parsed(path: Path, modified_ns: int) -> dict[str, Any]:
    from ruamel.yaml import YAML

    data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return cast(dict[str, Any], data)
