"""`selfevo medals`: the ledger's tables as text, JSON or a plot, and the commands that measure."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from selfevo.arms import Commands
    from selfevo.measure import Outcome, Target
    from selfevo.medal_stats import MedalStats, Rate
    from selfevo.views import CampaignView

DEFAULT = "table"
LITE = "mle-bench-lite"
KEPT_MEANS = "kept (start and kept PRs) | last | start"


class _TableByDefault(TyperGroup):
    """`selfevo medals LAB` is `selfevo medals table LAB`; a lab named like a command is ./NAME."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


medals_app = typer.Typer(
    name="medals",
    cls=_TableByDefault,
    add_completion=False,
    rich_markup_mode=None,
    help="Medals in the ledger; `run` and `sealed` measure. `selfevo medals LAB` shows the table.",
)

LabArgument = Annotated[
    Path, typer.Argument(help="lab folder, or the folder of one campaign (LAB/runs/NAME)")
]
CampaignOption = Annotated[
    str | None, typer.Option("--campaign", "-c", help="name of the campaign (default: the newest)")
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine output on stdout")]
SeedsOption = Annotated[int, typer.Option("--seeds", min=1, help="runs a competition")]
SettingsOption = Annotated[
    str | None, typer.Option("--settings", help="nano | real [default: nano for our own suites]")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE, repeatable: change a setting")
]


@medals_app.command(DEFAULT)
def medals(
    lab: LabArgument = Path(),
    campaign: CampaignOption = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help="[default: the campaign's suite]")
    ] = None,
    measurement: Annotated[
        str | None, typer.Option("--measurement", help="this one alone, by its id")
    ] = None,
    by: Annotated[str, typer.Option("--by", help="round | arm | competition | seed")] = "round",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="also write this .svg: medals against time")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Medals of every measured arm, with standard errors and intervals."""
    from agent_tools.errors import UserError
    from agent_tools.mle_agent.sources import suite_version
    from selfevo.cli import choose, load
    from selfevo.medal_stats import BYS

    choose("--by", by, BYS)
    if plot is not None and plot.suffix != ".svg":
        raise UserError(f"--plot {plot}: give a file name that ends in .svg")
    view, folder = load(lab, campaign)
    if suite is not None:
        suite_version(suite)
    show(view, folder, suite or view.info["suite"], by, plot, as_json, only=measurement)


@medals_app.command("run")
def run(
    lab: LabArgument = Path(),
    suite: Annotated[str, typer.Option("--suite", help="any suite, or mle-bench-lite")] = "",
    split: Annotated[
        str | None, typer.Option("--split", help="val | train | all [default: val]")
    ] = None,
    competition: Annotated[
        list[str] | None, typer.Option("--competition", help="repeatable [default: the split]")
    ] = None,
    seeds: SeedsOption = 3,
    campaign: CampaignOption = None,
    commits: Annotated[
        str | None, typer.Option("--commits", help=f"{KEPT_MEANS} [default: kept]")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="measure this endpoint, not the policies")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="its model's name")] = None,
    settings: SettingsOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the policies of kept commits on a suite, into the ledger only.

    Each commit's first policy is served and the competition agent runs against it; nothing of the
    result reaches the loop. The same command goes on after a kill, and measures only what is new.
    """
    from agent_tools.errors import UserError
    from selfevo import measure
    from selfevo.cli import choose, say

    choose("--commits", commits, measure.WHICH)
    choose("--split", split, ("val", "train", "all"))
    if not suite:
        raise UserError("--suite: name the suite to measure on, such as mle-bench-lite")
    if (base_url is None) != (model is None):
        raise UserError("--base-url and --model: give both, or neither for the commits' policies")
    of = measure.subject(lab, campaign)
    chosen = measure.targets(of, commits or ("last" if model else "kept"))  # type: ignore[arg-type]
    if model and len(chosen) > 1:
        raise UserError(
            f"--commits kept: {len(chosen)} commits, and an endpoint is one policy; choose last or "
            "start"
        )
    request = measure.make_request(
        of, suite, split=split, competitions=competition or (), seeds=seeds, settings=settings,
        changes=changes or (), model=model,
    )  # fmt: skip
    with _goes_on(), measure.opened(of.lab, request, base_url) as made:
        outcome = measure.measure(made, of.lab, chosen, say, _commands(), base_url)
    _finish(of.view, of.folder, suite, outcome, chosen, as_json)


@medals_app.command("sealed")
def sealed(
    lab: LabArgument = Path(),
    suite: Annotated[str, typer.Option("--suite", help="a suite with sealed ones")] = "offline-v1",
    seeds: SeedsOption = 3,
    campaign: CampaignOption = None,
    settings: SettingsOption = None,
    changes: SetOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="open them; else it is only explained")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Open the sealed competitions, once a campaign: the start and the incumbent are measured."""
    from selfevo import measure
    from selfevo import sealed as sealing
    from selfevo.cli import say

    of = measure.subject(lab, campaign)
    request = sealing.sealed_request(of, suite, seeds, settings, changes or ())
    begun = sealing.require_unopened(of, request)
    chosen = sealing.compared(of)
    if not yes:
        if begun is not None:
            say("an opening was begun and not finished; the same command finishes it")
        for line in sealing.explanation(of, request, chosen):
            say(line)
        raise typer.Exit(2)
    with _goes_on():
        outcome = sealing.open_sealed(of, request, say, _commands())
    _finish(of.view, of.folder, suite, outcome, chosen, as_json)


# ------------------------------------------------------------------ the tables


@dataclass(frozen=True)
class Sheet:
    """What may stand in one table: rows of one log, suite, version and split.

    `measurement` is None for the campaign's own evaluations.
    """

    suite: str
    version: int
    split: str
    agent: str
    measurement: str | None
    rows: list[dict[str, Any]]

    @property
    def medals(self) -> str:
        """What its medals are called: MLE-bench's only in the user's verified leaderboards."""
        real = self.suite == LITE and all(row["board"] == "verified" for row in self.rows)
        return "MLE-bench Lite medals" if real and self.rows else "offline medals"

    def title(self) -> str:
        """One line: name, suite, version, split, and what measured."""
        what = f"{self.medals}, suite {self.suite}, version {self.version}, {self.split} "
        if self.measurement is None:
            return f"{what}competitions"
        return f"{what}competitions, agent {self.agent}, measurement {self.measurement}"


def sheets(folder: Path, view: CampaignView, suite: str) -> list[Sheet]:
    """The campaign's own evaluations on a suite, then each measurement's. Nothing is mixed."""
    from selfevo.ledger import open_ledger
    from selfevo.medal_stats import QUERY

    own = folder.name
    with open_ledger(folder) as connection:
        found = connection.execute(QUERY, [view.name, suite, own])
        names = [column[0] for column in found.description]
        rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    keys = ("suite", "suite_version", "split", "agent", "source")
    made: list[Sheet] = []
    for key, group in groupby(rows, lambda row: tuple(row[name] for name in keys)):
        name, version, split, agent, source = key
        measurement = None if source == own else Path(source).name
        made.append(Sheet(name, version, split, agent, measurement, list(group)))
    return made


def show(
    view: CampaignView,
    folder: Path,
    suite: str,
    by: str = "round",
    plot: Path | None = None,
    as_json: bool = False,
    *,
    only: str | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Print the tables of a suite, of one measurement with `only`; `record` is more for JSON.

    A plot shows the first table.
    """
    from agent_tools.errors import UserError
    from selfevo.medal_plot import medal_svg
    from selfevo.medal_stats import stats

    found = [one for one in sheets(folder, view, suite) if only in (None, one.measurement)]
    if only is not None and not found:
        raise UserError(f"--measurement {only}: it holds nothing of suite {suite}; see --suite")
    if not found:
        version = view.info["suite_version"] if suite == view.info["suite"] else 0
        found = [Sheet(suite, version, "val", "policy", None, [])]
    if plot is not None:
        first = found[0]
        title = f"{first.title()}, campaign {view.name}"
        arms = stats(first.rows, "arm")
        plot.write_text(medal_svg(arms, incumbents(view), title=title), encoding="utf-8")
    if as_json:
        records = [_record(view, one, by) for one in found]
        extra = {"others": records[1:]} if records[1:] else {}
        print(json.dumps({**(record or {}), **records[0], **extra}, ensure_ascii=False))
        return
    for number, one in enumerate(found):
        lines = stats(one.rows, by)  # type: ignore[arg-type]
        print("\n" * bool(number) + (one.title() if one.rows else f"{one.medals}, suite {suite}"))
        print("\n".join(table(view, lines, by, of=one)))
        if lines:
            seeds, what = (
                ("train seeds", "scripts") if one.measurement is None else ("seeds", "runs")
            )
            print(f"± standard error over {seeds}; [95 % bootstrap of the {what}]")
    if plot is not None:
        print(f"plot    {plot}")


def _record(view: CampaignView, one: Sheet, by: str) -> dict[str, Any]:
    from selfevo.medal_stats import stats

    lines = stats(one.rows, by)  # type: ignore[arg-type]
    return {
        "campaign": view.name,
        "medals": one.medals,
        "suite": one.suite,
        "suite_version": one.version,
        "split": one.split,
        "agent": one.agent,
        "measurement": one.measurement,
        "by": by,
        "rows": [{**asdict(line), **_named(view, line)} for line in lines],
    }


def incumbents(view: CampaignView) -> list[str]:
    """Arms in the order in which they were kept, the start first."""
    kept = [pr for _, pr in sorted(view.prs.items()) if pr.state == "merged"]
    return [view.rounds[0].control_arm, *(pr.arm for pr in kept)]


def _named(view: CampaignView, line: MedalStats) -> dict[str, Any]:
    """What the arm is: its PR's title, its fate, and whether it is the one now kept."""
    pr = next((pr for pr in view.prs.values() if pr.arm == line.arm), None)
    incumbent = line.arm == view.control_arm
    if pr is None:
        return {"name": "start", "verdict": "", "incumbent": incumbent}
    return {"name": pr.title, "verdict": view.rounds[pr.round].verdict, "incumbent": incumbent}


def table(
    view: CampaignView, lines: Sequence[MedalStats], by: str, of: Sheet | None = None
) -> list[str]:
    """The lines as an aligned table."""
    from selfevo.memory import clean
    from selfevo.text import table as aligned

    if not lines:
        return ["nothing measured yet"]
    extra = [by] if by in ("competition", "seed") else []
    head = ["round", "arm", *extra, "any medal %", "above median %", "percentile", "valid %"]
    head += ["gold", "silver", "bronze"]
    head += ["scripts" if of is None or of.measurement is None else "runs", ""]
    body = []
    for line in lines:
        named = _named(view, line)
        rates = [_shown(line.rates[name]) for name in ("any_medal", "above_median", "percentile")]
        body.append(
            [
                str(line.round),
                clean(named["name"]),
                *([line.group] if extra else []),
                *rates,
                f"{line.rates['valid'].mean:.0f}",
                *(str(getattr(line, medal)) for medal in ("gold", "silver", "bronze")),
                str(line.scripts),
                "incumbent" if named["incumbent"] else named["verdict"],
            ]
        )
    right = (0, *range(len(head) - 6, len(head) - 1))
    return aligned([head, *body], right=right)


def _shown(rate: Rate) -> str:
    return f"{rate.mean:.1f} ± {rate.sem:.1f} [{rate.low:.1f}, {rate.high:.1f}]"


# ------------------------------------------------------------------ shared by run and sealed


def _commands() -> Commands:
    from selfevo import arms

    return arms.Commands()


@contextlib.contextmanager
def _goes_on() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a measurement with the right next step."""
    from selfevo.cli import say

    try:
        yield
    except KeyboardInterrupt:
        say("interrupted: the same command goes on")
        raise typer.Exit(130) from None
    except SystemExit as error:
        if error.code != 143:
            raise
        say("terminated: the same command goes on")
        raise typer.Exit(143) from None


def _finish(
    view: CampaignView,
    folder: Path,
    suite: str,
    outcome: Outcome,
    chosen: Sequence[Target],
    as_json: bool,
) -> None:
    """The measurement's table; exit code 1 where a commit had no policy left."""
    from selfevo.cli import say

    record = {
        "folder": str(outcome.folder),
        "measured": outcome.measured,
        "known": outcome.known,
        "missing": outcome.missing,
    }
    show(view, folder, suite, as_json=as_json, only=outcome.id, record=record)
    if not as_json:
        print(f"log     {outcome.folder / 'events.jsonl'}")
    if outcome.missing:
        say(f"{len(outcome.missing)} of {len(chosen)} commits have no policy left")
        raise typer.Exit(1)
