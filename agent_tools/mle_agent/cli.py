"""``python -m agent_tools.mle_agent run | judge | table | validate``.

Exit codes: 0 done, 1 the answer is no (an invalid submission), 2 usage, 5 infrastructure (the same
command goes on), 130 interrupted. With ``--json`` stdout carries JSON only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout

from agent_tools.cli_main import run_app
from agent_tools.errors import UserError
from agent_tools.mle_bench.registry import DEFAULT_SUITE
from agent_tools.paths import repo_root
from agent_tools.sandbox import POOL_KINDS, PoolKind

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)

SuiteOption = Annotated[str, typer.Option("--suite", help="name of the suite")]
DataOption = Annotated[
    Path | None, typer.Option("--data-dir", help="data folder [default: SELFEVO_DATA or .data]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")]


def main() -> None:
    """Run the command; user and infrastructure errors become one line and an exit code."""
    run_app(
        app, "python -m agent_tools.mle_agent", interrupted="interrupted: the same command goes on"
    )


@app.command()
def run(
    out: Annotated[Path, typer.Option("--out", help="folder of the runs; the same one goes on")],
    suite: SuiteOption = DEFAULT_SUITE,
    split: Annotated[str, typer.Option("--split", help="train, val or all")] = "all",
    competition: Annotated[
        list[str] | None, typer.Option("--competition", help="repeatable [default: the split]")
    ] = None,
    sealed: Annotated[
        bool,
        typer.Option(
            "--sealed", help="the sealed competitions, no others: for `selfevo medals sealed`"
        ),
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="runs a competition")] = 3,
    first_seed: Annotated[int, typer.Option("--first-seed", min=0)] = 0,
    settings: Annotated[str, typer.Option("--settings", help="real or nano")] = "real",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, repeatable: change a setting")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="OpenAI-compatible endpoint, or auto")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="the model's name there")] = "nano",
    api_key_env: Annotated[str, typer.Option("--api-key-env")] = "OPENAI_API_KEY",
    agent: Annotated[
        str | None, typer.Option("--agent", help="FOLDER[:VARIANT] of an agent in MLE-bench's form")
    ] = None,
    agent_memory_mb: Annotated[int, typer.Option("--agent-memory-mb", min=64)] = 8192,
    python: Annotated[
        Path | None, typer.Option("--python", help="for scripts [default: script environment]")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1)] = 2,
    sandbox: Annotated[str, typer.Option("--sandbox")] = "bubblewrap",
    require_full_isolation: Annotated[bool, typer.Option("--require-full-isolation")] = False,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="for the rows")] = None,
    campaign: Annotated[str | None, typer.Option("--campaign", help="for the rows")] = None,
    round_: Annotated[int | None, typer.Option("--round", help="for the rows")] = None,
    data_dir: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Solve competitions, grade what came of it in another process, print the table.

    `--base-url auto` serves the bundled model. A run that was killed goes on with the same command.
    """
    from agent_tools.mle_agent.foreign import load_agent
    from agent_tools.mle_agent.judge import judge_elsewhere
    from agent_tools.mle_agent.model_client import BundledServer, ChatModel, api_key
    from agent_tools.mle_agent.run_group import About, Group
    from agent_tools.mle_agent.runner import Machine, run_foreign, run_searches
    from agent_tools.mle_agent.settings import make_settings
    from agent_tools.mle_agent.sources import competition_ids, suite_version

    foreign = load_agent(agent) if agent else None
    search = make_settings(settings, _changes(changes))
    if foreign is None and base_url is None:
        raise UserError("--base-url: give a model's endpoint, or auto for the bundled model")
    about = About(
        agent=foreign.id if foreign else f"selfevo-{search.name}",
        suite=suite,
        suite_version=suite_version(suite),
        settings=foreign.settings() if foreign else asdict(search),
        model=model if base_url else "none",
        competitions=competition_ids(suite, split, competition, data_dir, sealed=sealed),
        seeds=tuple(range(first_seed, first_seed + seeds)),
        commit=_commit(),
        checkpoint=checkpoint or (_bundled_mark() if base_url == "auto" else None),
        campaign=campaign,
        round=round_,
    )
    machine = Machine(data_dir, _kind(sandbox), workers, python, require_full_isolation)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out), contextlib.ExitStack() as stack:
        group = Group.open(out, about)
        if not group.is_complete():
            key = api_key(api_key_env)
            if base_url == "auto":
                base_url = stack.enter_context(BundledServer()).base_url
            if foreign is not None:
                run_foreign(
                    group, foreign, machine, base_url=base_url, api_key=key,
                    memory_mb=agent_memory_mb,
                )  # fmt: skip
            else:
                assert base_url is not None
                run_searches(group, search, ChatModel(base_url, model, api_key=key), machine)
        judge_elsewhere(out, data_dir)
    _print_table(out, as_json)


@app.command()
def judge(
    out: Annotated[Path, typer.Argument(help="a folder that `run --out` wrote")],
    data_dir: DataOption = None,
) -> None:
    """Grade all ended runs again; writes scores.jsonl, best_on_test.jsonl, findings.jsonl."""
    from agent_tools.mle_agent import judge as judging
    from agent_tools.mle_agent.run_group import Group

    judging.judge(Group.load(out), data_dir)


@app.command()
def table(
    out: Annotated[Path, typer.Argument(help="a folder that `run --out` wrote")],
    as_json: JsonOption = False,
) -> None:
    """Show the table of graded runs."""
    _print_table(out, as_json)


@app.command()
def validate(
    competition: Annotated[str, typer.Option("--competition", help="competition id")],
    suite: SuiteOption = DEFAULT_SUITE,
    data_dir: DataOption = None,
) -> None:
    """Say whether the submission on standard input could be graded; never a score."""
    from agent_tools.mle_agent.judge import fault

    # More than any grader takes: the rest need not be read to know that it is too much.
    error = fault(suite, competition, sys.stdin.buffer.read(64 << 20), data_dir)
    print("Submission is valid." if error is None else f"Submission is invalid: {error}")
    raise typer.Exit(0 if error is None else 1)


def _changes(texts: list[str] | None) -> dict[str, str]:
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r}: write KEY=VALUE")
        found[key] = value
    return found


def _kind(text: str) -> PoolKind:
    for kind in POOL_KINDS:
        if kind == text:
            return kind
    raise UserError(f"--sandbox {text!r}: choose {', '.join(POOL_KINDS)}")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        with FileLock(out / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{out}: another process works there; wait for it") from None


def _print_table(out: Path, as_json: bool) -> None:
    from agent_tools.mle_agent.run_group import Group, read_rows
    from agent_tools.mle_agent.table import show, summarise

    about = Group.load(out).about
    rows = read_rows(out / "scores.jsonl")
    if not rows:
        raise UserError(f"{out}: no run has ended yet; give the `run` command again")
    result, best = summarise(rows), summarise(read_rows(out / "best_on_test.jsonl"))
    findings = read_rows(out / "findings.jsonl")
    if as_json:
        record = {
            "suite": about.suite,
            "suite_version": about.suite_version,
            "agent": about.agent,
            "checkpoint": about.checkpoint or about.model,
            "table": asdict(result),
            "best_on_test": asdict(best),
            "findings": findings,
            "out": str(out),
        }
        print(json.dumps(record))
        return
    title = (
        f"{about.agent} with {about.checkpoint or about.model} on {about.suite} version "
        f"{about.suite_version}, {len(about.seeds)} seeds, mean ± SEM; offline medals"
    )
    print(show(result, title=title, best_on_test=best))
    for row in findings:
        print(f"VOID {row['competition']} seed {row['seed']}: {row['kind']} in {row['where']}")


def _commit() -> str | None:
    """The repository's commit, None outside one."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=20, cwd=repo_root(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _bundled_mark() -> str:
    """The bundled model's name and the start of a hash of its weights."""
    from agent_tools.mle_agent.model_client import BUNDLED

    digest = hashlib.sha256()
    for path in sorted((repo_root() / BUNDLED).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return f"nano-{digest.hexdigest()[:12]}"
