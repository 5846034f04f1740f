"""`selfevo`: start, watch and resume the loop; review its proposals; replay and report.

Text for people on stdout, live lines on stderr; with --json, machine output alone on stdout.
Heavy imports happen inside the commands, so `selfevo --help` stays fast.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from selfevo.cli_medals import medals_app
from selfevo.cli_pr import pr_app

if TYPE_CHECKING:
    from selfevo.control import Told
    from selfevo.views import CampaignView

app = typer.Typer(
    name="selfevo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="An auditable self-improvement loop for reinforcement learning of language-model agents.",
)
app.add_typer(pr_app, name="pr")
app.add_typer(medals_app, name="medals")

LabArgument = Annotated[
    Path, typer.Argument(help="lab folder, or the folder of one campaign (LAB/runs/NAME)")
]
CampaignOption = Annotated[
    str | None, typer.Option("--campaign", "-c", help="name of the campaign (default: the newest)")
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine output on stdout")]
HERE = Path()


@app.command()
def init(
    lab: Annotated[Path, typer.Argument(help="new folder")],
    healthy: Annotated[
        bool, typer.Option("--healthy", help="start from the tuned learning rate, not the bad one")
    ] = False,
    full_isolation: Annotated[
        bool,
        typer.Option(
            "--require-full-isolation", help="run no script where a protection is missing"
        ),
    ] = False,
    rollouts: Annotated[
        str | None,
        typer.Option("--async", help="own | vllm: jobs generate while they train"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a lab: a git repository of configs, prompts, skills and memory."""
    from selfevo.asynchronous import ENGINES
    from selfevo.lab import init_lab

    choose("--async", rollouts, ENGINES)
    engine = next((name for name in ENGINES if name == rollouts), None)
    repo = init_lab(lab, healthy=healthy, full_isolation=full_isolation, rollouts=engine)
    commit = repo.head().commit
    if as_json:
        out({"lab": str(lab.absolute()), "commit": commit, "healthy": healthy})
        return
    print(f"lab {lab} (commit {(commit or '')[:12]})")
    print(f"next: selfevo run {shlex.quote(str(lab))}")


@app.command()
def run(
    lab: LabArgument = HERE,
    rounds: Annotated[int | None, typer.Option(min=1, help="proposals")] = None,
    seed: Annotated[int, typer.Option(min=0, help="campaign seed")] = 0,
    agent: Annotated[str | None, typer.Option(help="model | rules | random")] = None,
    review: Annotated[str | None, typer.Option(help="auto | always")] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="train seeds an arm")] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a campaign: propose, train, measure, keep or drop, for a number of rounds."""
    from selfevo import loop
    from selfevo.campaign import RunOptions

    choose("--agent", agent, ("model", "rules", "random"))
    choose("--review", review, ("auto", "always"))
    options = RunOptions(rounds, seed, agent, review, seeds)
    finish(*loop.start(lab, options, say), as_json)


@app.command()
def resume(
    lab: LabArgument = HERE, campaign: CampaignOption = None, as_json: JsonOption = False
) -> None:
    """Go on with a campaign where its event log ends."""
    from selfevo import loop

    finish(*loop.resume(lab, campaign, say), as_json)


@app.command()
def status(
    lab: LabArgument = HERE, campaign: CampaignOption = None, as_json: JsonOption = False
) -> None:
    """Where a campaign stands."""
    from selfevo import text

    view, _ = load(lab, campaign)
    if as_json:
        out(status_record(view))
    else:
        print("\n".join(text.status_lines(view)))


@app.command()
def watch(
    lab: LabArgument = HERE,
    campaign: CampaignOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="one event a line")] = False,
) -> None:
    """Follow a campaign until it ends, pauses or waits for a person."""
    from selfevo import watch as watcher

    root, folder = locate(lab, campaign)
    reader = watcher.JsonLines(show) if as_json else watcher.Lines(show, folder)
    try:
        code, view = watcher.follow(root, folder, reader)
    except KeyboardInterrupt:
        say("no longer watching; the campaign goes on")
        raise typer.Exit(130) from None
    if code not in (0, 3):
        say(watcher.last_line(view, code))
    raise typer.Exit(code)


@app.command()
def pause(
    lab: LabArgument = HERE, campaign: CampaignOption = None, as_json: JsonOption = False
) -> None:
    """Let the running job end, then leave; `selfevo resume` goes on."""
    from selfevo import control

    told(control.pause(lab, campaign), as_json)


@app.command()
def stop(
    lab: LabArgument = HERE, campaign: CampaignOption = None, as_json: JsonOption = False
) -> None:
    """End a campaign's process and jobs now, their state saved; `selfevo resume` goes on."""
    from selfevo import control

    told(control.stop(lab, campaign), as_json)


@app.command()
def replay(
    lab: LabArgument = HERE,
    campaign: CampaignOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="one event a line")] = False,
    round_: Annotated[int | None, typer.Option("--round", help="only this round")] = None,
    full: Annotated[bool, typer.Option("--full", help="whole prompts, not their ends")] = False,
    step: Annotated[bool, typer.Option("--step", help="wait for Enter after every event")] = False,
) -> None:
    """Step through everything that happened; needs neither server nor network."""
    from selfevo import replay as player

    _, folder = load(lab, campaign)
    if as_json:
        player.write_json(folder, sys.stdout, round_)
    else:
        player.show(folder, print, round_=round_, full=full, pause=input if step else None)


@app.command()
def report(
    lab: LabArgument = HERE, campaign: CampaignOption = None, as_json: JsonOption = False
) -> None:
    """Write report.md and report.html (one self-contained file)."""
    from selfevo import report as writer

    _, folder = load(lab, campaign)
    paths = writer.write(folder)
    if as_json:
        out({"markdown": str(paths[0]), "html": str(paths[1])})
    else:
        print(paths[0])
        print(paths[1])


@app.command()
def attach(
    path: Annotated[Path, typer.Argument(help="run directory, wandb folder, or .wandb file")],
    as_json: JsonOption = False,
) -> None:
    """Digest, findings and one suggested change for a run of your own; reads only."""
    from selfevo import attach as reader

    found = reader.attach(path)
    if as_json:
        out(reader.record(found))
    else:
        print("\n".join(reader.lines(found)))


@app.command()
def doctor(
    lab: Annotated[Path | None, typer.Argument(help="lab folder (default: the template)")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="this check alone; may be repeated")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Try every part of a real run on this machine; each failure names its repair."""
    from selfevo import doctor as clinic

    results = []
    for result in clinic.examine(lab, only=only or ()):
        results.append(result)
        if not as_json:
            print("\n".join(clinic.lines(result)), flush=True)
    if as_json:
        out(clinic.record(results))
    else:
        print(clinic.verdict(results))
    raise typer.Exit(1 if any(result.status == "failed" for result in results) else 0)


@app.command()
def plan(
    lab: Annotated[Path | None, typer.Argument(help="lab folder (default: the template)")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="proposals")] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="train seeds an arm")] = None,
    as_json: JsonOption = False,
) -> None:
    """Jobs, hours, and what the gate could see, before anything is spent; 1 if hopeless."""
    from selfevo import plan as planner

    found = planner.of_lab(lab, rounds, seeds)
    if as_json:
        out(planner.record(found))
    else:
        print("\n".join(planner.lines(found)))
    raise typer.Exit(1 if found.problems else 0)


# ------------------------------------------------------------------ shared by the commands


def out(record: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(record, ensure_ascii=False))


def say(line: str) -> None:
    """One live line on stderr."""
    print(line, file=sys.stderr, flush=True)


def show(line: str) -> None:
    """One line on stdout, at once."""
    print(line, flush=True)


def told(result: Told, as_json: bool) -> None:
    """What `pause` or `stop` did."""
    if as_json:
        out({**vars(result), "jobs": list(result.jobs)})
    else:
        print(result.message)


def choose(option: str, value: str | None, known: tuple[str, ...]) -> None:
    from agent_tools.errors import UserError

    if value is not None and value not in known:
        raise UserError(f"{option} {value}: choose one of {', '.join(known)}")


def load(lab: Path, campaign: str | None) -> tuple[CampaignView, Path]:
    """(view, folder) of a campaign, read only."""
    from agent_tools.errors import UserError
    from selfevo.campaign import read_view

    _, folder = locate(lab, campaign)
    view = read_view(folder)
    if not view.info:
        raise UserError(f"{folder}: nothing has been logged yet; try again in a moment")
    return view, folder


def locate(lab: Path, campaign: str | None) -> tuple[Path, Path]:
    """(lab, folder) of a campaign."""
    from selfevo.lab import campaign_folder, find_campaign

    root, name = find_campaign(lab, campaign)
    return root, campaign_folder(root, name)


def status_record(view: CampaignView) -> dict[str, Any]:
    """`selfevo status --json`."""
    waiting = view.pending_review()
    return {
        "campaign": view.name,
        "state": view.state,
        "reason": view.stop_reason,
        "round": view.round,
        "rounds": view.rounds_planned,
        "phase": view.phase,
        "agent": view.info["agent"],
        "incumbent": view.incumbent_head,
        "events": view.head,
        "pending_review": waiting.number if waiting else None,
        "verdicts": {str(n): r.verdict for n, r in view.rounds.items() if n},
        "prs": {str(n): pr.state for n, pr in view.prs.items()},
        "jobs": {job.id: job.state for job in view.jobs.values()},
        "seconds": round(view.active_seconds, 1),
    }


def finish(code: int, folder: Path, as_json: bool) -> NoReturn:
    """Closing summary of `run` and `resume`, then the exit code."""
    from selfevo import summary
    from selfevo.campaign import read_view

    view = read_view(folder)
    if as_json:
        out(
            {
                **status_record(view),
                "exit_code": code,
                "folder": str(folder),
                "report": str(folder / "report.html"),
            }
        )
    else:
        print("\n".join(summary.lines(view, folder, code)))
    raise typer.Exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


def main() -> NoReturn:
    """Console entry: one-line errors and the exit codes of docs/architecture.md."""
    signal.signal(signal.SIGTERM, _terminate)
    from agent_tools.errors import InfraError, UserError

    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (UserError, InfraError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        print(f"error: {error.format_message()}; see `selfevo --help`", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        say("interrupted: jobs that run go on; `selfevo resume` takes them up again")
        sys.exit(130)
    except SystemExit as error:
        if error.code == 143:
            say("terminated: the state is saved; `selfevo resume` goes on")
        raise
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        say(f"error: cannot use{where}: {error.strerror or error}; free some space or mend it")
        sys.exit(5)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
