"""Offline medals: counted a round, reported, never steered by. Pure functions.

A medal is an *offline medal* of the suite that a campaign uses; it is never an MLE-bench medal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_tools.errors import InfraError
from selfevo.gate import SeedScore, seed_score
from selfevo.views import CampaignView, ScoreView

MEDALS = ("gold", "silver", "bronze")
COUNTS = (*MEDALS, "any_medal", "above_median")


@dataclass(frozen=True)
class Measured:
    """What one evaluation says: the gate's score, and what is only reported."""

    score: SeedScore
    competitions: dict[str, dict[str, float]]
    medals: dict[str, int]
    valid_share: float


def parse_scores(text: str, where: str) -> list[dict[str, Any]]:
    """The rows of a scores.jsonl; `InfraError` names a line that is not one."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["competition"], row["status"], row["valid"], row["percentile"]
        except (ValueError, KeyError, TypeError) as error:
            raise InfraError(
                f"{where} line {number}: not a score row ({error}); delete the folder and "
                "run `selfevo resume`"
            ) from error
        rows.append(row)
    return rows


def measure(rows: Sequence[Mapping[str, Any]], seed: int) -> Measured | None:
    """Reduce the score rows of one train seed; None when every script failed for the machine.

    Rows of status `infra` are counted and left out; an invalid submission scores percentile 0.
    """
    graded = [row for row in rows if row["status"] != "infra"]
    infra = len(rows) - len(graded)
    if not graded:
        return None
    by_competition: dict[str, list[Mapping[str, Any]]] = {}
    for row in graded:
        by_competition.setdefault(str(row["competition"]), []).append(row)
    percentiles = {
        name: [float(row["percentile"]) if row["valid"] else 0.0 for row in found]
        for name, found in sorted(by_competition.items())
    }
    competitions = {
        name: {
            "percentile": sum(percentiles[name]) / len(found),
            "valid": sum(bool(row["valid"]) for row in found) / len(found),
            "any_medal": sum(bool(row.get("any_medal")) for row in found),
            "scripts": len(found),
        }
        for name, found in sorted(by_competition.items())
    }
    medals = {name: sum(bool(row.get(name)) for row in graded) for name in COUNTS}
    medals["scripts"] = len(graded)
    valid = sum(bool(row["valid"]) for row in graded) / len(graded)
    return Measured(seed_score(seed, percentiles, infra), competitions, medals, valid)


@dataclass(frozen=True)
class MedalRow:
    """Medals of one arm over all of its seeds; `round` is the one that measured it first."""

    round: int
    name: str
    verdict: str
    incumbent: bool
    scripts: int
    gold: int
    silver: int
    bronze: int
    any_medal: int
    above_median: int
    percentile: float
    valid_share: float

    @property
    def share(self) -> float:
        return self.any_medal / self.scripts if self.scripts else 0.0


def arm_row(
    scores: Sequence[ScoreView], round_: int, name: str, verdict: str, incumbent: bool
) -> MedalRow | None:
    """Sum the medals of an arm's seeds; None for an arm without scores."""
    if not scores:
        return None

    def total(key: str) -> int:
        return sum(s.medals.get(key, 0) for s in scores)

    return MedalRow(
        round=round_,
        name=name,
        verdict=verdict,
        incumbent=incumbent,
        scripts=total("scripts"),
        gold=total("gold"),
        silver=total("silver"),
        bronze=total("bronze"),
        any_medal=total("any_medal"),
        above_median=total("above_median"),
        percentile=sum(s.score.score for s in scores) / len(scores),
        valid_share=sum(s.valid_share for s in scores) / len(scores),
    )


def medal_rows(view: CampaignView) -> list[MedalRow]:
    """The base arm, then each round's candidate, in order. `incumbent`: the arm now kept."""
    if not view.info:
        return []
    rows = []
    base_arm = view.rounds[0].control_arm
    base = arm_row(view.arm_scores(base_arm), 0, "start", "", view.control_arm == base_arm)
    if base:
        rows.append(base)
    for number in sorted(view.prs):
        pr = view.prs[number]
        row = arm_row(
            view.arm_scores(pr.arm),
            pr.round,
            pr.title,
            view.rounds[pr.round].verdict,
            view.control_arm == pr.arm and pr.state == "merged",
        )
        if row:
            rows.append(row)
    return rows


def before_after(view: CampaignView) -> tuple[MedalRow, MedalRow] | None:
    """The start's row and the present incumbent's; None before the start was measured."""
    rows = medal_rows(view)
    if not rows:
        return None
    kept = [row for row in rows if row.incumbent]
    return rows[0], (kept[-1] if kept else rows[0])
