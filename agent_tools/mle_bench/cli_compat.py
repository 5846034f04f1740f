"""The commands that are compatible with MLE-bench; part of ``python -m agent_tools.mle_bench``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from agent_tools.errors import UserError

if TYPE_CHECKING:
    from agent_tools.mle_bench.folders import FolderRegistry, Graders
    from agent_tools.mle_bench.reports import Graded

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

CheckoutOption = Annotated[
    Path | None, typer.Option("--checkout", help="clone of MLE-bench [default: SELFEVO_MLEBENCH]")
]
FolderOption = Annotated[
    list[Path] | None, typer.Option("--folder", help="further competition folders; repeatable")
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="MLE-bench's data folder [default: SELFEVO_MLEBENCH_DATA]"),
]
PythonOption = Annotated[
    Path | None, typer.Option("--python", help="interpreter of the checkout's and folders' graders")
]
GradersOption = Annotated[
    str, typer.Option("--graders", help="for Lite competitions: ours or theirs")
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="selfevo, or mlebench: your installed program")
]
ReportedOption = Annotated[
    bool, typer.Option("--reported", help="rank against reported thresholds, marked: no claim")
]
UnverifiedOption = Annotated[
    bool, typer.Option("--skip-verification", help="do not compare with the list of hashes")
]
ShortOption = Annotated[
    bool, typer.Option("--allow-short", help="accept a leaderboard of 20 rows or fewer")
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]


@app.command("grade-jsonl")
def grade_jsonl_command(
    submission: Annotated[Path, typer.Option("--submission", help="JSONL, as MLE-bench's grade")],
    output_dir: Annotated[Path, typer.Option("--output-dir", help="where the report goes")],
    checkout: CheckoutOption = None,
    folder: FolderOption = None,
    data_dir: DataOption = None,
    python: PythonOption = None,
    graders: GradersOption = "ours",
    engine: EngineOption = "selfevo",
    reported: ReportedOption = False,
    skip_verification: UnverifiedOption = False,
    allow_short: ShortOption = False,
    as_json: JsonOption = False,
) -> None:
    """Grade the submissions of a JSONL file and write MLE-bench's grading report."""
    from agent_tools.mle_bench import reports
    from agent_tools.mle_bench.mlebench_engine import find_engine

    if _engine(engine) == "mlebench":
        if reported:
            raise UserError("--reported is for our own engine: leave --engine out")
        path = find_engine(data_dir).grade_jsonl(submission, output_dir)
    else:
        made = reports.grade_jsonl(
            reports.read_grading_lines(submission),
            output_dir,
            _registry(checkout, folder, data_dir, python, graders),
            reported=reported,
            verify=not skip_verification,
            allow_short=allow_short,
            progress=_show_graded,
        )
        path = made.report
        _show_notes(made.graded)
    print(f"wrote {path}", file=sys.stderr)
    data = json.loads(path.read_text(encoding="utf-8"))
    totals = {name: value for name, value in data.items() if name.startswith("total_")}
    print(json.dumps({"report": str(path)} | totals) if as_json else json.dumps(totals, indent=4))


@app.command("grade-sample")
def grade_sample_command(
    submission: Annotated[Path, typer.Argument(help="a .csv file")],
    competition_id: Annotated[str, typer.Argument(help="competition id")],
    checkout: CheckoutOption = None,
    folder: FolderOption = None,
    data_dir: DataOption = None,
    python: PythonOption = None,
    graders: GradersOption = "ours",
    engine: EngineOption = "selfevo",
    reported: ReportedOption = False,
    skip_verification: UnverifiedOption = False,
    allow_short: ShortOption = False,
) -> None:
    """Grade one submission and print MLE-bench's competition report; exit code 1 if invalid."""
    from agent_tools.mle_bench import reports
    from agent_tools.mle_bench.mlebench_engine import find_engine

    if _engine(engine) == "mlebench":
        if reported:
            raise UserError("--reported is for our own engine: leave --engine out")
        report = find_engine(data_dir).grade_sample(submission, competition_id)
    else:
        registry = _registry(checkout, folder, data_dir, python, graders)
        competition = registry.get(competition_id)
        board = reports.boards_of(
            [competition],
            reported=reported,
            verify=not skip_verification,
            allow_short=allow_short,
        )[competition_id]
        graded = reports.grade_submission(competition, submission, board)
        _show_notes((graded,))
        if graded.error:
            print(f"{competition_id}: invalid: {graded.error}", file=sys.stderr)
        report = graded.report
    print(json.dumps(report.to_marked_dict() if reported else report.to_dict(), indent=4))
    raise typer.Exit(0 if report.valid_submission else 1)


@app.command("make-submission")
def make_submission_command(
    group: Annotated[Path, typer.Argument(help="a run group's folder, or its metadata.json")],
    output: Annotated[Path, typer.Option("--output", help="JSONL to write")] = Path(
        "submission.jsonl"
    ),
    logs: Annotated[Path, typer.Option("--rel-log-path", help="relative to a run")] = Path(
        "logs/agent.log"
    ),
    code: Annotated[Path, typer.Option("--rel-code-path", help="relative to a run")] = Path(
        "code/train.py"
    ),
) -> None:
    """Turn a run group into the JSONL that grading reads."""
    from agent_tools.mle_bench import run_groups

    lines = run_groups.grading_lines(run_groups.read_run_group(group), logs=logs, code=code)
    run_groups.write_grading_lines(lines, output)
    submitted = sum(line["submission_path"] is not None for line in lines)
    print(f"wrote {output}: {len(lines)} runs, {submitted} with a submission", file=sys.stderr)


@app.command("aggregate")
def aggregate_command(
    grading_reports: Annotated[
        list[Path] | None, typer.Argument(help="grading reports of either harness")
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="lite, a suite, a list of the checkout, or a file")
    ] = "lite",
    num_seeds: Annotated[
        int | None, typer.Option("--num-seeds", help="use the first N [default: all complete]")
    ] = None,
    pad_missing: Annotated[
        bool, typer.Option("--pad-missing", help="count absent reports as failures")
    ] = False,
    experiment: Annotated[
        str | None, typer.Option("--experiment-id", help="reports of an experiment's run groups")
    ] = None,
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="folder of run groups")] = Path(
        "runs"
    ),
    checkout: CheckoutOption = None,
    allow_reported: Annotated[
        bool, typer.Option("--allow-reported", help="accept reported thresholds; no claim")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Any-medal percentage with standard error over complete seeds, by MLE-bench's rules."""
    from agent_tools.mle_bench import aggregate as rules

    if (experiment is None) == (not grading_reports):
        raise UserError("name grading reports, or --experiment-id, and not both")
    paths = (
        rules.experiment_reports(experiment, runs_dir) if experiment else (grading_reports or [])
    )
    outcomes = rules.read_outcomes(paths, allow_reported=allow_reported)
    ids = rules.split_ids(split, checkout)
    seeds = rules.complete_seeds(outcomes, ids, seeds=num_seeds, pad_missing=pad_missing)
    result = rules.aggregate(seeds)
    if result.num_seeds_averaged < rules.WANTED_SEEDS:
        print(
            f"note: {result.num_seeds_averaged} seeds; MLE-bench asks for at least "
            f"{rules.WANTED_SEEDS}",
            file=sys.stderr,
        )
    if as_json:
        marks = {"split": split, "pad_missing": pad_missing, "reported_thresholds": allow_reported}
        print(json.dumps(result.to_dict() | marks))
        return
    print(f"{split}: {len(ids)} competitions, {result.num_seeds_averaged} seeds")
    for name, figure in result.metrics.items():
        if name.endswith("_percentage"):
            label = name.removesuffix("_percentage").replace("_", " ")
            print(f"{label:18} {figure.mean:6.2f} ± {figure.standard_error:.2f} %")


@app.command("serve-validation")
def serve_validation_command(
    competition_id: Annotated[str, typer.Argument(help="competition id")],
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 5000,
    checkout: CheckoutOption = None,
    folder: FolderOption = None,
    data_dir: DataOption = None,
    python: PythonOption = None,
    graders: GradersOption = "ours",
) -> None:
    """Serve POST /validate and GET /health for one competition; never tells a score."""
    from agent_tools.mle_bench.validation_server import serve

    registry = _registry(checkout, folder, data_dir, python, graders)
    serve(registry.get(competition_id), host=host, port=port)


@app.command("lite-status")
def lite_status_command(
    checkout: CheckoutOption = None, data_dir: DataOption = None, as_json: JsonOption = False
) -> None:
    """What there is of the 22 Lite competitions, and what to fetch; exit code 1 if anything."""
    from agent_tools.mle_bench.lite_prepare import lite_status

    rows = lite_status(_registry(checkout, None, data_dir, None, "ours"))
    ready = sum(not row.reasons for row in rows)
    if as_json:
        print(json.dumps({"ready": ready, "competitions": [asdict(row) for row in rows]}))
    else:
        print(f"{'competition':50} {'data':11} {'leaderboard':12} preparer")
        for row in rows:
            print(f"{row.competition_id:50} {row.data:11} {row.leaderboard:12} {row.preparer}")
        for reason in next((row.reasons for row in rows if row.reasons), ()):
            print(f"next: {reason}", file=sys.stderr)
    raise typer.Exit(0 if ready == len(rows) else 1)


@app.command("lite-prepare")
def lite_prepare_command(
    competition_id: Annotated[str, typer.Argument(help="one of the 22")],
    checkout: CheckoutOption = None,
    data_dir: DataOption = None,
    engine: EngineOption = "selfevo",
    skip_verification: UnverifiedOption = False,
) -> None:
    """Prepare a Lite competition from the zip that you downloaded from Kaggle."""
    from agent_tools.mle_bench.lite_prepare import prepare_lite
    from agent_tools.mle_bench.mlebench_engine import find_engine

    if _engine(engine) == "mlebench":
        print("MLE-bench downloads with your Kaggle key and may ask you to accept rules in a "
              "browser", file=sys.stderr)  # fmt: skip
        find_engine(data_dir).prepare(competition_id)
        return
    registry = _registry(checkout, None, data_dir, None, "ours")
    state = prepare_lite(registry, competition_id, verify=not skip_verification)
    print(f"{competition_id}: {state}", file=sys.stderr)


def _registry(
    checkout: Path | None,
    folders: list[Path] | None,
    data_dir: Path | None,
    python: Path | None,
    graders: str,
) -> FolderRegistry:
    from agent_tools.mle_bench.folders import registry_of

    if graders not in ("ours", "theirs"):
        raise UserError(f"--graders {graders!r}: choose ours or theirs")
    return registry_of(
        checkout=checkout,
        folders=folders or (),
        data_dir=data_dir,
        python=python,
        graders=cast("Graders", graders),
    )


def _engine(name: str) -> str:
    if name not in ("selfevo", "mlebench"):
        raise UserError(f"--engine {name!r}: choose selfevo or mlebench")
    return name


def _show_graded(graded: Graded) -> None:
    report = graded.report
    if graded.error:
        shown = f"invalid: {graded.error}"
    else:
        medals = ("gold", "silver", "bronze")
        medal = next((name for name in medals if getattr(report, f"{name}_medal")), "no medal")
        shown = f"{report.score} {medal}"
    print(f"{report.competition_id}: {shown}", file=sys.stderr, flush=True)


def _show_notes(graded: tuple[Graded, ...]) -> None:
    for note in dict.fromkeys(note for one in graded for note in one.board.notes):
        print(f"note: {note}", file=sys.stderr)
