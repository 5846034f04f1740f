"""A snapshot of the reduced view beside the log, so that a long log is not reduced anew each time.

It is a cache and never the truth: one that does not carry the hash of the log's own beginning, or
is of another reducer, or is damaged, is passed over, and the whole log is reduced. `fold` is the
only reader: snapshot (if it holds) and the events after it, through the one reducer.

`view.snapshot` holds a line with the blake2b of the reducer's code and of what follows, a line of
JSON (what it covers) and the view as JSON, compressed with zlib.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from selfevo.events import Event
from selfevo.gate import SeedScore
from selfevo.records import CampaignView, JobView, PrView, RoundView, ScoreView, TurnView
from selfevo.store import (
    LOG,
    NOTHING,
    Extent,
    Store,
    no_collection,
    parse_events,
    read_log,
)
from selfevo.views import apply

SNAPSHOT = "view.snapshot"
#: A snapshot is due this many events after the last one, or this share of those that it covers if
#: that is more: so writing them all costs a constant share of a campaign.
EVERY = 1000
SHARE = 1 / 8
_LEVEL = 1  # zlib's fastest: a tenth of the size for a hundredth of a round
#: The modules that say what a view is. A snapshot of other code is passed over; read when this is
#: imported, for files may change under a process that runs.
MODULES = ("events", "gate", "records", "snapshot", "views")
CODE = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in MODULES)


@dataclass(frozen=True)
class _Covers:
    """The part of a log that a snapshot stands for; `log` is the blake2b of its `end` bytes."""

    events: int
    end: int
    log: str


@dataclass(frozen=True)
class Folded:
    """A campaign's log, reduced; `covered` events came from the snapshot."""

    view: CampaignView
    extent: Extent
    covered: int


def fold(folder: Path) -> Folded:
    """The view after all whole events of a campaign's log. Writes nothing.

    Raises `LogError` where there is no log, or where it is damaged.
    """
    kept = _kept(folder)  # before the log, which only grows
    path = folder / LOG
    raw = read_log(path)
    view, before = (kept and _held(kept, raw)) or (CampaignView(), NOTHING)
    events, extent = parse_events(raw, path, before)
    for event in events:
        apply(view, event)
    return Folded(view, extent, before.events)


class Keeper:
    """Writes the snapshot now and then, between two nodes.

    A listener of `store`, after the one that folds its events into `view`.
    """

    def __init__(self, store: Store, view: CampaignView, covered: int) -> None:
        self.store = store
        self.view = view
        self._due = _next(covered)

    def __call__(self, event: Event) -> None:
        if event.kind == "phase" and event.seq >= self._due:
            self._due = _next(event.seq)
            keep(self.store.folder, self.view, self.store.extent)


def _next(covered: int) -> int:
    return covered + max(EVERY, int(covered * SHARE))


def keep(folder: Path, view: CampaignView, extent: Extent) -> None:
    """Write the snapshot of a view, in place of the last one; without one where that fails."""
    covers = _Covers(extent.events, extent.end, extent.digest.hexdigest())
    packed = zlib.compress(json.dumps(dump(view), separators=(",", ":")).encode(), _LEVEL)
    body = json.dumps(asdict(covers)).encode() + b"\n" + packed
    path = folder / SNAPSHOT
    part = path.with_suffix(".part")
    try:
        # no fsync: what a dead machine leaves of it is told by the seal
        part.write_bytes(_seal(body) + b"\n" + body)
        part.replace(path)
    except OSError:  # a cache: the campaign goes on, and says what fails where it must write
        with contextlib.suppress(OSError):
            part.unlink()


def _kept(folder: Path) -> tuple[_Covers, bytes] | None:
    """(what it covers, packed view) of a whole snapshot of this code; None for others."""
    try:
        seal, body = (folder / SNAPSHOT).read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    if seal != _seal(body):
        return None
    line, packed = body.split(b"\n", 1)
    return _Covers(**json.loads(line)), packed


def _held(kept: tuple[_Covers, bytes], raw: bytes) -> tuple[CampaignView, Extent] | None:
    """The view in a snapshot and what it covers, if the log begins as it did then."""
    covers, packed = kept
    digest = hashlib.blake2b(memoryview(raw)[: covers.end])
    if len(raw) < covers.end or digest.hexdigest() != covers.log:
        return None
    with no_collection():
        try:
            values = from_json(zlib.decompress(packed), cache_strings="keys")  # json's speed twice
        except ValueError:  # json writes half a surrogate, which this does not read
            return None
        return load(values), Extent(covers.events, covers.end, digest)


def _seal(body: bytes) -> bytes:
    return hashlib.blake2b(CODE + body).hexdigest().encode()


# ------------------------------------------------------------------ the view as JSON values


def _names(kind: type, *without: str) -> list[str]:
    return [field.name for field in fields(kind) if field.name not in without]


_INDEXED = ("rounds", "prs", "jobs", "jobs_of_run", "jobs_of_arm", "scores", "scores_of_arm")
_PLAIN = _names(CampaignView, *_INDEXED)
_ROUND = _names(RoundView, "turns", "all_turns")
_SCORE = _names(ScoreView, "score")
_job, _turn, _pr = (attrgetter(*_names(kind)) for kind in (JobView, TurnView, PrView))
_round, _score, _seed = attrgetter(*_ROUND), attrgetter(*_SCORE), attrgetter(*_names(SeedScore))


def dump(view: CampaignView) -> dict[str, Any]:
    """JSON values that `load` makes an equal view of: a record is the list of its fields, and one
    that stands in several places is written once and named there by its number."""
    jobs = [job for group in view.jobs_of_run.values() for job in group]
    scores = [score for group in view.scores_of_arm.values() for score in group]
    job_number = {id(job): i for i, job in enumerate(jobs)}
    score_number = {id(score): i for i, score in enumerate(scores)}
    return {
        "plain": {name: getattr(view, name) for name in _PLAIN},
        "rounds": [
            # the turns of the present conversation are the last ones of all
            [_round(r), [_turn(turn) for turn in r.all_turns], len(r.turns)]
            for r in view.rounds.values()
        ],
        "prs": [_pr(pr) for pr in view.prs.values()],
        "all_jobs": [_job(job) for job in jobs],
        "jobs": [job_number[id(job)] for job in view.jobs.values()],
        "jobs_of_run": _groups(view.jobs_of_run.values(), job_number),
        "jobs_of_arm": _groups(view.jobs_of_arm.values(), job_number),
        "all_scores": [[_score(score), _seed(score.score)] for score in scores],
        "scores": [score_number[id(score)] for score in view.scores.values()],
        "scores_of_arm": _groups(view.scores_of_arm.values(), score_number),
    }


def _groups(groups: Iterable[list[Any]], number: dict[int, int]) -> list[list[int]]:
    return [[number[id(record)] for record in group] for group in groups]


def load(values: dict[str, Any]) -> CampaignView:
    """The view in what `dump` made."""
    jobs = [JobView(*row) for row in values["all_jobs"]]
    scores = [
        ScoreView(**dict(zip(_SCORE, row, strict=True)), score=SeedScore(*seed))
        for row, seed in values["all_scores"]
    ]
    rounds = [_load_round(*row) for row in values["rounds"]]
    prs = [PrView(*row) for row in values["prs"]]
    for pr in prs:
        commit, parent = pr.replaced
        pr.replaced = (commit, parent)
    job_groups = [[jobs[i] for i in group] for group in values["jobs_of_run"]]
    arm_groups = [[jobs[i] for i in group] for group in values["jobs_of_arm"]]
    score_groups = [[scores[i] for i in group] for group in values["scores_of_arm"]]
    return CampaignView(
        **values["plain"],
        rounds={r.number: r for r in rounds},
        prs={pr.number: pr for pr in prs},
        jobs={jobs[i].key: jobs[i] for i in values["jobs"]},
        jobs_of_run={group[0].run: group for group in job_groups},
        jobs_of_arm={(group[0].arm, group[0].kind): group for group in arm_groups},
        scores={scores[i].run: scores[i] for i in values["scores"]},
        scores_of_arm={group[0].arm: group for group in score_groups},
    )


def _load_round(row: list[Any], turn_rows: list[list[Any]], present: int) -> RoundView:
    turns = [TurnView(*turn) for turn in turn_rows]
    return RoundView(
        **dict(zip(_ROUND, row, strict=True)),
        turns=turns[len(turns) - present :],
        all_turns=turns,
    )
