"""Made-up competitions for tests: a table drawn from a task's facts, split, with its answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.tables import write_tables

WORDS = (
    *("great", "good", "nice", "best", "love", "like", "food", "tea", "sugar"),
    *("bad", "awful", "worst", "hate", "not", "very", "fine"),
)


def facts(kind: str = "regression", metric: str = "rmse", **changes: object) -> TaskFacts:
    """Facts of a small task: 80 rows, three numeric columns unless changed."""
    values: dict[str, object] = {
        "kind": kind,
        "metric": metric,
        "rows": 80,
        "numeric": 3,
        "categorical": 0,
        "text": 0,
        "levels": 0,
        "missing": 0.0,
        "classes": {"regression": 0, "binary": 2}.get(kind, 4),
        "skew_or_balance": 0.3,
        "time": False,
    }
    return TaskFacts(**(values | changes))  # type: ignore[arg-type]


def make_competition(task: TaskFacts, folder: Path, *, seed: int = 0, test_rows: int = 60) -> Path:
    """Write `folder/public` (three files) and `folder/private/test.csv`; returns public."""
    random = np.random.default_rng(seed)
    n = task.rows + test_rows
    columns: dict[str, object] = {}
    signal = 0.3 * random.normal(size=n)
    for i in range(task.numeric):
        # every third column holds few whole numbers, like an hour
        values = random.normal(size=n) if i % 3 else random.integers(1, 25, n).astype(float)
        signal = signal + (values - values.mean()) / values.std() * (1 + i % 2)
        columns[f"n{i}"] = values
    for i in range(task.categorical):
        level = random.integers(0, max(task.levels, 2), n)
        signal = signal + random.normal(size=max(task.levels, 2))[level]
        columns[f"c{i}"] = [f"level {k}" for k in level]
    for i in range(task.text):
        worth = random.normal(size=len(WORDS))
        picked = [random.integers(0, len(WORDS), random.integers(4, 20)) for _ in range(n)]
        signal = signal + np.array([3 * worth[k].mean() for k in picked])
        columns[f"t{i}"] = [" ".join(WORDS[j] for j in k) + f" w{i}{k[0]}!" for k in picked]
    table = pd.DataFrame(columns)
    for name in table if task.missing else ():
        if not name.startswith("t"):
            table.loc[random.random(n) < task.missing, name] = np.nan
    table["target"] = _target(task, np.asarray(signal))
    classes = sorted(set(table["target"])) if task.kind == "multiclass" else ()
    public = folder / "public"
    write_tables(
        table[: task.rows],
        table[task.rows :],
        public,
        folder / "private",
        classes=classes,
        fill=1 / len(classes) if classes else 0.5,
    )
    return public


def _target(task: TaskFacts, signal: np.ndarray) -> object:
    if task.kind == "regression":
        return np.exp(signal / 2) if task.metric == "rmsle" else signal
    if task.kind == "binary":
        return (signal > np.median(signal)).astype(int)
    return [f"k{v}" for v in pd.qcut(signal, task.classes, labels=False)]
