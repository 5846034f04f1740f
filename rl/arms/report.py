"""Tables (markdown) of arms' logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan
from statistics import fmean
from typing import Any

from model.study.statistics import Interval, t_interval
from rl.arms.log import Log
from rl.arms.spec import MAIN, VARIANTS
from rl.arms.statistics import mean_percentile, slope_of, val_difference
from rl.errors import ConfigError

TAIL = 5
"""Steps whose mean is the train percentile "at the end"."""
EXPECTED_SLOPE = 0.7
"""Percentile points a step: what CISPO at 3e-4 gained on small competitions in 40 steps."""

Runs = dict[str, dict[int, Log]]


def tables(logs: Sequence[Log]) -> str:
    """All tables as markdown. ConfigError where nothing is done or the settings differ."""
    runs, starts = _sorted(logs)
    if not runs:
        raise ConfigError("no finished arm in these logs; run `python -m rl.arms run` to its end")
    start = [log.val[0] for log in starts if 0 in log.val]
    first = next(iter(next(iter(runs.values())).values()))
    settings = first.head["settings"]
    seeds = sorted({seed for of in runs.values() for seed in of})
    devices = sorted(
        {str(log.head.get("device", "?")) for of in runs.values() for log in of.values()}
    )
    text = [
        f"Suite `{settings['suite']}`, {settings['steps']} steps × {settings['scripts']} scripts, "
        f"seeds {', '.join(map(str, seeds))}; {', '.join(devices)}. `u4`: four updates a batch. "
        "Mean percentiles; brackets: 95 % intervals, of val over competitions, scripts and seeds."
        + ("" if len(seeds) > 1 else " One seed: the intervals leave seeds out."),
        _final_table(runs, start),
        "Differences on val, last checkpoint, to the first row with as many updates, and of four "
        "updates to one:",
        _difference_table(runs) if len(runs) > 1 else "(one arm)",
        "Train percentile, means of ten steps:",
        _train_curve(runs),
        "Val percentile by step:",
        _val_curve(runs, start),
        "What the ratio did (means over the last ten steps; the largest of the run):",
        _ratio_table(runs),
    ]
    return "\n\n".join(part for part in text if part) + "\n"


def _sorted(logs: Sequence[Log]) -> tuple[Runs, list[Log]]:
    done = [log for log in logs if log.done is not None]
    keys = ("suite", "steps", "scripts", "checkpoint")
    kinds = {tuple(log.head["settings"][key] for key in keys) for log in done}
    if len(kinds) > 1:
        raise ConfigError(f"the logs hold {len(kinds)} settings; report one at a time")
    order = [*MAIN, *(name for name in VARIANTS if name not in MAIN)]
    arms = [(log, log.arm) for log in done if log.arm is not None]
    arms.sort(key=lambda pair: (pair[1].updates, order.index(pair[1].variant), pair[1].seed))
    runs: Runs = {}
    for log, arm in arms:
        runs.setdefault(arm.recipe, {})[arm.seed] = log
    return runs, [log for log in done if log.arm is None]


def _final_table(runs: Runs, start: Sequence[Any]) -> str:
    rows = []
    if start:
        rows.append(["start", "", "", f"{mean_percentile(start[0]):.1f}", "", "", ""])
    for recipe, of in runs.items():
        logs = list(of.values())
        begin = _over(logs, lambda log: fmean(s["train"] for s in log.steps[:TAIL]))
        end = _over(logs, _train_end)
        rise = val_difference(_last_vals(logs), start) if start else Interval(0, 0, 0)
        rows.append(
            [
                f"`{recipe}`",
                f"{begin.mean:.1f}",
                f"{end.mean:.1f}{_bracket(end)}",
                f"{fmean(mean_percentile(v) for v in _last_vals(logs)):.1f}",
                _signed(rise) if start else "",
                f"{100 * fmean(fmean(s['valid'] for s in log.steps[-TAIL:]) for log in logs):.0f}",
                f"{fmean(log.done['scripts'] for log in logs if log.done):.0f} × {len(logs)}",
            ]
        )
    head = ("arm", "train, first 5 steps", "train, last 5 (over seeds)", "val", "val − start",
            "valid %", "scripts × seeds")  # fmt: skip
    return _table(head, rows)


def _difference_table(runs: Runs) -> str:
    pairs: list[tuple[str, str]] = []
    for recipe in runs:
        variant, _, updates = recipe.rpartition("-u")
        base = f"{MAIN[0]}-u{updates}"
        if base in runs and base != recipe:
            pairs.append((recipe, base))
        one = f"{variant}-u1"
        if updates != "1" and one in runs:
            pairs.append((recipe, one))
    rows = []
    for ours, theirs in pairs:
        a, b = runs[ours], runs[theirs]
        val = val_difference(_last_vals(list(a.values())), _last_vals(list(b.values())))
        train = t_interval([_train_end(a[s]) - _train_end(b[s]) for s in a if s in b])
        each = t_interval([_val_end(a[s]) - _val_end(b[s]) for s in a if s in b])
        rows.append(
            [f"`{ours}` − `{theirs}`", _signed(val), _signed(each), _signed(train), _verdict(val)]
        )
    return _table(("", "val", "val, t over seeds", "train, t over seeds", "val says"), rows)


def _train_curve(runs: Runs) -> str:
    last = max(len(log.steps) for of in runs.values() for log in of.values())
    parts = [(a, min(a + 10, last)) for a in range(0, last, 10)]
    rows = []
    for recipe, of in runs.items():
        row = [f"`{recipe}`"]
        for a, b in parts:
            found = [
                fmean(s["train"] for s in log.steps[a:b])
                for log in of.values()
                if len(log.steps) > a
            ]
            row.append(f"{fmean(found):.1f}" if found else "–")
        rows.append(row)
    return _table(("arm", *(f"{a + 1}–{b}" for a, b in parts)), rows)


def _val_curve(runs: Runs, start: Sequence[Any]) -> str:
    steps = sorted({step for of in runs.values() for log in of.values() for step in log.val})
    base = f"{mean_percentile(start[0]):.1f}" if start else "–"
    rows = []
    for recipe, of in runs.items():
        row = [f"`{recipe}`", base]
        for step in steps:
            found = [mean_percentile(log.val[step]) for log in of.values() if step in log.val]
            row.append(f"{fmean(found):.1f}" if found else "–")
        rows.append(row)
    return _table(("arm", "0", *map(str, steps)), rows)


def _ratio_table(runs: Runs) -> str:
    rows = []
    for recipe, of in runs.items():
        steps = [s for log in of.values() for s in log.steps if "weight_max" in s]
        if not steps:
            continue
        late = [s for log in of.values() for s in log.steps[-10:]]
        rows.append(
            [
                f"`{recipe}`",
                f"{max(s['weight_max'] for s in steps):.3g}",
                f"{100 * fmean(s['capped'] for s in late):.2g}",
                f"{fmean(s['entropy'] for s in late):.3f}",
                f"{fmean(s['grad'] for s in late):.3f}",
                f"{100 * fmean(s['zero_std'] for s in late):.1f}",
            ]
        )
    head = ("arm", "largest weight", "cut in the worst update, %", "entropy", "gradient norm",
            "groups without spread, %")  # fmt: skip
    return _table(head, rows) if rows else ""


def curve(log: Log) -> str:
    """A short curve in words: slope, interval, and what it could have shown."""
    values = [s["train"] for s in log.steps]
    try:
        found = slope_of(values, EXPECTED_SLOPE)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    shown = "rises" if found.slope.low > 0 else "falls" if found.slope.high < 0 else "is open"
    return (
        f"{log.head['arm']}: train percentile {fmean(values[:TAIL]):.1f} → "
        f"{fmean(values[-TAIL:]):.1f} over {len(values)} steps; {_signed(found.slope, 2)} a step: "
        f"it {shown}. Noise of a step {found.noise:.1f}; a slope of {found.smallest:.2f} is shown "
        f"in 80 % of such runs, one of {found.expected:g} in {100 * found.power:.0f} %."
    )


def _last_vals(logs: Sequence[Log]) -> list[Any]:
    return [log.val[max(log.val)] for log in logs if log.val]


def _val_end(log: Log) -> float:
    return mean_percentile(log.val[max(log.val)])


def _train_end(log: Log) -> float:
    return fmean(step["train"] for step in log.steps[-TAIL:])


def _over(logs: Sequence[Log], measure: Callable[[Log], float]) -> Interval:
    return t_interval([measure(log) for log in logs])


def _verdict(value: Interval) -> str:
    return "better" if value.low > 0 else "worse" if value.high < 0 else "open"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _signed(value: Interval, digits: int = 1) -> str:
    return "–" if isnan(value.mean) else f"{value.mean:+.{digits}f}{_bracket(value, digits, '+')}"


def _bracket(value: Interval, digits: int = 1, sign: str = "") -> str:
    if isnan(value.low):
        return ""
    return f" [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"
