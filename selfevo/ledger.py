"""The ledger: one row for every script that was ever scored, in a DuckDB table.

It is a cache of the event logs and their blobs. `open_ledger` reads what is new in the lab and
gives a connection with the table `scores`; deleting the file loses nothing. Nothing in the loop
reads it: what stands in it never reaches a prompt, a digest, the memory or the gate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
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

LEDGER_FILE = "ledger.duckdb"
MEDALS_FOLDER = "medals"  # runs/medals/<id>/events.jsonl: measurements outside a campaign
SCHEMA = 1


@dataclass(frozen=True)
class LedgerRow:
    """One scored script.

    `seed` is the train seed, `sample` the script's number within seed and competition; `fold` is
    None for the whole private test. `job_hours` and `gpu_hours` count all training and evaluation
    of the campaign up to this measurement, `wall_hours` the time since its start.
    """

    campaign: str
    round: int
    arm: str
    role: str
    commit: str
    checkpoint: str
    suite: str
    suite_version: int
    split: str
    fold: int | None
    evaluator: str
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


def campaign_rows(events: Iterable[Event], folder: Path) -> Iterator[LedgerRow]:
    """Every scored script of a campaign, in the order of its log. `LogError` for a lost blob."""
    view = CampaignView()
    jobs_s = gpu_s = 0.0
    limits: dict[str, dict[str, float]] = {}
    strata: dict[str, str] = {}
    for event in events:
        apply(view, event)
        if event.kind == "campaign.start":
            strata, limits = _suite_facts(view.info["suite"], view.info["suite_version"])
        if event.kind == "job.done":
            seconds = float(event.data["result"].get("seconds") or 0.0)
            jobs_s += seconds
            gpu_s += seconds * str(event.data["result"].get("device", "")).startswith("cuda")
        if event.kind != "eval.scores" or event.data["rows"] is None:
            continue
        about = _about(view, event) | {
            "wall_hours": (event.ts - view.first_ts) / 3600,
            "job_hours": jobs_s / 3600,
            "gpu_hours": gpu_s / 3600,
        }
        text = read_blob(folder, event.data["rows"]).decode("utf-8")
        for row in parse_scores(text, f"{folder.name}, event {event.seq}"):
            if row["status"] != "infra":
                yield LedgerRow(**about, **_script(row, strata, limits))


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
        "commit": commits.get(arm, view.info["commit"]),
        "checkpoint": f"{trained[-1].id}/{checkpoint}" if checkpoint else data["parent"],
        "suite": view.info["suite"],
        "suite_version": view.info["suite_version"],
        "split": "val",
        "fold": None,
        "evaluator": data.get("evaluator", ""),
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


def _suite_facts(name: str, version: int) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Strata and thresholds of the suite, as far as this version of it is the installed one."""
    from agent_tools.mle_bench.medals import medal_thresholds
    from agent_tools.mle_bench.registry import (
        load_config,
        load_suite,
        read_leaderboard,
        suite_names,
    )

    if name not in suite_names() or load_suite(name).version != version:
        return {}, {}
    suite = load_suite(name)
    limits = {}
    for ref in suite.competitions if suite.medals else ():
        config = load_config(ref.id)
        board = read_leaderboard(config.folder / "leaderboard.csv", config.lower_is_better)
        if board:
            limits[ref.id] = asdict(medal_thresholds(board, config.lower_is_better))
    return {ref.id: ref.strata for ref in suite.competitions}, limits


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

    rows = [asdict(row) for row in campaign_rows(read_events(log)[0], log.parent)]
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
