"""The lag frontier as an SVG: rate against largest lag, and against mean lag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, TOP, BOTTOM = 860, 340, 48, 292
PANELS = ((64, 424), (500, 840))
COLOURS = {"lognormal": "#4c8bd6", "mixture": "#d98b2b", "pareto": "#3f8f5b"}
NAMES = {
    "lognormal": "lognormal, σ = 1",
    "mixture": "5 % ten times as long",
    "pareto": "Pareto 1.5",
}
MARKED = (1, 19, 33, 64)


def frontier_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """From the benchmark's rows `frontier` and `buffer`."""
    shown = [row for row in rows if row["kind"] in ("frontier", "buffer")]
    low, high = 0.95, 0.1 + max(float(row["vs_fifo"]) for row in shown)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    ]

    def up(value: float) -> float:
        return BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)

    def text(x: float, y: float, words: str, more: str = "") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>')

    def panel(
        number: int, title: str, axis: str, key: str, span: tuple[float, float], ticks: range
    ) -> None:
        left, right = PANELS[number]

        def across(value: float) -> float:
            return left + (value - span[0]) / (span[1] - span[0]) * (right - left)

        text(left, 20, title, 'font-weight="600"')
        for tenth in range(10, int(high * 10) + 1, 2):
            y = up(tenth / 10)
            parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#e4e4e4"/>')
            text(left - 8, y + 4, f"{tenth / 10:.1f}", 'text-anchor="end" fill="#444"')
        for tick in ticks:
            x = across(tick)
            parts.append(f'<path d="M{x:.1f} {BOTTOM}v5" stroke="#444"/>')
            text(x, BOTTOM + 19, str(tick), 'text-anchor="middle" fill="#444"')
        parts.append(f'<path d="M{left} {TOP}V{BOTTOM}H{right}" fill="none" stroke="#444"/>')
        text((left + right) / 2, BOTTOM + 38, axis, 'text-anchor="middle" fill="#444"')
        for workload, colour in COLOURS.items():
            for kind, style in (("frontier", ""), ("buffer", ' stroke-dasharray="4 4"')):
                mine = [r for r in shown if r["kind"] == kind and r["workload"] == workload]
                points = [(across(r[key]), up(r["vs_fifo"])) for r in mine]
                line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
                parts.append(
                    f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.6"{style}/>'
                )
                for (x, y), row in zip(points, mine, strict=True):
                    marked = kind == "frontier" and row["window"] in MARKED
                    fill = colour if kind == "frontier" else "#fff"
                    parts.append(
                        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if marked else 2.5}" '
                        f'fill="{fill}" stroke="{colour}"/>'
                    )
                    if marked and workload == "mixture" and key == "most_before":
                        text(x - 7, y - 7, f"W = {row['window']}", 'text-anchor="end" fill="#444"')

    panel(
        0,
        "rate against fifo, by the largest lag",
        "groups taken between a group’s admission and its turn, at most",
        "most_before",
        (54, 130),
        range(60, 131, 10),
    )
    panel(
        1,
        "… and by the mean lag",
        "versions, mean",
        "mean_lag",
        (2.5, 7.5),
        range(3, 8),
    )
    for place, (workload, colour) in enumerate(COLOURS.items()):
        text(76, TOP + 14 + 17 * place, f"● {NAMES[workload]}", f'fill="{colour}"')
    text(76, TOP + 14 + 17 * 3, "— window W = 1 … 64, 64 slots", 'fill="#444"')
    text(76, TOP + 14 + 17 * 4, "┄ fifo with 64 … 128 slots", 'fill="#444"')
    return "".join(parts) + "</svg>\n"
