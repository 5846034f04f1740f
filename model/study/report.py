"""Tables (markdown) of the study's logs: `python -m model.study report LOG…`.

Every difference is to the first variant of its study, seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import fmean

import numpy as np

from model.errors import ModelError
from model.study.log import Line
from model.study.probes import REACHES, TASKS
from model.study.statistics import Interval, package_interval, share_interval, t_interval
from model.study.variants import STUDIES, VARIANTS

EQUAL_NATS = 0.02
"""A loss difference of at most this much counts as equal."""
WORSE_SHARE = 0.05
"""An accuracy lower by at least this much counts as worse."""
LEARNT = 0.2
"""A task counts as learnt if the baseline answers this share at up to one window."""
MASTERED = 0.9
"""A seed counts as answering far away if it answers this share there, mean over the tasks."""
FAR = (3, 4)
"""Classes of distance that count as long: 4–8 and 8–16 windows."""

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

Runs = dict[str, dict[int, Line]]
Measure = Callable[[Line], float | None]


def tables(lines: Sequence[Line]) -> str:
    """All tables, and the verdict on attention, as one markdown text.

    Raises ModelError where there is nothing, or lines of different settings.
    """
    settings = sorted({str(line["setting"]) for line in lines})
    if len(settings) != 1:
        raise ModelError(
            f"the logs hold {len(settings)} settings (size and corpus); report one at a time"
        )
    runs: Runs = {}
    for line in lines:
        runs.setdefault(line["variant"], {})[line["seed"]] = line
    first = lines[0]
    text = [
        f"Size `{first['size']}`, corpus `{first['corpus']}`, window {first['window']}, context "
        f"{first['context']}, {first['heldout_packages']} held-out packages; trained on "
        f"{', '.join(sorted({str(line['device']) for line in lines}))}. Brackets: 95 % intervals."
    ]
    for study, names in STUDIES.items():
        shown = [name for name in names if name in runs]
        if names[0] in runs and len(shown) > 1:
            text += [f"## {study}", *_study(study, shown, runs)]
    return "\n\n".join(text) + "\n"


def write_into(document: str, text: str) -> str:
    """The document with the tables between its two marks. Raises ModelError where it has none."""
    start, _, rest = document.partition(f"{BEGIN}\n")
    _, found, end = rest.partition(END)
    if not found:
        raise ModelError(f"the document lacks the lines {BEGIN} and {END}; add them")
    return f"{start}{BEGIN}\n{text}{END}{end}"


def _study(study: str, names: Sequence[str], runs: Runs) -> Iterable[str]:
    yield _table(
        ("variant", "what", "parameters", "active", "tokens", "PFLOP", "seeds"),
        [_cost_row(name, runs[name]) for name in names],
    )
    columns = ["variant", "held-out loss", "difference, over seeds", "over packages"]
    extra: dict[str, Measure] = {}
    if study == "router":
        extra = {
            "load CV": lambda line: float(line["load"]["cv"]),
            "MaxVio": lambda line: float(line["load"]["max_violation"]),
        }
    if study == "mtp":
        extra = {"first module right": _first_module}
    rows = []
    for name in names:
        more = [_plain(_values(runs[name], measure), 3) for measure in extra.values()]
        rows.append([*_loss_row(name, names[0], runs), *more])
    yield _table((*columns, *extra), rows)
    if study == "attention":
        yield from _by_distance(names, runs)
        yield "Retrieval is learnt all or nothing. Seeds that learnt it beyond 4 windows:"
        yield _table(("variant", "seeds", "share (%)"), [_far_row(n, runs) for n in names])
        yield "Verdict by the rules above:"
        yield "\n".join(f"- `{name}`: {verdict(name, runs)}" for name in names[1:])
    else:
        yield "Accuracy on the tasks, all distances, and its difference:"
        measures = [(task, _task_measure(task, range(len(REACHES)))) for task in TASKS]
        yield _difference_table("variant", names, names[0], runs, measures, percent=True)


def _by_distance(names: Sequence[str], runs: Runs) -> Iterable[str]:
    edges = [f"≤ {reach} w" for reach in REACHES]
    classes = range(len(REACHES))
    yield "Held-out loss by position (text before it, in windows w), and its difference:"
    position = [(edges[i], _position_loss(i)) for i in classes]
    yield _difference_table("variant", names, names[0], runs, position)
    yield "Loss on repeats in held-out text, by distance to the last occurrence:"
    repeat = [(edges[i], _repeat_loss(i)) for i in classes]
    yield _difference_table("variant", names, names[0], runs, repeat)
    for task in TASKS:
        yield f"Accuracy (%) on `{task}` by distance, and its difference:"
        measures = [
            (edge, _task_measure(task, [i])) for edge, i in zip(edges, classes, strict=True)
        ]
        yield _difference_table("variant", names, names[0], runs, measures, percent=True)


@dataclass(frozen=True)
class Finding:
    """What the attention study says of one variant: loss on ordinary text, accuracy far away."""

    loss: Interval
    far: Interval
    tasks: tuple[str, ...]


def finding(name: str, runs: Runs) -> Finding:
    """Differences to full attention; far accuracy is the mean over the tasks that it learnt."""
    base = runs[STUDIES["attention"][0]]
    learnt = _learnt(base)
    far = _far(learnt)
    return Finding(_difference(runs[name], base, _loss), _difference(runs[name], base, far), learnt)


def verdict(name: str, runs: Runs) -> str:
    """The rule of docs/architecture_study.md on one variant."""
    found = finding(name, runs)
    if not found.tasks:
        return "not testable: full attention learnt no task"
    if isnan(found.loss.low) or isnan(found.far.low):
        return "not testable: one seed has no interval"
    far = "undecided"
    if found.far.high < 0 and found.far.mean <= -WORSE_SHARE:
        far = "worse"
    elif found.far.low > -WORSE_SHARE:
        far = "not worse"
    short = "undecided"
    if found.loss.high <= EQUAL_NATS:
        short = "equal"
    elif found.loss.low > EQUAL_NATS:
        short = "worse"
    said = {
        ("equal", "worse"): "reproduces the report",
        ("worse", "worse"): "worse on ordinary text already, and far away",
    }.get((short, far), "contradicts the report" if far == "not worse" else "undecided")
    return (
        f"**{said}**: loss {_signed(found.loss, 4)} ({short}), accuracy beyond 4 windows "
        f"{_signed(found.far, 1, 100)} points ({far}; {', '.join(found.tasks)})"
    )


# ------------------------------------------------------------------------------------ measures


def _loss(line: Line) -> float | None:
    nats = sum(sum(part["nats"]) for part in line["loss"].values())
    return float(nats / sum(sum(part["n"]) for part in line["loss"].values()))


def _position_loss(i: int) -> Measure:
    def measure(line: Line) -> float | None:
        count = sum(part["n"][i] for part in line["loss"].values())
        nats = sum(part["nats"][i] for part in line["loss"].values())
        return float(nats / count) if count else None

    return measure


def _repeat_loss(i: int) -> Measure:
    def measure(line: Line) -> float | None:
        part = line["repeats"]
        return float(part["nats"][i] / part["n"][i]) if part["n"][i] else None

    return measure


def _task_measure(task: str, classes: Iterable[int]) -> Measure:
    chosen = list(classes)

    def measure(line: Line) -> float | None:
        part = line["probes"][task]
        count = sum(part["n"][i] for i in chosen)
        return float(sum(part["right"][i] for i in chosen) / count) if count else None

    return measure


def _learnt(base: dict[int, Line]) -> tuple[str, ...]:
    """Tasks that the baseline answers within one window."""
    near = {task: _values(base, _task_measure(task, [0])) for task in TASKS}
    return tuple(task for task in TASKS if fmean([*near[task].values()] or [0.0]) >= LEARNT)


def _far(tasks: Sequence[str]) -> Measure:
    """Accuracy beyond 4 windows, mean over tasks."""

    def measure(line: Line) -> float | None:
        found = [_task_measure(task, FAR)(line) for task in tasks]
        known = [value for value in found if value is not None]
        return fmean(known) if known else None

    return measure


def _first_module(line: Line) -> float | None:
    return float(line["modules"][0]) if line["modules"] else None


def _values(runs: dict[int, Line], measure: Measure) -> dict[int, float]:
    found = {seed: measure(line) for seed, line in sorted(runs.items())}
    return {seed: value for seed, value in found.items() if value is not None}


def _difference(runs: dict[int, Line], base: dict[int, Line], measure: Measure) -> Interval:
    ours, theirs = _values(runs, measure), _values(base, measure)
    return t_interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


# ---------------------------------------------------------------------------------------- rows


def _cost_row(name: str, runs: dict[int, Line]) -> list[str]:
    line = next(iter(runs.values()))
    return [
        f"`{name}`",
        VARIANTS[name].note,
        f"{line['parameters'] / 1e6:.2f} M",
        f"{line['active'] / 1e6:.2f} M",
        f"{line['tokens'] / 1e6:.1f} M",
        f"{line['flops'] / 1e15:.3g}",
        ", ".join(str(seed) for seed in sorted(runs)),
    ]


def _far_row(name: str, runs: Runs) -> list[str]:
    found = _values(runs[name], _far(_learnt(runs[STUDIES["attention"][0]])))
    if not found:
        return [f"`{name}`", "–", "–"]
    hits = sum(value >= MASTERED for value in found.values())
    share = share_interval(hits, len(found))
    text = f"{100 * share.mean:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
    return [f"`{name}`", f"{hits} of {len(found)}", text]


def _loss_row(name: str, first: str, runs: Runs) -> list[str]:
    row = [f"`{name}`", _plain(_values(runs[name], _loss), 4)]
    if name == first:
        return [*row, "", ""]
    seeds = sorted(runs[name].keys() & runs[first].keys())
    if not seeds:
        return [*row, "–", "–"]
    packages = list(runs[first][seeds[0]]["loss"])

    def nats(line: Line) -> list[float]:
        return [sum(line["loss"][package]["nats"]) for package in packages]

    counts = [sum(runs[first][seeds[0]]["loss"][package]["n"]) for package in packages]
    difference = [
        np.array(nats(runs[name][seed])) - np.array(nats(runs[first][seed])) for seed in seeds
    ]
    over_packages = package_interval(np.stack(difference), np.array(counts, dtype=np.float64))
    over_seeds = _difference(runs[name], runs[first], _loss)
    return [*row, _signed(over_seeds, 4), _bracket(over_packages, 4).strip()]


def _difference_table(
    corner: str,
    names: Sequence[str],
    first: str,
    runs: Runs,
    measures: Sequence[tuple[str, Measure]],
    *,
    percent: bool = False,
) -> str:
    """The first variant's means, then each other's mean and difference."""
    scale, digits = (100, 1) if percent else (1, 3)
    rows = []
    for name in names:
        row = [f"`{name}`"]
        for _, measure in measures:
            text = _plain(_values(runs[name], measure), digits, scale)
            if name != first and text != "–":
                text += (
                    f" ({_signed(_difference(runs[name], runs[first], measure), digits, scale)})"
                )
            row.append(text)
        rows.append(row)
    return _table((corner, *(title for title, _ in measures)), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(values: dict[int, float], digits: int, scale: float = 1) -> str:
    return f"{scale * fmean(values.values()):.{digits}f}" if values else "–"


def _signed(value: Interval, digits: int, scale: float = 1) -> str:
    if isnan(value.mean):
        return "–"
    return f"{scale * value.mean:+.{digits}f}{_bracket(value, digits, scale)}"


def _bracket(value: Interval, digits: int, scale: float = 1) -> str:
    if isnan(value.low):
        return ""
    return f" [{scale * value.low:+.{digits}f}, {scale * value.high:+.{digits}f}]"
