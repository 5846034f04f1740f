"""Collects metric rows of any length in bounded memory; both readers feed it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping

# At most twice this many points a key are held; longer series are thinned to their extremes.
MAX_POINTS = 2_000
MAX_KEYS = 2_000
# Keys of the row itself, or added by wandb, that are no metric.
RESERVED = frozenset({"step", "t"})

_WORDS = {"nan": math.nan, "inf": math.inf, "infinity": math.inf}


def as_number(value: object) -> float | None:
    """A metric value as float: numbers, booleans, and NaN or infinities written as words.

    Returns None for anything else (text, lists), which is no metric.
    """
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:  # an integer beyond float64
            return math.inf if value > 0 else -math.inf
    if isinstance(value, str):
        word = value.strip().lower()
        sign = -1.0 if word.startswith("-") else 1.0
        number = _WORDS.get(word.lstrip("+-"))
        return None if number is None else sign * number
    return None


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one mapping with dotted keys; other values are kept as they are."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


class _Series:
    """One key's points, steps strictly rising."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def add(self, step: int, value: float) -> None:
        # A step at or below the last one rewrites history (a resumed run), as TensorBoard has it.
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > 2 * MAX_POINTS:
            self._thin()

    def _thin(self) -> None:
        """Of each four neighbours keep two, the smallest and the largest (non-finite first)."""
        keep = [0]
        last = len(self.steps) - 1
        for start in range(1, last, 4):
            group = range(start, min(start + 4, last))
            broken = [i for i in group if not math.isfinite(self.values[i])]
            finite = [i for i in group if math.isfinite(self.values[i])]
            chosen = set(broken[:1])
            if finite:
                chosen.add(max(finite, key=self.values.__getitem__))
                if not broken:
                    chosen.add(min(finite, key=self.values.__getitem__))
            keep += sorted(chosen)
        keep.append(last)
        self.steps = array("q", [self.steps[i] for i in keep])
        self.values = array("d", [self.values[i] for i in keep])


class RowCollector:
    """Rows in, a bounded list of rows out.

    Up to 2 × `MAX_POINTS` rows are kept exactly. Beyond that each key keeps its own extremes over
    the whole range (first, last, minimum and maximum of every stretch, first non-finite of every
    stretch), so a late divergence stays visible and a row may lack keys.
    """

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._series: dict[str, _Series] = {}
        self._last_step: int | None = None
        self._went_back = 0
        self._ignored_keys = 0

    def warn(self, message: str) -> None:
        """Remember something the reader of the history should know; repeated ones once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def add(self, step: int, metrics: Mapping[str, object]) -> None:
        """Add one row; values that are no numbers and reserved keys are dropped."""
        if self._last_step is not None and step < self._last_step:
            self._went_back += 1
        self._last_step = step
        for key, value in metrics.items():
            if key in RESERVED or key.startswith("_"):
                continue
            number = as_number(value)
            if number is None:
                continue
            series = self._series.get(key)
            if series is None:
                if len(self._series) >= MAX_KEYS:
                    self._ignored_keys += 1
                    continue
                series = self._series[key] = _Series()
            series.add(step, number)

    def rows(self) -> list[dict[str, float]]:
        """Rows by rising step, each ``{"step": n, metric: value, …}`` with sorted keys."""
        if self._went_back:
            self.warn(f"the step went back {self._went_back} times: the later values were kept")
        if self._ignored_keys:
            self.warn(f"more than {MAX_KEYS} metrics: the others were ignored")
        by_step: dict[int, dict[str, float]] = {}
        for key in sorted(self._series):
            series = self._series[key]
            for step, value in zip(series.steps, series.values, strict=True):
                by_step.setdefault(step, {"step": step})[key] = value
        return [by_step[step] for step in sorted(by_step)]
