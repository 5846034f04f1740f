"""``python -m agent_tools.mle_bench list | prepare | grade | fit | audit``, and MLE-bench's own.

Exit codes: 0 done, 1 the answer is no (an invalid submission, a field that fails its checks),
2 usage, 5 infrastructure. With ``--json`` stdout carries JSON only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_tools.cli_main import run_app
from agent_tools.errors import UserError
from agent_tools.mle_bench import cli_compat
from agent_tools.mle_bench.registry import (
    COMPETITIONS,
    DEFAULT_SUITE,
    PRACTICE,
    Competition,
    Suite,
    Which,
    load_competition,
    load_config,
    load_suite,
    ref_of,
)

if TYPE_CHECKING:
    from agent_tools.mle_bench.audit import Finding
    from agent_tools.sandbox import ScriptPool

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)

app.add_typer(cli_compat.app)

SuiteOption = Annotated[str, typer.Option("--suite", help="name of the suite")]
DataOption = Annotated[
    Path | None, typer.Option("--data-dir", help="data folder [default: SELFEVO_DATA or .data]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]
WhichOption = Annotated[str, typer.Option("--which", help="private or dev")]


def main() -> None:
    """Run the command; user and infrastructure errors become one line and an exit code."""
    run_app(app, "python -m agent_tools.mle_bench")


@app.command("list")
def list_command(
    suite: SuiteOption = DEFAULT_SUITE, data_dir: DataOption = None, as_json: JsonOption = False
) -> None:
    """Show the suite's competitions, their facts and their medal thresholds."""
    rows = [_list_row(load_suite(suite), id_, data_dir) for id_ in load_suite(suite).ids()]
    if as_json:
        print(json.dumps({"suite": suite, "competitions": rows}))
        return
    print(
        f"{'competition':20} {'split':6} {'kind':11} {'metric':8} gold / silver / bronze / median"
    )
    for row in rows:
        if not row["prepared"]:
            print(f"{row['id']:20} {row['split']:6} not prepared")
            continue
        limits = row["thresholds"]
        fitted = f"{row['entries']} entries" if row["entries"] else "not fitted"
        shown = " / ".join(f"{value:.5f}" for value in limits.values()) if limits else fitted
        print(
            f"{row['id']:20} {row['split']:6} {row['facts']['kind']:11} {row['metric']:8} {shown}"
        )


def _list_row(suite: Suite, competition_id: str, data_dir: Path | None) -> dict[str, Any]:
    from dataclasses import asdict

    from agent_tools.mle_bench.medals import medal_thresholds

    ref = ref_of(competition_id, suite)
    row: dict[str, Any] = {"id": ref.id, "split": ref.split, "strata": ref.strata}
    try:
        competition = load_competition(ref.id, data_dir, suite=suite)
    except UserError as error:
        return row | {"prepared": False, "reason": str(error)}
    board = competition.leaderboard
    return row | {
        "prepared": True,
        "metric": competition.metric,
        "lower_is_better": competition.lower_is_better,
        "facts": asdict(competition.facts),
        "entries": len(board),
        "thresholds": asdict(medal_thresholds(board, competition.lower_is_better))
        if board and suite.medals
        else None,
    }


@app.command()
def prepare(
    suite: SuiteOption = DEFAULT_SUITE,
    competition: Annotated[str | None, typer.Option("--competition", help="only this one")] = None,
    sealed: Annotated[
        bool, typer.Option("--sealed", help="the sealed competitions instead of the others")
    ] = False,
    data_dir: DataOption = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="write data_hashes.yaml instead of checking it")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the data of a suite; does nothing where it is already there and right."""
    from agent_tools.mle_bench.prepare import data_root, prepare_competition

    start = time.monotonic()
    chosen = load_suite(suite)
    refs = [ref_of(competition, chosen)] if competition else chosen.competitions
    ids = [ref.id for ref in refs if (ref.split == "sealed") == sealed]
    if not ids:
        raise UserError(
            f"{competition} is sealed: add --sealed, and read docs/offline_suite.md first"
            if competition and not sealed
            else f"no sealed competition among those of suite {suite}: leave out --sealed"
        )
    states: dict[str, str] = {}

    def done(competition_id: str, state: str) -> None:
        states[competition_id] = state
        print(f"{competition_id}: {state}", file=sys.stderr)

    practice = [competition_id for competition_id in ids if competition_id.startswith(PRACTICE)]
    if practice:
        from agent_tools.mle_bench.practice.prepare import prepare as prepare_practice

        prepare_practice(practice, data_dir, freeze=freeze, progress=done)
    for competition_id in ids:
        if competition_id not in states:
            done(competition_id, prepare_competition(competition_id, data_dir, freeze=freeze))
    seconds = round(time.monotonic() - start, 2)
    if as_json:
        where = str(data_root(data_dir))
        print(json.dumps({"data_dir": where, "competitions": states, "seconds": seconds}))


@app.command()
def grade(
    competition: Annotated[str, typer.Option("--competition", help="competition id")],
    submission: Annotated[Path, typer.Option("--submission", help="a .csv file")],
    which: WhichOption = "private",
    data_dir: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Grade one submission; exit code 1 if it is invalid."""
    from agent_tools.mle_bench import grading

    report = grading.grade(load_competition(competition, data_dir), submission, _which(which))
    if as_json:
        print(json.dumps(report.to_dict()))
    elif not report.valid:
        print(f"{competition} ({which}): invalid: {report.error}")
    else:
        medal = next((m for m in ("gold", "silver", "bronze") if getattr(report, m)), "no medal")
        print(
            f"{competition} ({which}): score {report.score:.5f}, percentile "
            f"{report.percentile:.1f}, {medal} (offline medal)"
        )
    raise typer.Exit(0 if report.valid else 1)


def _which(text: str) -> Which:
    if text == "private":
        return "private"
    if text == "dev":
        return "dev"
    raise UserError(f"--which {text!r}: choose private or dev")


@app.command()
def fit(
    competition: Annotated[
        list[str] | None, typer.Option("--competition", help="repeatable [default: the suite]")
    ] = None,
    suite: SuiteOption = DEFAULT_SUITE,
    which: Annotated[str, typer.Option("--which", help="private, dev or both")] = "both",
    workers: Annotated[int, typer.Option("--workers", min=1)] = 2,
    sandbox: Annotated[
        str, typer.Option("--sandbox", help="bubblewrap, docker or process")
    ] = "bubblewrap",
    check: Annotated[
        bool, typer.Option("--check", help="only check; writes no leaderboard and no losses")
    ] = False,
    refit: Annotated[
        bool, typer.Option("--refit", help="only refit three committed entries and compare")
    ] = False,
    data_dir: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit the reference field of competitions, check it, and write its leaderboard.

    Resumable: scripts that have run are not run again. Exit code 1 if a field fails a check.
    """
    from agent_tools.sandbox import POOL_KINDS, make_pool

    if sandbox not in POOL_KINDS:
        raise UserError(f"--sandbox {sandbox!r}: choose {', '.join(POOL_KINDS)}")
    chosen = load_suite(suite)
    if any(name.startswith(PRACTICE) for name in competition or chosen.ids()):
        raise UserError("practice fields: run `python -m agent_tools.mle_bench.practice fit`")
    passed = True
    with make_pool(sandbox, workers=workers) as pool:
        for competition_id in competition or chosen.ids():
            for part in _parts(which, load_config(competition_id).dev):
                item = load_competition(competition_id, data_dir, suite=chosen)
                for row in _fit_one(item, part, pool, data_dir, check=check, refit=refit):
                    passed = passed and bool(row["passed"])
                    print(json.dumps(row) if as_json else _shown(row), flush=True)
    raise typer.Exit(0 if passed else 1)


def _fit_one(
    competition: Competition,
    which: Which,
    pool: ScriptPool,
    data_dir: Path | None,
    *,
    check: bool,
    refit: bool,
) -> Iterator[dict[str, Any]]:
    from dataclasses import asdict

    from agent_tools.mle_bench import field_checks, fields

    def progress(entry: fields.Entry) -> None:
        shown = entry.error if entry.score is None else f"{entry.score:.5f}"
        print(
            f"{competition.id} {which} {entry.recipe}: {shown} ({entry.cpu_s:.2f} s)",
            file=sys.stderr,
            flush=True,
        )

    recipes = fields.recipes_of(competition)
    name = "leaderboard.csv" if which == "private" else "dev_leaderboard.csv"
    if refit:
        board = COMPETITIONS / competition.id / name
        for row in field_checks.refit_entries(competition, which, board, recipes, pool):
            yield {"check": "refit", "competition": competition.id, "which": which} | asdict(row)
        return
    entries = fields.fit_field(
        competition, which, recipes, pool, data_dir=data_dir, progress=progress
    )
    if not check:
        path = fields.write_leaderboard(competition, which, entries)
        print(f"wrote {path}", file=sys.stderr)
    figures = field_checks.check_field(competition, which, entries, data_dir=data_dir)
    yield {"check": "field"} | asdict(figures)
    if which == "private":
        outside = field_checks.run_outside(competition, pool)
        if not check:
            path = field_checks.write_losses(competition, entries, outside, data_dir=data_dir)
            print(f"wrote {path}", file=sys.stderr)
        field = [entry.score for entry in entries if entry.score is not None]
        headroom = field_checks.check_headroom(competition, outside, field)
        yield {"check": "headroom"} | asdict(headroom)


@app.command()
def audit(suite: SuiteOption = "offline-v1", as_json: JsonOption = False) -> None:
    """Recompute a suite's fairness rules from its committed files; exit code 1 if one is broken."""
    from dataclasses import asdict

    from agent_tools.mle_bench import audit as audits

    findings = audits.audit(load_suite(suite))
    if as_json:
        print(json.dumps({"suite": suite, "findings": [asdict(f) for f in findings]}))
    else:
        rules = list(dict.fromkeys(f.rule for f in findings))
        print(f"{'competition':22}" + "".join(f"{rule:>17}" for rule in rules))
        for name in dict.fromkeys(f.competition for f in findings):
            own = {f.rule: f for f in findings if f.competition == name}
            cells = (_audit_cell(own[rule]) if rule in own else "" for rule in rules)
            print(f"{name:22}" + "".join(f"{cell:>17}" for cell in cells))
        print("! broken   * listed exception")
    raise typer.Exit(0 if all(f.ok for f in findings) else 1)


@app.command()
def spread(
    out: Annotated[Path, typer.Argument(help="an .svg file")],
    suite: SuiteOption = "offline-v1",
) -> None:
    """Draw every entry of a suite's fields with the medal lines."""
    from agent_tools.mle_bench import spread as drawing

    if out.suffix != ".svg":
        raise UserError(f"{out}: give a file name that ends in .svg")
    title = f"{suite}: the entries of each field"
    out.write_text(drawing.svg(drawing.spreads(load_suite(suite)), title), encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)


def _audit_cell(finding: Finding) -> str:
    mark = "" if finding.passed else "*" if finding.excepted else "!"
    return f"{finding.value:.5g}{mark}"


def _parts(which: str, dev: bool) -> list[Which]:
    if which == "both":
        return ["private", "dev"] if dev else ["private"]
    return [_which(which)]


def _shown(row: dict[str, Any]) -> str:
    figures = " ".join(f"{key}={value}" for key, value in row.items() if key != "check")
    return f"{row['check']}: {figures}"
