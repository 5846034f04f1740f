"""Opening the sealed competitions of a suite: once a campaign, by a person, for the record.

The log of runs/medals/<campaign>-sealed is the record. `sealed.open` is written before anything
sealed is prepared or read; from then on the campaign counts as opened, and the same command may
only finish what it began.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from agent_tools.errors import UserError
from agent_tools.paths import prepare_python, script_python
from selfevo.arms import Commands
from selfevo.events import Event
from selfevo.measure import (
    SEALED,
    Outcome,
    Request,
    Say,
    Subject,
    Target,
    make_request,
    measure,
    measurement_folder,
    opened,
    run_child,
    targets,
)
from selfevo.store import LOG, read_events

DEFAULT_SUITE = "offline-v1"
OF_CODE = ("suite_version", "competitions", "evaluator")


def sealed_request(
    of: Subject, suite: str, seeds: int, settings: str | None, changes: Sequence[str]
) -> Request:
    """The request; `UserError` for a suite without sealed competitions, or with unfitted ones."""
    from agent_tools.mle_bench.registry import load_config, load_suite, read_leaderboard

    ids = load_suite(suite).ids(SEALED)
    if not ids:
        raise UserError(f"--suite {suite}: it has no sealed competitions; choose {DEFAULT_SUITE}")
    for name in ids:
        config = load_config(name)
        if not read_leaderboard(config.folder / "leaderboard.csv", config.lower_is_better):
            raise UserError(
                f"{name} has no leaderboard, so nothing could be graded: run "
                f"`python -m agent_tools.mle_bench fit --suite {suite}` before it is opened"
            )
    return make_request(of, suite, split=SEALED, seeds=seeds, settings=settings, changes=changes)


def explanation(of: Subject, request: Request, chosen: Sequence[Target]) -> list[str]:
    """What `--yes` would do."""
    view = of.view
    lines = [
        f"this opens the {len(request.competitions)} sealed competitions of {request.suite}, "
        f"version {request.suite_version}, for campaign {of.name}: "
        + ", ".join(request.competitions),
        "it can be done once a campaign: whoever has seen these results must not go on tuning by "
        "them",
        "prepared and measured, with "
        f"{request.seeds} seeds, settings {request.settings}: "
        + "; ".join(target.shown for target in chosen),
        "results go into the ledger only: no prompt, memory, digest or gate ever reads them",
    ]
    if view.state != "done":
        done = max(view.rounds, default=0)
        lines.append(
            f"the campaign is not over (round {done} of {view.rounds_planned}, {view.state}): what "
            "it keeps later is never measured on sealed data"
        )
    return [*lines, "give the same command with --yes to open them"]


def compared(of: Subject) -> list[Target]:
    """The start and the incumbent; one of them where nothing was kept."""
    start, last = targets(of, "start")[0], targets(of, "last")[0]
    return [start] if start.commit == last.commit else [start, last]


def require_unopened(of: Subject, request: Request) -> Event | None:
    """The event of an opening that was begun and not finished, None before one.

    `UserError` where it was finished: that is done once.
    """
    log = measurement_folder(of.lab, request) / LOG
    return _begun(read_events(log)[0] if log.is_file() else [], request)


def open_sealed(of: Subject, request: Request, say: Say, commands: Commands) -> Outcome:
    """Open, prepare and measure; goes on where a killed one ended.

    Raises `UserError` for a second opening, another request than the one that was begun, a missing
    checkpoint or environment (all before anything is opened), `InfraError` for the machine.
    """
    chosen = compared(of)
    if require_unopened(of, request) is None:
        script_python()
        prepare_python()
        for target in chosen:
            if target.fault:
                raise UserError(
                    f"{target.shown}: no policy to measure, {target.fault}; nothing was opened"
                )
    with opened(of.lab, request) as made:
        begun = _begun(made.events, request)
        if begun is None:
            kept = [_kept(of, target) for target in chosen]
            made.emit("sealed.open", asdict(request) | {"targets": kept}, actor="human")
        else:
            _same(begun.data, request)
            chosen = [_target(of, kept) for kept in begun.data["targets"]]
        say(f"preparing the sealed competitions of {request.suite}")
        run_child([*commands.prepare, "--suite", request.suite, "--sealed"], made.folder, say)
        return measure(made, of.lab, chosen, say, commands)


def _begun(events: Sequence[Event], request: Request) -> Event | None:
    begun = next((event for event in events if event.kind == "sealed.open"), None)
    if begun is not None and any(event.kind == "measure.end" for event in events):
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun.ts))
        raise UserError(
            f"campaign {request.campaign} opened its sealed competitions on {day}, and that is "
            f"done once; `selfevo medals LAB --suite {begun.data['suite']}` shows the result"
        )
    return begun


def _kept(of: Subject, target: Target) -> dict[str, Any]:
    """A target for the log: later rounds may revert it, and the lab may move."""
    assert target.folder is not None
    return asdict(target) | {"folder": target.folder.relative_to(of.folder).as_posix()}


def _target(of: Subject, kept: Mapping[str, Any]) -> Target:
    folder = of.folder / str(kept["folder"])
    fault = "" if folder.is_dir() else f"{folder} is not there: restore it from a backup"
    return Target(**{**kept, "folder": folder, "fault": fault})


def _same(begun: Mapping[str, Any], request: Request) -> None:
    """`UserError` unless the request is the one that was begun."""
    for key, value in asdict(request).items():
        if begun[key] != (list(value) if isinstance(value, tuple) else value):
            step = "check out the code of that day" if key in OF_CODE else "give that command again"
            raise UserError(
                f"the sealed competitions were opened with {key} = {begun[key]}, not {value}: "
                f"{step}, it goes on"
            )
