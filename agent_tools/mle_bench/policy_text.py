"""The short prompt of a policy: one line about a task, and what comes back as a script.

The bundled model was trained on exactly these words, so training, evaluation and the scaffold of
`agent_tools.mle_agent` all take them from here.
"""

from __future__ import annotations

import re

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.metrics import LOWER_IS_BETTER

DEFAULT_SYSTEM = "Write a Python script that reads the csv files and writes submission.csv ."
_FENCE = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)


def describe(facts: TaskFacts) -> str:
    """One line of about 30 words about a task, separated by single spaces.

    Numbers are rounded so that near tasks read alike: rows and levels to one significant digit,
    missing share and balance to the nearest twentieth, skew to the nearest half.
    """
    better = "lower" if LOWER_IS_BETTER[facts.metric] else "higher"
    words = [
        f"task {facts.kind} metric {facts.metric} {better} is better",
        f"rows {_one_digit(facts.rows)}",
        f"numeric {facts.numeric} categorical {facts.categorical} text {facts.text}",
        f"levels {_one_digit(facts.levels)} missing {_twentieth(facts.missing)}",
    ]
    if facts.kind == "regression":
        skew = max(-5.0, min(5.0, round(2 * facts.skew_or_balance) / 2))
        words.append(f"skew {skew + 0.0:.1f}")
    else:
        words.append(f"classes {facts.classes} balance {_twentieth(facts.skew_or_balance)}")
    words.append(f"time {'yes' if facts.time else 'no'}")
    return " ".join(words)


def extract_script(content: str) -> str:
    """The Python text of a reply: the last fenced block if there is one, else the whole reply."""
    fenced = _FENCE.findall(content)
    return (fenced[-1] if fenced else content).strip()


def one_line(text: str, limit: int = 160) -> str:
    """The last non-empty line, without control characters, at most `limit` characters long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return "".join(char for char in last if char.isprintable())[:limit]


def _one_digit(n: int) -> int:
    if n < 10:
        return n
    scale = 10 ** (len(str(n)) - 1)
    return int((n + scale // 2) // scale * scale)


def _twentieth(share: float) -> str:
    return f"{round(share * 20) / 20:.2f}"
