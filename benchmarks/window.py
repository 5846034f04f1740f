"""What a window is worth, simulated and done: `python -m benchmarks.window --json [--svg FILE]`

N = 64 slots, P = 16 groups a step; a step takes a quarter of a group's mean time, as long as 64
busy workers need for 16 groups. Times of groups, all with mean 1: lognormal (σ = 1), mixture (5 %
take ten times as long as the others), Pareto (exponent 1.5).

First real processes: for each workload three fleets side by side (fifo W = 1, windowed W = 0.3 N,
greedy W = N), each 64 workers, a trainer and a loop; the simulator runs the same draws. Then the
simulator alone runs more and longer draws. Kinds of `rows`:

    process   one run by processes against its simulation: `error` is that of the makespan,
              `step_error` the largest of any step's end, as a share of the makespan
    frontier  W from 1 to N: rate against fifo on the same draws (mean, 95 % interval), lag
    buffer    fifo with more slots, still 64 workers: the other way to spend lag
    spread    W = 0.3 N against fifo, by σ of the lognormal and time a step
    deadline  W = 0.3 N, groups cut off at a multiple of the mean: against fifo, and without
    draws     W = 0.3 N against fifo in runs as short as those by processes, 20 draws
    cost      microseconds a group of window and simulator

Figures, each the worst workload's: `sim_error_max` over all process runs; `windowed_vs_fifo` and
`windowed_vs_greedy`, ratios of rates by processes, `sim_windowed_vs_fifo` simulated; `max_lag` of
the windowed runs and its `lag_bound`; `mix_*`, how far a step's groups are from a fair sample.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from benchmarks.common import emit, report
from benchmarks.window_plot import frontier_svg
from benchmarks.window_processes import Fleet
from rl.window import Order, lag_bound, window_size
from rl.window_sim import WORKLOADS, Setup, Trace, Workload, draw, simulate

SLOTS, GROUPS, TRAIN_S = 64, 16, 0.25
ORDERS: tuple[Order, ...] = ("fifo", "windowed", "greedy")
WINDOWS = (1, 5, 9, 13, 17, 19, 25, 33, 41, 49, 57, 64)
BUFFERS = (64, 80, 96, 112, 128)
SPREADS = (0.0, 0.25, 0.5, 1.0, 1.5)
TRAIN_TIMES = (0.25, 1.0, 2.0, 4.0)
DEADLINES = (2.0, 4.0, 8.0)
PROCESS_STEPS, STEPS, SEEDS = 64, 200, 10
DRAWS, TARGET = 20, 1.05

Row = dict[str, Any]


def mix_distance(trace: Trace, durations: Sequence[float]) -> float:
    """Mean over steps of the largest gap between the distribution of the step's durations and that
    of all durations (Kolmogorov and Smirnov's). A fair sample of 16 has 0.21, never 0."""
    rng = random.Random(0)  # ties are broken by lot
    order = sorted(range(len(durations)), key=lambda i: (durations[i], rng.random()))
    rank = {index: (place + 0.5) / len(order) for place, index in enumerate(order)}
    gaps = []
    for step in range(len(trace.steps_s)):
        ranks = sorted(rank[t.index] for t in trace.takes if t.version == step)
        n = len(ranks)
        gaps.append(max(max((i + 1) / n - r, r - i / n) for i, r in enumerate(ranks)))
    return statistics.fmean(gaps)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - float(half), mean + float(half)


def setup(window: int, *, slots: int = SLOTS, train_s: float = TRAIN_S) -> Setup:
    """The benchmark's, but for the window."""
    return Setup(slots, window, GROUPS, train_s, workers=SLOTS)


# ------------------------------------------------------------------ processes


def by_processes(steps: int, scale_s: float) -> list[Row]:
    """Each workload in each order by real processes, and the simulation of the same."""
    rows: list[Row] = []
    with ExitStack() as stack, ThreadPoolExecutor(len(ORDERS)) as threads:
        fleets = [stack.enter_context(Fleet(SLOTS)) for _ in ORDERS]
        for workload in WORKLOADS:
            durations = draw(workload, steps * GROUPS + SLOTS, seed=0)
            asked = [setup(window_size(order, SLOTS)) for order in ORDERS]
            running = [
                threads.submit(fleet.run, durations, what, steps, scale_s)
                for fleet, what in zip(fleets, asked, strict=True)
            ]
            traces = [future.result() for future in running]
            for order, what, real in zip(ORDERS, asked, traces, strict=True):
                simulated = simulate(durations, what, steps)
                ends = zip(real.steps_s, simulated.steps_s, strict=True)
                row = {
                    "kind": "process",
                    "workload": workload,
                    "order": order,
                    "window": what.window,
                    "steps": steps,
                    "seconds": real.makespan_s * scale_s,
                    "simulated_s": simulated.makespan_s * scale_s,
                    "error": abs(real.makespan_s / simulated.makespan_s - 1),
                    "step_error": max(abs(a - b) for a, b in ends) / simulated.makespan_s,
                    "same_step_share": same_step_share(real, simulated),
                    "vs_fifo": real.steps_a_second / traces[0].steps_a_second,
                    "idle_share": real.idle_share,
                    "max_lag": max(real.lags),
                    "mean_lag": statistics.fmean(real.lags),
                }
                rows.append(row)
                print(
                    f"{workload:9} {order:8} {row['seconds']:6.2f} s, simulated "
                    f"{row['simulated_s']:6.2f} s, {row['vs_fifo']:.3f} x fifo",
                    file=sys.stderr,
                )
    return rows


def same_step_share(one: Trace, other: Trace) -> float:
    """Of the groups of one trace, those that the other trains on in the same step."""
    steps = {take.index: take.version for take in other.takes}
    return statistics.fmean(steps.get(take.index) == take.version for take in one.takes)


# ------------------------------------------------------------------ simulation


def frontier(workload: Workload, steps: int, seeds: int) -> list[Row]:
    """Rate against fifo, and lag, for windows from 1 to N and for fifo with a longer buffer."""
    rows: list[Row] = []
    draws = [draw(workload, steps * GROUPS + max(BUFFERS), seed) for seed in range(1, seeds + 1)]
    base = [simulate(durations, setup(1), steps) for durations in draws]
    asked = [("frontier", setup(window)) for window in WINDOWS]
    asked += [("buffer", setup(1, slots=slots)) for slots in BUFFERS]
    for kind, what in asked:
        traces = [simulate(durations, what, steps) for durations in draws]
        gains = [b.makespan_s / t.makespan_s for b, t in zip(base, traces, strict=True)]
        mean, low, high = interval(gains) if what != setup(1) else (1.0, 1.0, 1.0)
        lags = sorted(lag for trace in traces for lag in trace.lags)
        rows.append(
            {
                "kind": kind,
                "workload": workload,
                "slots": what.slots,
                "window": what.window,
                "vs_fifo": mean,
                "vs_fifo_low": low,
                "vs_fifo_high": high,
                "idle_share": statistics.fmean(trace.idle_share for trace in traces),
                "mean_lag": statistics.fmean(lags),
                "p99_lag": lags[int(0.99 * len(lags))],
                "max_lag": lags[-1],
                "lag_bound": lag_bound(what.slots, what.window, GROUPS),
                "most_before": max(take.before for trace in traces for take in trace.takes),
                "before_bound": what.slots + what.window - 2,
                "mix": statistics.fmean(
                    mix_distance(t, d) for t, d in zip(traces, draws, strict=True)
                ),
            }
        )
    return rows


def when_it_pays(steps: int, seeds: int) -> list[Row]:
    """W = 0.3 N against fifo: by spread of the times and seconds a step, and by deadline."""
    window = window_size("windowed", SLOTS)
    rows: list[Row] = []

    def seconds(
        draws: Sequence[Sequence[float]], size: int, train_s: float, deadline_s: float = math.inf
    ) -> list[float]:
        asked = Setup(SLOTS, size, GROUPS, train_s, deadline_s)
        return [simulate(durations, asked, steps).makespan_s for durations in draws]

    def ratio(one: Sequence[float], other: Sequence[float]) -> float:
        return statistics.fmean(a / b for a, b in zip(one, other, strict=True))

    def logs(seed: int) -> list[float]:
        return [math.log(x) + 0.5 for x in draw("lognormal", steps * GROUPS + SLOTS, seed)]

    normal = [logs(seed) for seed in range(1, seeds + 1)]
    for sigma in SPREADS:
        draws = [[math.exp(sigma * z - sigma**2 / 2) for z in seed] for seed in normal]
        rows += [
            {
                "kind": "spread",
                "sigma": sigma,
                "train_s": train_s,
                "vs_fifo": ratio(seconds(draws, 1, train_s), seconds(draws, window, train_s)),
            }
            for train_s in TRAIN_TIMES
        ]
    for workload in WORKLOADS:
        draws = [draw(workload, steps * GROUPS + SLOTS, seed) for seed in range(1, seeds + 1)]
        whole = seconds(draws, window, TRAIN_S)
        for deadline_s in DEADLINES:
            cut = seconds(draws, window, TRAIN_S, deadline_s)
            row = {
                "kind": "deadline",
                "workload": workload,
                "deadline_s": deadline_s,
                "cut_share": statistics.fmean(d > deadline_s for seed in draws for d in seed),
                "vs_fifo": ratio(seconds(draws, 1, TRAIN_S, deadline_s), cut),
                "vs_no_deadline": ratio(whole, cut),
            }
            rows.append(row)
    return rows


def single_draws(steps: int) -> list[Row]:
    """How much the ratio of one short run says: W = 0.3 N against fifo, draw by draw."""
    rows: list[Row] = []
    for workload in WORKLOADS:
        gains = []
        for seed in range(DRAWS):
            durations = draw(workload, steps * GROUPS + SLOTS, seed)
            fifo, windowed = (
                simulate(durations, setup(size), steps).makespan_s
                for size in (1, window_size("windowed", SLOTS))
            )
            gains.append(fifo / windowed)
        below = sum(gain < TARGET for gain in gains)
        rows.append(
            {
                "kind": "draws",
                "workload": workload,
                "steps": steps,
                "draws": DRAWS,
                "below_target": below,
                "least": min(gains),
                "median": statistics.median(gains),
            }
        )
    return rows


def cost() -> list[Row]:
    """Microseconds a group for `Window` and simulator together, also at the size of the blog's."""
    rows: list[Row] = []
    for slots in (SLOTS, 8192):
        durations = draw("lognormal", 5 * slots, seed=0)
        asked = Setup(slots, window_size("windowed", slots), slots // 4, TRAIN_S)
        took = []
        for _ in range(3):
            start = time.perf_counter()
            groups = len(simulate(durations, asked, 16).takes)
            took.append((time.perf_counter() - start) / groups * 1e6)
        rows.append(
            {"kind": "cost", "slots": slots, "window": asked.window, "us_a_group": min(took)}
        )
    return rows


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """The benchmark's figures, each the worst of its workloads."""
    runs = [row for row in rows if row["kind"] == "process"]
    size = window_size("windowed", SLOTS)
    curve = [row for row in rows if row["kind"] == "frontier"]
    windowed = [row for row in runs if row["order"] == "windowed"]
    greedy = {row["workload"]: row["vs_fifo"] for row in runs if row["order"] == "greedy"}
    mine = [row for row in curve if row["window"] == size]
    return {
        "sim_error_max": max(row["error"] for row in runs),
        "windowed_vs_fifo": min(row["vs_fifo"] for row in windowed),
        "windowed_vs_greedy": min(row["vs_fifo"] / greedy[row["workload"]] for row in windowed),
        "sim_windowed_vs_fifo": min(row["vs_fifo"] for row in mine),
        "max_lag": max(row["max_lag"] for row in [*windowed, *mine]),
        "lag_bound": lag_bound(SLOTS, size, GROUPS),
        "mix_fifo": max(row["mix"] for row in curve if row["window"] == 1),
        "mix_windowed": max(row["mix"] for row in mine),
        "mix_greedy": max(row["mix"] for row in curve if row["window"] == SLOTS),
    }


def main() -> None:
    """Run, print one object, and draw the frontier if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, help="draw the lag frontier into this file")
    parser.add_argument("--scale", type=float, default=0.25, help="mean seconds a group, processes")
    parser.add_argument("--process-steps", type=int, default=PROCESS_STEPS)
    parser.add_argument("--steps", type=int, default=STEPS, help="simulated, a draw")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    args = parser.parse_args()
    rows = by_processes(args.process_steps, args.scale)
    for workload in WORKLOADS:
        rows += frontier(workload, args.steps, args.seeds)
    rows += when_it_pays(args.steps, args.seeds)
    rows += single_draws(args.process_steps)
    rows += cost()
    if args.svg:
        args.svg.write_text(frontier_svg(rows), encoding="utf-8")
    emit(report("window", figures(rows), rows, packages=("scipy",)), args.json)


if __name__ == "__main__":
    main()
