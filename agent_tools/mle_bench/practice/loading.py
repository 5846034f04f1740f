"""What the registry asks of the practice suite: a competition's configuration, and itself."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import facts_of
from agent_tools.mle_bench.practice.entries import FOLDER, SUITE, entry_of, val_ids
from agent_tools.mle_bench.practice.prepare import source_name
from agent_tools.mle_bench.registry import (
    Competition,
    Config,
    Suite,
    Which,
    competition_dir,
    ref_of,
)

FIELDS = FOLDER / "fields.csv"
GRADERS = "agent_tools.mle_bench.practice.grade"


@dataclass(frozen=True)
class Field:
    """One fitted field: (recipe, score) best first, and what it was fitted with.

    `data` and `scripts` are the first 16 hex digits of SHA-256 over the files and over all scripts
    that were tried.
    """

    scores: tuple[tuple[str, float], ...]
    data: str
    scripts: str
    versions: str


def config_of(competition_id: str) -> Config:
    """The configuration that a competition folder would hold; `UserError` for an unknown id."""
    entry = entry_of(competition_id)
    return Config(
        id=entry.id,
        name=entry.title,
        grade_fn=f"{GRADERS}:{entry.metric}",
        preparer="agent_tools.mle_bench.practice.make:write",
        kind=entry.kind,
        metric=entry.metric,
        time=bool(entry.time),
        raw=(source_name(entry.source),),
        dev=entry.id not in val_ids(),
    )


def load(competition_id: str, data_dir: Path | None, suite: Suite) -> Competition:
    """A prepared practice competition; leaderboards are empty before they are fitted.

    Raises `UserError` for an unknown id, missing data or a broken ``fields.csv``.
    """
    config = config_of(competition_id)
    ref = ref_of(competition_id, suite)
    base = competition_dir(competition_id, data_dir)
    public, private = base / "prepared" / "public", base / "prepared" / "private"
    dev_public = base / "dev" / "public" if config.dev else None
    dev_private = base / "dev" / "private" if config.dev else None
    for folder, name in ((public, "train.csv"), (private, "test.csv"), (dev_private, "test.csv")):
        if folder is not None and not (folder / name).is_file():
            raise UserError(
                f"{competition_id} is not prepared (no {folder / name}): run "
                f"`python -m agent_tools.mle_bench prepare --suite {SUITE}`"
            )
    fields = read_fields()
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
        leaderboard=_board(fields, config.id, "private"),
        dev_leaderboard=_board(fields, config.id, "dev") if config.dev else None,
        description=(public / "description.md").read_text(encoding="utf-8"),
        facts=facts_of(public, config.metric, config.kind, time=config.time),
        suite=suite.name,
        limits=suite.limits,
    )


def _board(
    fields: Mapping[tuple[str, Which], Field], competition_id: str, which: Which
) -> tuple[float, ...]:
    field = fields.get((competition_id, which))
    return tuple(score for _, score in field.scores) if field else ()


def read_fields(path: Path = FIELDS) -> dict[tuple[str, Which], Field]:
    """All fitted fields by (id, private or dev); empty without a file."""
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=4)
def _read(path: Path, modified_ns: int) -> dict[tuple[str, Which], Field]:
    found: dict[tuple[str, Which], Field] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                pairs = [pair.rpartition("=") for pair in row["scores"].split()]
                scores = tuple((name, float(score)) for name, _, score in pairs)
                which: Which = "dev" if row["which"] == "dev" else "private"
                found[row["id"], which] = Field(
                    scores, row["data"], row["scripts"], row["versions"]
                )
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}: row {row.get('id')} is broken: fit it again") from None
    return found


def write_fields(fields: Mapping[tuple[str, Which], Field], path: Path = FIELDS) -> None:
    """Replace the file: one line a field, scores best first to five decimals."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "which", "data", "scripts", "versions", "scores"])
        for (name, which), field in sorted(fields.items()):
            scores = " ".join(f"{recipe}={score:.5f}" for recipe, score in field.scores)
            writer.writerow([name, which, field.data, field.scripts, field.versions, scores])
    temporary.replace(path)
