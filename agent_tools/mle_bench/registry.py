"""Suites and competitions: what exists in the repository and what is prepared on this machine."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
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

Split = Literal["train", "val"]
Which = Literal["private", "dev"]


@dataclass(frozen=True)
class CompetitionRef:
    """A suite's line: the competition's id, its split and its stratum."""

    id: str
    split: Split
    strata: str


@dataclass(frozen=True)
class Suite:
    """A named, versioned list of competitions; suites are never mixed in one comparison."""

    name: str
    version: int
    competitions: tuple[CompetitionRef, ...]

    def ids(self, split: Split | None = None) -> tuple[str, ...]:
        """Ids in the suite's order, of one split or of all."""
        return tuple(ref.id for ref in self.competitions if split in (None, ref.split))


@dataclass(frozen=True)
class Config:
    """The parts of a competition's ``config.yaml`` that we read."""

    id: str
    name: str
    grade_fn: str
    preparer: str
    kind: Kind
    metric: str
    time: bool
    raw: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return COMPETITIONS / self.id

    @property
    def lower_is_better(self) -> bool:
        return LOWER_IS_BETTER[self.metric]


@dataclass(frozen=True)
class Competition:
    """A prepared competition. Leaderboards are best first; empty or None before they are fitted."""

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

    def public(self, which: Which) -> Path:
        """Folder of train.csv, test.csv and sample_submission.csv; `UserError` without dev."""
        return self.public_dir if which == "private" else self._dev(self.dev_public_dir)

    def answers(self, which: Which) -> Path:
        """The file of answers; `UserError` without dev."""
        folder = self.private_dir if which == "private" else self._dev(self.dev_private_dir)
        return folder / "test.csv"

    def field(self, which: Which) -> tuple[float, ...]:
        """The leaderboard that scores are ranked in; `UserError` if it has not been fitted."""
        scores = self.leaderboard if which == "private" else self.dev_leaderboard
        if which == "dev":
            self._dev(self.dev_public_dir)
        if not scores:
            raise UserError(
                f"{self.id} has no {which} leaderboard: run `python -m agent_tools.mle_bench fit "
                f"--competition {self.id} --which {which}`"
            )
        return scores

    def _dev(self, folder: Path | None) -> Path:
        if folder is None:
            raise UserError(
                f"{self.id} is a {self.split} competition and has no dev split: use `private`"
            )
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
    return Suite(name=data["name"], version=int(data["version"]), competitions=refs)


def load_config(competition_id: str) -> Config:
    """A competition's configuration; `UserError` for an unknown id."""
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
    )


def ref_of(competition_id: str, suite: Suite | None = None) -> CompetitionRef:
    """The suite's line for a competition; without a suite, that of the first which has it."""
    suites = [suite] if suite else [load_suite(name) for name in suite_names()]
    for candidate in suites:
        for ref in candidate.competitions:
            if ref.id == competition_id:
                return ref
    where = f"suite {suite.name}" if suite else "any suite"
    raise UserError(f"competition {competition_id!r} is not in {where}")


def load_competition(
    competition_id: str, data_dir: Path | None = None, *, suite: Suite | None = None
) -> Competition:
    """A prepared competition with its leaderboards and facts.

    ``data_dir`` None means `agent_tools.paths.data_dir`. Raises `UserError` for an unknown id,
    missing data, or a leaderboard that is broken or sorted the wrong way.
    """
    config = load_config(competition_id)
    ref = ref_of(competition_id, suite)
    base = competition_dir(competition_id, data_dir)
    public, private = base / "prepared" / "public", base / "prepared" / "private"
    needed = [public / "train.csv", private / "test.csv"]
    dev_public = dev_private = None
    if ref.split == "train":
        dev_public, dev_private = base / "dev" / "public", base / "dev" / "private"
        needed += [dev_public / "train.csv", dev_private / "test.csv"]
    for path in needed:
        if not path.is_file():
            suite_name = suite.name if suite else DEFAULT_SUITE
            raise UserError(
                f"{competition_id} is not prepared (no {path}): run "
                f"`python -m agent_tools.mle_bench prepare --suite {suite_name}`"
            )
    dev_board = None
    if ref.split == "train":
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
        leaderboard=read_leaderboard(config.folder / "leaderboard.csv", config.lower_is_better),
        dev_leaderboard=dev_board,
        description=(config.folder / "description.md").read_text(encoding="utf-8"),
        facts=facts_of(public, config.metric, config.kind, time=config.time),
    )


def competition_dir(competition_id: str, data_dir: Path | None = None) -> Path:
    """``<data>/competitions/<id>``, which may not exist."""
    return (data_dir or default_data_dir()) / "competitions" / competition_id


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
    from ruamel.yaml import YAML

    data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return cast(dict[str, Any], data)
