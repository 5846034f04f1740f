"""Inline SVG for the report. Pure functions; colours are CSS variables, so dark mode works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Series:
    """One curve: `kind` is control or candidate, points are (step, value)."""

    label: str
    kind: str
    points: Sequence[tuple[float, float]]


def number(value: float) -> str:
    """Three significant digits, no exponent where it can be helped."""
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e6 else text


def curve_chart(
    title: str, series: Sequence[Series], *, floor: float | None = None, ceil: float | None = None
) -> Markup:
    """Small multiple of training curves over steps; control and candidate in two colours.

    `floor` and `ceil` fix the value range where a metric has a natural one.
    """
    width, height = 232.0, 140.0
    left, right, top, bottom = 36.0, 8.0, 26.0, 20.0
    points = [p for s in series for p in s.points]
    if not points:
        return Markup("")
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low = min(ys) if floor is None else min(floor, min(ys))
    high = max(ys) if ceil is None else max(ceil, max(ys))
    if ceil is None:
        high += 0.08 * (high - low)  # so that the largest value does not lie on the frame
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def py(y: float) -> float:
        return top + (high - y) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)} by step">',
        f'<text class="chart-title" x="0" y="13">{escape(title)}</text>',
    ]
    for value in (low, (low + high) / 2, high):
        y = py(value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" '
            f'text-anchor="end">{number(value)}</text>'
        )
    for value, anchor in ((x0, "start"), (x1, "end")):
        parts.append(
            f'<text class="tick" x="{px(value):.1f}" y="{height - 6}" '
            f'text-anchor="{anchor}">{number(value)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(left + width - right) / 2:.0f}" y="{height - 6}" '
        'text-anchor="middle">step</text>'
    )
    for line in series:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        last = line.points[-1]
        parts.append(
            f'<g class="{escape(line.kind)}"><title>{escape(line.label)}: '
            f"{number(line.points[0][1])} → {number(last[1])}</title>"
            f'<polyline class="curve" points="{path}"/>'
            + "".join(
                f'<circle r="1.9" cx="{px(x):.1f}" cy="{py(y):.1f}"/>'
                for x, y in line.points
                if len(line.points) <= 24
            )
            + "</g>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def gate_chart(
    control: Sequence[float], candidate: Sequence[float], smallest: float | None
) -> Markup:
    """Both arms' seeds and means on one percentile axis, with what the test would have accepted."""
    width, height = 900.0, 118.0
    left, right = 84.0, 16.0
    values = [*control, *candidate]
    if not values:
        return Markup("")
    mean0 = sum(control) / len(control) if control else 0.0
    reach = mean0 + (smallest or 0.0)
    low = max(0.0, min(values) - 6)
    high = min(100.0, max([*values, reach if reach <= 100 else 0.0]) + 6)
    if high - low < 10:
        high = low + 10

    def px(value: float) -> float:
        return left + (value - low) / (high - low) * (width - left - right)

    parts = [
        f'<svg class="gate" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        'aria-label="percentile of each train seed, control and candidate">'
    ]
    step = 5 if high - low <= 40 else (10 if high - low <= 70 else 20)
    tick = int(low / step) * step
    while tick <= high:
        if tick >= low:
            x = px(tick)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="92"/>')
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="108" text-anchor="middle">{tick}</text>'
            )
        tick += step
    if smallest is not None and control:
        end = min(px(reach), width - right)
        parts.append(
            f'<g class="reach"><title>the smallest difference that this test accepts: '
            f'{smallest:.1f} points</title><rect x="{px(mean0):.1f}" y="46" height="8" rx="4" '
            f'width="{max(2.0, end - px(mean0)):.1f}"/>'
            f'<text class="tick" x="{min(end + 6, width - right - 70):.1f}" y="53.5">'
            f"needs +{smallest:.1f}</text></g>"
        )
    for label, kind, scores, y in (
        ("control", "control", control, 30.0),
        ("candidate", "candidate", candidate, 70.0),
    ):
        parts.append(
            f'<text class="label" x="{left - 14}" y="{y + 4:.0f}" text-anchor="end">{label}</text>'
        )
        if not scores:
            continue
        mean = sum(scores) / len(scores)
        parts.append(f'<g class="{kind}">')
        parts += [
            f'<circle class="seed" r="5.5" cx="{px(v):.1f}" cy="{y}"><title>{v:.1f}</title>'
            "</circle>"
            for v in scores
        ]
        parts.append(
            f'<line class="mean" x1="{px(mean):.1f}" x2="{px(mean):.1f}" '
            f'y1="{y - 13:.0f}" y2="{y + 13:.0f}"/>'
        )
        parts.append(
            f'<text class="value" x="{px(mean) + 9:.1f}" y="{y - 9:.0f}">{mean:.1f}</text></g>'
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def time_bar(rows: Sequence[tuple[str, float]]) -> Markup:
    """One stacked bar: where the time went."""
    total = sum(value for _, value in rows) or 1.0
    parts = [
        '<svg class="timebar" viewBox="0 0 1000 26" preserveAspectRatio="none" role="img" '
        'aria-label="share of time by activity">'
    ]
    x = 0.0
    for i, (label, value) in enumerate(rows):
        width = 1000 * value / total
        parts.append(
            f'<rect class="t{i}" x="{x:.2f}" y="0" width="{max(0.0, width - 2):.2f}" '
            f'height="26"><title>{escape(label)}: {value / total:.1%}</title></rect>'
        )
        x += width
    parts.append("</svg>")
    return Markup("".join(parts))
