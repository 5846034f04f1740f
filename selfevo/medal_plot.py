"""The headline plot as one SVG file: medal rate of each measured arm against time spent."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import escape

from selfevo.medal_stats import MedalStats
from selfevo.report_svg import number

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 42, 44
STYLE = """
  svg { font: 12px system-ui, sans-serif; background: #fff; color: #222; }
  text { fill: #444; } .title { font-weight: 600; fill: #222; }
  .grid { stroke: #e4e4e4; } .kept { stroke: #1a7f5a; fill: none; stroke-width: 2; }
  .arm { stroke: #9aa0a6; fill: #9aa0a6; } .arm.incumbent { stroke: #1a7f5a; fill: #1a7f5a; }
"""


def medal_svg(
    lines: Sequence[MedalStats],
    incumbents: Sequence[str],
    *,
    title: str,
    figure: str = "any_medal",
    label: str = "scripts with a medal, %",
) -> str:
    """Panels over wall-clock hours and over GPU-hours (hours of jobs, where no GPU worked).

    A point is an arm's mean over seeds with its 95 % interval; the line joins the arms in
    `incumbents`, in that order: what the campaign kept.
    """
    gpu = any(line.gpu_hours for line in lines)
    axes = (
        ("wall_hours", "hours since the start"),
        ("gpu_hours", "GPU-hours of all jobs") if gpu else ("job_hours", "hours of jobs, no GPU"),
    )
    panels = [
        f'<g transform="translate({i * WIDTH} 0)">'
        + _panel(lines, incumbents, axis, name, figure, label)
        + "</g>"
        for i, (axis, name) in enumerate(axes)
    ]
    width = WIDTH * len(axes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" '
        f'viewBox="0 0 {width} {HEIGHT}"><style>{STYLE}</style>'
        f'<text class="title" x="{LEFT}" y="18">{escape(title)}</text>{"".join(panels)}</svg>\n'
    )


def _panel(
    lines: Sequence[MedalStats],
    incumbents: Sequence[str],
    axis: str,
    axis_name: str,
    figure: str,
    label: str,
) -> str:
    most = max((getattr(line, axis) for line in lines), default=0.0) * 1.06 or 1.0
    unit = 60.0 if most < 2 else 1.0  # minutes for short campaigns
    axis_name = axis_name.replace("hours", "minutes") if unit > 1 else axis_name
    top = max((line.rates[figure].high for line in lines), default=0.0)
    top = min(100.0, max(10.0, 10.0 * (top // 10 + 1)))

    def px(x: float) -> float:
        return LEFT + x / most * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return TOP + (top - y) / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="34">{escape(label)}</text>']
    for k in range(5):
        y, x = py(top * k / 4), px(most * k / 4)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{number(top * k / 4)}</text>'
        )
        anchor = "end" if k == 4 else "middle"
        parts.append(
            f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">'
            f"{number(unit * most * k / 4)}</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(axis_name)}</text>"
    )
    by_arm = {line.arm: line for line in lines}
    kept = [by_arm[arm] for arm in incumbents if arm in by_arm]
    path = " ".join(f"{px(getattr(k, axis)):.1f},{py(k.rates[figure].mean):.1f}" for k in kept)
    parts.append(f'<polyline class="kept" points="{path}"/>')
    for line in lines:
        rate, x = line.rates[figure], px(getattr(line, axis))
        kind = "arm incumbent" if line.arm in incumbents else "arm"
        parts.append(
            f'<g class="{kind}"><title>round {line.round}, {escape(line.role)}: {rate.mean:.1f} '
            f"[{rate.low:.1f}, {rate.high:.1f}], {line.seeds} seeds, {line.scripts} scripts</title>"
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{py(rate.low):.1f}" y2="{py(rate.high):.1f}"/>'
            f'<circle r="4" cx="{x:.1f}" cy="{py(rate.mean):.1f}"/></g>'
        )
    return "".join(parts)
