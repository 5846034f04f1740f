"""`selfevo medals`: the ledger's table, as text, JSON or a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from selfevo.medal_stats import MedalStats, Rate
    from selfevo.views import CampaignView

SPLIT = "val"


def medals(
    lab: Annotated[
        Path, typer.Argument(help="lab folder, or the folder of one campaign (LAB/runs/NAME)")
    ] = Path(),
    campaign: Annotated[
        str | None,
        typer.Option("--campaign", "-c", help="name of the campaign (default: the newest)"),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="round | arm | competition | seed")] = "round",
    plot: Annotated[
        Path | None, typer.Option("--plot", help="also write this .svg: medals against time")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine output on stdout")] = False,
) -> None:
    """Offline medals of every measured arm, with standard errors and intervals."""
    from agent_tools.errors import UserError
    from selfevo.cli import choose, load
    from selfevo.medal_plot import medal_svg
    from selfevo.medal_stats import BYS, stats

    choose("--by", by, BYS)
    if plot is not None and plot.suffix != ".svg":
        raise UserError(f"--plot {plot}: give a file name that ends in .svg")
    view, folder = load(lab, campaign)
    lines = stats(_rows(folder, view), by)  # type: ignore[arg-type]
    suite = f"{view.info['suite']}, version {view.info['suite_version']}"
    if plot is not None:
        arms = stats(_rows(folder, view), "arm")
        title = f"offline medals, suite {suite}, {SPLIT} competitions, campaign {view.name}"
        plot.write_text(medal_svg(arms, incumbents(view), title=title), encoding="utf-8")
    if as_json:
        record = {
            "campaign": view.name,
            "suite": view.info["suite"],
            "suite_version": view.info["suite_version"],
            "split": SPLIT,
            "by": by,
            "rows": [{**asdict(line), **_named(view, line)} for line in lines],
        }
        print(json.dumps(record, ensure_ascii=False))
        return
    print(f"offline medals, suite {suite}, {SPLIT} competitions")
    print("\n".join(table(view, lines, by)))
    if lines:
        print("± standard error over train seeds; [95 % bootstrap of the scripts]")
    if plot is not None:
        print(f"plot    {plot}")


def _rows(folder: Path, view: CampaignView) -> list[dict[str, Any]]:
    from selfevo.ledger import open_ledger
    from selfevo.medal_stats import QUERY

    with open_ledger(folder) as connection:
        found = connection.execute(QUERY, [view.name, view.info["suite"], SPLIT, None])
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


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


def table(view: CampaignView, lines: list[MedalStats], by: str) -> list[str]:
    """The lines as an aligned table."""
    from selfevo.text import table as aligned

    if not lines:
        return ["nothing measured yet"]
    extra = [by] if by in ("competition", "seed") else []
    head = ["round", "arm", *extra, "any medal %", "above median %", "percentile", "valid %"]
    head += ["gold", "silver", "bronze", "scripts", ""]
    body = []
    for line in lines:
        named = _named(view, line)
        rates = [_shown(line.rates[name]) for name in ("any_medal", "above_median", "percentile")]
        body.append(
            [
                str(line.round),
                named["name"],
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
