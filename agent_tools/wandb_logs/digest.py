"""A run's history in at most 300 tokens, readable without any other run beside it.

The format and its scales are documented in ``docs/digest.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent_tools.wandb_logs.detectors import Finding, detect
from agent_tools.wandb_logs.history import RunHistory

DEFAULT_KEYS = (
    "reward/mle/mean",
    "rollout/valid_frac",
    "rollout/truncated_frac",
    "rollout/timeout_frac",
    "policy/entropy",
    "policy/grad_norm",
    "loss/cispo/weight_max",
    "optim/lr",
)
MAX_KEYS = 8
SPARK_STEPS = 10
MARKS_A_LINE = 2

# Fixed ranges of the spark, so that a digit means the same in every run. Logarithmic ranges are
# (low, high): digit 0 is at or below low, 9 is the last tenth below high and everything above.
LOG_SCALES = {
    "policy/entropy": (1e-2, 1e1),  # nats a token; a digit is a factor of 2
    "policy/grad_norm": (1e-2, 1e2),  # before clipping; a digit is a factor of 2.5
    "optim/lr": (5e-7, 5e-2),  # a digit is half a decade: 1e-4 is 4, 3e-4 is 5, 1e-3 is 6
    "loss/cispo/weight_max": (1e-1, 1e1),  # a digit is a factor of 1.6; ratio 1 is 5
    "mismatch_kl/mean": (1e-6, 1e1),
    "mismatch_kl/max": (1e-6, 1e1),
}
# A value this close below a digit's border counts as above it: an on-policy weight_max is 1 up to
# rounding and must not flicker between 4 and 5.
BORDER = 0.02

# The line also names the extreme that matters: "best" (largest) or "peak" (largest, worst).
EXTREMES = {
    "reward/mle/mean": "best",
    "reward": "best",
    "rollout/valid_frac": "best",
    "policy/grad_norm": "peak",
    "loss/cispo/weight_max": "peak",
}


@dataclass(frozen=True)
class Digest:
    """text: the digest, one key a line; findings: what the detectors say, most severe first."""

    text: str
    findings: tuple[Finding, ...]


def digest(
    history: RunHistory,
    *,
    keys: Sequence[str] = DEFAULT_KEYS,
    detectors: Callable[[RunHistory], list[Finding]] = detect,
) -> Digest:
    """Digest a run: at most 8 of `keys` (those it logged), and every detector's mark.

    Pure: the same history gives the same text. Raises ValueError for more than 8 keys.
    """
    if len(keys) > MAX_KEYS:
        raise ValueError(f"a digest shows at most {MAX_KEYS} keys, not {len(keys)}: pass fewer")
    findings = detectors(history)
    shown = [key for key in keys if history.series(key)]
    last = int(history.rows[-1]["step"]) if history.rows else 0
    lines = [f"run {history.state} steps {last}"]
    names = short_names(shown)
    for key in shown:
        marks = [finding.name for finding in findings if finding.key == key]
        lines.append(_line(history, key, names[key], marks))
    others = [finding.name for finding in findings if finding.key not in shown]
    if others:
        lines.append(" ".join(["also", *dict.fromkeys(others[:4])]))
    return Digest("\n".join(lines), tuple(findings))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The word that stands for each key: its last part, or the whole key where that is unclear."""
    special = {"reward/mle/mean": "reward"}
    words = [special.get(key, key.rsplit("/", 1)[-1]) for key in keys]
    return {
        key: word if words.count(word) == 1 else key for key, word in zip(keys, words, strict=True)
    }


def number(value: float) -> str:
    """Three significant digits as one word: 0.412, 12.3, 3.00e-4, 0, nan, inf."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")  # rounds first: 0.9996 is 1.00
    power = int(exponent)
    if -3 <= power <= 2:
        return f"{value:.{2 - power}f}"
    return f"{mantissa}e{power}"


def level(key: str, value: float, low: float, high: float) -> str:
    """The spark's digit for a value; `low` and `high` are used by keys without a fixed range.

    Fractions and rewards: tenths of 0 to 1. Keys of `LOG_SCALES`: tenths of the logarithmic
    range. Other keys: tenths of their own range in this run, 5 when constant. "x": not finite.
    """
    if not math.isfinite(value):
        return "x"
    if key in LOG_SCALES:
        bottom, top = LOG_SCALES[key]
        share = math.log(value / bottom) / math.log(top / bottom) if value > 0 else 0.0
    elif key.endswith("_frac") or key.startswith("reward/"):
        share = value
    elif high > low:
        # Halves first: the difference of two huge floats may overflow.
        share = (value / 2 - low / 2) / (high / 2 - low / 2)
    else:
        share = 0.5
    return str(min(9, math.floor(min(1.0, max(0.0, share)) * 10 + BORDER)))


def spark(history: RunHistory, key: str) -> list[str]:
    """At most ten digits over the whole run: "-" where the key is missing, "x" if not finite.

    Up to ten rows a digit is a row; above, a digit is a tenth of the rows: its mean, or for keys
    whose peaks matter its largest value; one non-finite value makes the tenth "x".
    """
    values = [row.get(key) for row in history.rows]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    count = min(SPARK_STEPS, len(values))
    digits = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        present = [value for value in part if value is not None]
        if not present:
            digits.append("-")
            continue
        broken = [value for value in present if not math.isfinite(value)]
        if broken:
            value = broken[0]
        elif EXTREMES.get(key) == "peak":
            value = max(present)
        else:
            value = sum(item / len(present) for item in present)
        digits.append(level(key, value, low, high))
    return digits


def _line(history: RunHistory, key: str, name: str, marks: Sequence[str]) -> str:
    series = history.series(key)
    words = [name, "first", number(series[0][1]), "last", number(series[-1][1])]
    finite = [(step, value) for step, value in series if math.isfinite(value)]
    if key in EXTREMES and finite:
        step, value = max(finite, key=lambda point: point[1])
        words += [EXTREMES[key], f"{number(value)}@{step}"]
    words += ["spark", *spark(history, key)]
    if marks:
        words += ["mark", *dict.fromkeys(marks[:MARKS_A_LINE])]
    return " ".join(words)
