"""The ledger: one row for every script that was ever scored, in a DuckDB table.

It is a cache of the event logs and their blobs: those of the campaigns, and those that
`selfevo.measure` writes. `open_ledger` reads what is new in the lab and gives a connection with the
table `scores`; deleting the file loses nothing. Nothing in the loop reads it: what stands in it
never reaches a prompt, a digest, the memory or the gate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_tools.errors import InfraError
from selfevo.events import Event
from selfevo.medals import parse_scores
from selfevo.store import read_blob, read_events
from selfevo.views import CampaignView, apply

if TYPE_CHECKING:
    import duckdb

    from agent_tools.mle_bench.registry import Suite

LEDGER_FILE = "ledger.duckdb"
MEDALS_FOLDER = "medals"  # runs/medals/<id>/events.jsonl: measurements outside a campaign
SCHEMA = 2
POLICY = "policy"  # the column `agent` of a campaign's own scripts


@dataclass(frozen=True)
class LedgerRow:
    """One scored script.

    `agent` says who wrote it: ``policy`` alone in a campaign, else the competition agent; `seed` is
    the train seed, or the agent's; `sample` the script's number within seed and competition.
    `board` is what it is ranked in: ``fitted`` for our own fields, else the origin of the user's
    leaderboard. `fold` is None for the whole private test. `job_hours` and `gpu_hours` count all
    training and evaluation of the campaign up to its own measurement of the arm, `wall_hours` the
    time since its start.
    """

    campaign: str
    round: int
    arm: str
    role: str
    agent: str
    commit: str
    checkpoint: str
    suite: str
    suite_version: int
    split: str
    fold: int | None
    evaluator: str
    board: str
    seed: int
    sample: int
    competition: str
    strata: str
    score: float | None
    percentile: float
    gold_threshold: float | None
    silver_threshold: float | None
    bronze_threshold: float | None
    median_threshold: float | None
    medal: str | None
    any_medal: bool
    above_median: bool
    valid: bool
    status: str
    cpu_s: float
    wall_s: float
    tokens: int
    wall_hours: float
    job_hours: float
    gpu_hours: float


_TYPES = {"str": "VARCHAR", "int": "BIGINT", "float": "DOUBLE", "bool": "BOOLEAN"}
COLUMNS = ", ".join(
    f'"{f.name}" {_TYPES[str(f.type).removesuffix(" | None")]}' for f in fields(LedgerRow)
)


@dataclass
class Hours:
    """Time since a campaign's start, and hours of its jobs and of their GPUs, event by event."""

    first_ts: float = 0.0
    jobs_s: float = 0.0
    gpu_s: float = 0.0

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self.first_ts = self.first_ts or event.ts
        if event.kind == "job.done":
            seconds = float(event.data["result"].get("seconds") or 0.0)
            self.jobs_s += seconds
            self.gpu_s += seconds * str(event.data["result"].get("device", "")).startswith("cuda")

    def at(self, event: Event) -> dict[str, float]:
        """The three columns for a row of this event."""
        return {
            "wall_hours": (event.ts - self.first_ts) / 3600,
            "job_hours": self.jobs_s / 3600,
            "gpu_hours": self.gpu_s / 3600,
        }


def rows_of(events: Sequence[Event], folder: Path) -> Iterator[LedgerRow]:
    """Every scored script of a log: a campaign's, or a measurement's."""
    if events and events[0].kind == "measure.start":
        return measurement_rows(events, folder)
    return campaign_rows(events, folder)


def campaign_rows(events: Iterable[Event], folder: Path) -> Iterator[LedgerRow]:
    """Every scored script of a campaign, in the order of its log. `LogError` for a lost blob."""
    view = CampaignView()
    hours = Hours()
    limits: dict[str, dict[str, float]] = {}
    strata: dict[str, str] = {}
    for event in events:
        apply(view, event)
        if event.kind == "campaign.start":
            suite = (view.info["suite"], view.info["suite_version"])
            strata, limits = _strata(*suite), _limits(*suite)
        hours.add(event)
        if event.kind != "eval.scores" or event.data["rows"] is None:
            continue
        about = _about(view, event) | hours.at(event)
        text = read_blob(folder, event.data["rows"]).decode("utf-8")
        for row in parse_scores(text, f"{folder.name}, event {event.seq}"):
            if row["status"] != "infra":
                yield LedgerRow(**about, **_script(row, strata, limits))


def measurement_rows(events: Iterable[Event], folder: Path) -> Iterator[LedgerRow]:
    """Every graded submission of a measurement, in the order of its log."""
    known: dict[tuple[str, int], dict[str, str]] = {}
    for event in events:
        if event.kind != "measure.scores":
            continue
        data = event.data
        suite = (str(data["suite"]), int(data["suite_version"]))
        if suite not in known:
            known[suite] = _strata(*suite)
        names = ("round", "arm", "role", "agent", "commit", "checkpoint")
        about = {"campaign": event.campaign, **{name: data[name] for name in names}}
        about |= {name: data[name] for name in ("suite", "suite_version", "seed")} | data["hours"]
        text = read_blob(folder, data["rows"]).decode("utf-8")
        for row in parse_scores(text, f"{folder.name}, event {event.seq}"):
            own = {"split": row["split"], "fold": row["fold"], "board": row["board"]}
            own |= {"evaluator": row["evaluator_hash"]}
            limits = {str(row["competition"]): row["thresholds"]}
            yield LedgerRow(**about, **own, **_script(row, known[suite], limits))


def _about(view: CampaignView, event: Event) -> dict[str, Any]:
    data = event.data
    arm = data["arm"]
    commits = {pr.arm: pr.commit for pr in view.prs.values()}
    job = view.job_of(str(data["run"]))
    trained = [j for j in view.arm_jobs(arm) if j.seed == data["seed"]]
    checkpoint = trained[-1].result.get("checkpoint") if trained else None
    return {
        "campaign": view.name,
        "round": event.round if job is None else job.round,
        "arm": arm,
        "role": data["role"],
        "agent": POLICY,
        "commit": commits.get(arm, view.info["commit"]),
        "checkpoint": f"{trained[-1].id}/{checkpoint}" if checkpoint else data["parent"],
        "suite": view.info["suite"],
        "suite_version": view.info["suite_version"],
        "split": "val",
        "fold": None,
        "evaluator": data.get("evaluator", ""),
        "board": "fitted",
        "seed": data["seed"],
    }


def _script(
    row: dict[str, Any], strata: dict[str, str], limits: dict[str, dict[str, float]]
) -> dict[str, Any]:
    medal = next((kind for kind in ("gold", "silver", "bronze") if row.get(kind)), None)
    competition = str(row["competition"])
    known = limits.get(competition, {})
    return {
        "sample": int(row.get("index", 0)),
        "competition": competition,
        "strata": strata.get(competition, ""),
        "score": row.get("score"),
        "percentile": float(row["percentile"]) if row["valid"] else 0.0,
        **{f"{name}_threshold": known.get(name) for name in ("gold", "silver", "bronze", "median")},
        "medal": medal,
        "any_medal": medal is not None,
        "above_median": bool(row.get("above_median")),
        "valid": bool(row["valid"]),
        "status": str(row["status"]),
        "cpu_s": float(row.get("cpu_s", 0.0)),
        "wall_s": float(row.get("wall_s", 0.0)),
        "tokens": int(row.get("tokens", 0)),
    }


def _installed(name: str, version: int) -> Suite | None:
    """The suite, if this version of it is the installed one."""
    from agent_tools.mle_bench.registry import load_suite, suite_names

    suite = load_suite(name) if name in suite_names() else None
    return suite if suite is not None and suite.version == version else None


def _strata(name: str, version: int) -> dict[str, str]:
    suite = _installed(name, version)
    return {ref.id: ref.strata for ref in suite.competitions} if suite is not None else {}


def _limits(name: str, version: int) -> dict[str, dict[str, float]]:
    """Medal thresholds by competition."""
    from agent_tools.mle_bench.medals import medal_thresholds
    from agent_tools.mle_bench.registry import load_config, read_leaderboard

    suite, limits = _installed(name, version), {}
    for ref in suite.competitions if suite is not None and suite.medals else ():
        config = load_config(ref.id)
        board = read_leaderboard(config.folder / "leaderboard.csv", config.lower_is_better)
        if board:
            limits[ref.id] = asdict(medal_thresholds(board, config.lower_is_better))
    return limits


# ------------------------------------------------------------------ the table


def open_ledger(folder: Path) -> duckdb.DuckDBPyConnection:
    """A connection with the table `scores`, up to date with every log of a campaign's lab.

    `folder` is LAB/runs/NAME; the file is LAB/runs/ledger.duckdb. For a campaign folder that lies
    elsewhere, and where another process holds the file or it is damaged, the table is built in
    memory.
    """
    import duckdb

    runs = folder.parent
    logs, path = [folder / "events.jsonl"], ":memory:"
    if runs.name == "runs" and (runs.parent / "selfevo.yaml").is_file():
        logs = sorted((*runs.glob("*/events.jsonl"), *runs.glob(f"{MEDALS_FOLDER}/*/events.jsonl")))
        path = str(runs / LEDGER_FILE)
    try:
        connection = _opened(duckdb.connect(path))
    except duckdb.Error:
        connection = _opened(duckdb.connect(":memory:"))
    for log in logs:
        _take_in(connection, log, runs)
    return connection


def _opened(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    connection.execute("CREATE TABLE IF NOT EXISTS about (key VARCHAR PRIMARY KEY, value VARCHAR)")
    found = connection.execute("SELECT value FROM about WHERE key = 'schema'").fetchone()
    if found != (str(SCHEMA),):
        connection.execute("DROP TABLE IF EXISTS scores")
        connection.execute("DELETE FROM about")
        connection.execute("INSERT INTO about VALUES ('schema', ?)", [str(SCHEMA)])
    connection.execute(f"CREATE TABLE IF NOT EXISTS scores (source VARCHAR, {COLUMNS})")
    return connection


def _take_in(connection: duckdb.DuckDBPyConnection, log: Path, runs: Path) -> None:
    """Replace the rows of one log, if it has changed since they were taken."""
    source = log.parent.relative_to(runs).as_posix()
    seen = log.stat()
    mark = json.dumps([seen.st_size, seen.st_mtime_ns, seen.st_ino])
    known = connection.execute("SELECT value FROM about WHERE key = ?", [f"log:{source}"])
    if known.fetchone() == (mark,):
        return
    import duckdb
    import pandas as pd

    rows = [asdict(row) for row in rows_of(read_events(log)[0], log.parent)]
    names = [f.name for f in fields(LedgerRow)]
    table = pd.DataFrame(rows, columns=names).astype(object)  # NaN would not be NULL
    table.insert(0, "source", source)
    try:
        connection.begin()
        connection.execute("DELETE FROM scores WHERE source = ?", [source])
        if rows:
            connection.register("new_rows", table.where(table.notna(), None))
            connection.execute("INSERT INTO scores SELECT * FROM new_rows")
            connection.unregister("new_rows")
        connection.execute("DELETE FROM about WHERE key = ?", [f"log:{source}"])
        connection.execute("INSERT INTO about VALUES (?, ?)", [f"log:{source}", mark])
        connection.commit()
    except duckdb.Error as error:
        connection.rollback()
        raise InfraError(
            f"the ledger could not take in {log} ({error}): delete {runs / LEDGER_FILE}"
        ) from error
