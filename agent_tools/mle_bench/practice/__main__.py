"""``python -m agent_tools.mle_bench.practice``: suite | check | fit, for whoever changes the suite.

Preparing, listing and grading go through ``python -m agent_tools.mle_bench`` as for every suite.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from agent_tools.cli_main import run_app
from agent_tools.errors import UserError
from agent_tools.mle_bench.practice import checks
from agent_tools.mle_bench.practice.entries import SUITE, entries

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
DataOption = Annotated[
    Path | None, typer.Option("--data-dir", help="data folder [default: SELFEVO_DATA or .data]")
]


@app.command()
def suite() -> None:
    """Write ``suites/practice-v1.yaml`` from the catalogue."""
    path = checks.write_suite()
    print(f"wrote {path}", file=sys.stderr)


@app.command()
def check(
    sources: Annotated[
        bool, typer.Option("--sources", help="also compare source tables with each other")
    ] = False,
    data_dir: DataOption = None,
) -> None:
    """Apply the selection rules; exit code 1 if one is broken."""
    found = checks.check_suite(data_dir)
    if sources:
        found += checks.check_sources()
    for finding in found:
        print(f"{finding.competition}: rule {finding.rule}: {finding.text}")
    print(f"{len(entries())} competitions, {len(found)} findings", file=sys.stderr)
    raise typer.Exit(1 if found else 0)


@app.command()
def fit(
    competition: Annotated[
        list[str] | None, typer.Option("--competition", help="repeatable [default: all]")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1)] = 2,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="begin no field after this many")
    ] = None,
    sandbox: Annotated[str, typer.Option("--sandbox")] = "bubblewrap",
    data_dir: DataOption = None,
) -> None:
    """Fit the fields that are not fitted yet and write ``fields.csv``; resumable."""
    from agent_tools.mle_bench.practice.fit import Fitted, fit_suite
    from agent_tools.sandbox import POOL_KINDS, make_pool

    if sandbox not in POOL_KINDS:
        raise UserError(f"--sandbox {sandbox!r}: choose {', '.join(POOL_KINDS)}")

    def progress(item: Fitted) -> None:
        row = {"competition": item.competition, "which": item.which, "entries": item.entries}
        row |= {"failed": item.failed, "cpu_s": round(item.cpu_s, 1)}
        print(json.dumps(row), flush=True)

    ids = competition or list(entries())
    with make_pool(sandbox, workers=workers) as pool:
        fit_suite(SUITE, ids, pool, data_dir, workers=workers, seconds=seconds, progress=progress)


if __name__ == "__main__":
    run_app(app, "python -m agent_tools.mle_bench.practice")
