"""If trees take the faster kind of attention: `python -m benchmarks.parts --json`, on one GPU.

`model/parts.py` divides a tree's attention among kernels without a mask where it estimates that
this takes less than flex attention, by constants. Here both ways are timed on rows and trees of
several shapes, forward and backward, 16 query heads and 4 key heads of 128, bfloat16, in turns; a
time is a median. Figures:

- `regret_max`: the chosen way's time over the faster one's, the worst of all shapes;
- `estimate_error_max`: how far the estimated share of flex attention's time is from the measured
  one, as a ratio ≥ 1, the worst of the shapes that are divided;
- `planned_pair`, `flash_pair`: a pair's time in cuDNN's square, and in gathered rows, over its time
  in flex attention; the constants of the same names.

Exit code 1 if `regret_max` passes 1.15.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import CONFIG, Case, in_turns
from benchmarks.common import emit, report
from model.part_attend import PartAttend, divided_attention
from model.part_kernels import Places
from model.parts import Division, Row, divide, division
from model.strands import find_strands
from model.visible import VisibleAttend, forest_visibility

REGRET = 1.15


class _Never(PartAttend):
    """Leaves all to the mask."""

    def __call__(self, q_MND: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> None:
        return None


@dataclass(frozen=True)
class Shape:
    """Depths of a forest in pre-order."""

    name: str
    depth: list[int]


def rows(length: int, total: int) -> Shape:
    return Shape(f"rows of {length}", [*range(length)] * (total // length))


def branches(trunk: int, count: int, length: int) -> Shape:
    """Answers to one prompt; the first goes on in the prompt's strand."""
    branch = [*range(trunk, trunk + length)]
    return Shape(f"{count} × {length} on {trunk}", [*range(trunk), *branch * count])


def spines(agents: int, trunk: int, turns: int, leaf: int, step: int) -> Shape:
    """Agents on one prompt, each a long branch with an answer hanging off it every turn."""
    depth = [*range(trunk)]
    for _ in range(agents):
        depth += range(trunk, trunk + turns * step + leaf)
        for turn in reversed(range(turns)):
            depth += range(trunk + turn * step, trunk + turn * step + leaf)
    return Shape(f"{agents} spines of {turns} turns, {leaf} of {step}", depth)


def shapes(small: bool) -> list[Shape]:
    if small:
        return [rows(100, 300), branches(200, 3, 40), spines(2, 60, 4, 10, 30)]
    return [
        *(rows(length, 48_000) for length in (300, 1000, 2000, 4000, 8000, 24_000)),
        branches(8192, 7, 900),
        branches(4096, 8, 500),
        branches(4096, 8, 2000),
        branches(2000, 40, 300),
        spines(4, 4096, 20, 300, 800),
        spines(1, 2000, 60, 200, 400),
    ]


def in_parts(shape: Shape, found: Division, device: torch.device, pairs: int) -> Case:
    places = Places.of(found.rows, device) if found.rows else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return divided_attention(q, k, v, found, places)

    return Case("parts", run, len(shape.depth), pairs)


def masked(shape: Shape, device: torch.device, pairs: int) -> Case:
    seen = forest_visibility(shape.depth, device)
    attend = VisibleAttend(seen, CONFIG, _Never(seen.depth_M))
    return Case("flex", lambda q, k, v: attend(0, q, k, v), len(shape.depth), pairs)


def timed(cases: Sequence[Case], device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, in turns, after two untimed passes."""
    times = in_turns(cases, device, repeats, untimed=2)
    return {name: statistics.median(found) for name, found in times.items()}


def measure(repeats: int) -> dict[str, Any]:
    """All shapes both ways. On a CPU there is only the mask: it shows that this runs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    table: list[dict[str, Any]] = []
    regret, error = [1.0], [1.0]
    for shape in shapes(not cuda):
        strands = find_strands(torch.tensor(shape.depth))
        found, chosen = division(strands), divide(strands)
        cases = [masked(shape, device, found.pairs)]
        if cuda:
            cases.append(in_parts(shape, found, device, found.pairs))
        ms = timed(cases, device, repeats)
        row: dict[str, Any] = {
            "shape": shape.name,
            "tokens": len(shape.depth),
            "pairs": found.pairs,
            "parts": len(found.squares) + len(found.rectangles) + bool(found.rows),
            "estimated_share": found.cost / found.pairs,
            "chosen": "flex" if chosen is None else "parts",
        } | {f"{name}_ms": took for name, took in ms.items()}
        if cuda:
            row["measured_share"] = ms["parts"] / ms["flex"]
            row["regret"] = ms[row["chosen"]] / min(ms.values())
            regret.append(row["regret"])
            if chosen is not None:
                ratio = row["estimated_share"] / row["measured_share"]
                error.append(max(ratio, 1 / ratio))
        table.append(row)
        print(row, file=sys.stderr, flush=True)
    figures: dict[str, float] = {}
    if cuda:
        figures |= {"regret_max": max(regret), "estimate_error_max": max(error)}
        figures |= pair_costs(device, repeats)
    return report("parts", figures, table, ("torch", "triton"))


def pair_costs(device: torch.device, repeats: int) -> dict[str, float]:
    """A pair in squares with a plan and in gathered rows, where flex attention takes 1."""
    shape = rows(8192, 8 * 8192)
    found = division(find_strands(torch.tensor(shape.depth)))
    as_rows = tuple(Row(i * 8192, (i + 1) * 8192, ((i * 8192, (i + 1) * 8192),)) for i in range(8))
    took = timed(
        [
            masked(shape, device, found.pairs),
            in_parts(shape, found, device, found.pairs),
            replace(in_parts(shape, Division((), as_rows, ()), device, found.pairs), name="rows"),
        ],
        device,
        repeats,
    )
    return {
        "planned_pair": took["parts"] / took["flex"],
        "flash_pair": took["rows"] / took["flex"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    found = measure(options.repeats)
    emit(found, options.json)
    return 0 if found["figures"].get("regret_max", 1.0) <= REGRET else 1


if __name__ == "__main__":
    sys.exit(main())
