"""The spread of a suite's fields as one SVG: every entry, the medal lines, the tiers in colours."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass

from agent_tools.errors import UserError
from agent_tools.mle_bench.medals import Thresholds, medal_thresholds
from agent_tools.mle_bench.registry import Suite, load_config

TIERS = {"trivial": "#9aa0a6", "default": "#4c8bd6", "tuned": "#d98b2b", "strong": "#b03a2e"}
WIDTH, LEFT, RIGHT, TOP, ROW = 860, 178, 20, 54, 30
WORST_RANK = 85  # entries behind it lie on the left edge


@dataclass(frozen=True)
class Spread:
    """One field: (tier, score) best first, and its thresholds."""

    id: str
    lower_is_better: bool
    entries: tuple[tuple[str, float], ...]
    limits: Thresholds

    def place(self, score: float) -> float:
        """0 at the score of rank 85 and behind, 1 at the best."""
        best, worst = self.entries[0][1], self.entries[min(WORST_RANK, len(self.entries)) - 1][1]
        if best == worst:
            return 1.0
        return min(1.0, max(0.0, (score - worst) / (best - worst)))


def spreads(suite: Suite) -> list[Spread]:
    """The fields of a suite's competitions. Raises `UserError` where one is not fitted."""
    found = []
    for ref in suite.competitions:
        config = load_config(ref.id)
        path = config.folder / "leaderboard.csv"
        if not path.is_file():
            raise UserError(f"{ref.id} has no leaderboard ({path}): fit its field first")
        with path.open(newline="", encoding="utf-8") as file:
            entries = tuple((row["tier"], float(row["score"])) for row in csv.DictReader(file))
        limits = medal_thresholds([score for _, score in entries], config.lower_is_better)
        found.append(Spread(ref.id, config.lower_is_better, entries, limits))
    return found


def svg(fields: Sequence[Spread], title: str) -> str:
    """One row a field: a stroke an entry, the better the further to the right."""
    height = TOP + ROW * len(fields) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>'
        f'<text x="12" y="20" font-weight="600">{title}</text>'
    ]
    x = LEFT
    for tier, colour in TIERS.items():
        parts.append(f'<text x="{x}" y="40" fill="{colour}">▮ {tier}</text>')
        x += 90
    parts.append(
        f'<text x="{x}" y="40" fill="#444">│ bronze, silver, gold: ranks 40, 20, 10</text>'
    )
    for n, field in enumerate(fields):
        parts.append(_row(field, TOP + ROW * n))
    y = height - 8
    parts.append(
        f'<text x="{LEFT}" y="{y}" fill="#444">score of rank {WORST_RANK} and behind</text>'
        f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end" fill="#444">best</text></svg>\n'
    )
    return "".join(parts)


def _row(field: Spread, top: float) -> str:
    def px(score: float) -> float:
        return LEFT + field.place(score) * (WIDTH - LEFT - RIGHT)

    middle = top + ROW / 2
    parts = [
        f'<text x="{LEFT - 10}" y="{middle + 4:g}" text-anchor="end">{field.id}</text>'
        f'<path d="M{LEFT} {middle:g}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>'
    ]
    for score in (field.limits.bronze, field.limits.silver, field.limits.gold):
        parts.append(f'<path d="M{px(score):.1f} {top + 3:g}v{ROW - 6}" stroke="#444"/>')
    for tier, colour in TIERS.items():
        strokes = "".join(
            f"M{px(score):.1f} {middle - 6:g}v12" for name, score in field.entries if name == tier
        )
        parts.append(f'<path d="{strokes}" stroke="{colour}" stroke-width="2" opacity=".75"/>')
    return "".join(parts)
