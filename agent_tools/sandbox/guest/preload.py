"""What a worker loads before its first script, so that every script finds it loaded."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from agent_tools.sandbox.guest.script import PATH_FDS

# What scripts of the suites import; importing here makes them free there.
PRELOAD = (
    "csv", "datetime", "itertools", "json", "math", "pickle", "re", "statistics", "warnings",
    "numpy", "pandas", "scipy.sparse", "scipy.stats", "scipy.optimize", "joblib", "sklearn",
    *(f"sklearn.{name}" for name in (
        "calibration", "cluster", "compose", "decomposition", "discriminant_analysis", "dummy",
        "ensemble", "feature_extraction.text", "feature_selection", "gaussian_process", "impute",
        "isotonic", "kernel_approximation", "kernel_ridge", "linear_model", "metrics",
        "mixture", "model_selection", "multiclass", "multioutput", "naive_bayes", "neighbors",
        "neural_network", "pipeline", "preprocessing", "random_projection", "svm", "tree",
    )),
)  # fmt: skip


def open_unreachable_path() -> None:
    """Let scripts import from folders that their user cannot reach (a Python below /root).

    Such folders are opened here and imported through /proc/self/fd, which needs no right on the
    folders above them.
    """
    free = iter(PATH_FDS)

    def reachable(path: Path) -> bool:
        return all(part.stat().st_mode & 0o001 for part in (path, *path.parents) if part.is_dir())

    def moved(entry: str) -> str:
        path = Path(entry)
        if not entry or not path.is_dir() or reachable(path.resolve()):
            return entry
        fd = os.open(entry, os.O_PATH | os.O_DIRECTORY)
        target = next(free)
        os.dup2(fd, target, inheritable=True)
        os.close(fd)
        return f"/proc/self/fd/{target}"

    names = {entry: moved(entry) for entry in sys.path}
    sys.path[:] = [names[entry] for entry in sys.path]
    for module in list(sys.modules.values()):
        where = getattr(module, "__path__", None)
        if isinstance(where, list):
            for old, new in names.items():
                where[:] = [
                    new + place[len(old) :] if old and place.startswith(old + "/") else place
                    for place in where
                ]
    sys.path_importer_cache.clear()


def preload() -> None:
    """Import what scripts use and run the usual calls once."""
    load(PRELOAD)
    if "sklearn.pipeline" in sys.modules:
        _warm_up()


def load(names: Iterable[str]) -> None:
    """Import modules, those that exist; numerical libraries get one thread."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    if "numpy" in sys.modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("threadpoolctl").threadpool_limits(1)


def imported(code: str) -> list[str]:
    """Modules of PRELOAD that a script's import statements name, or [] where it does not parse."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    names: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in dict.fromkeys(names) if name in PRELOAD]


def _warm_up() -> None:
    """First calls import and build tables; done here they cost the scripts nothing."""
    import io

    import numpy as np
    import pandas as pd
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    text = "id,a,b,target\n" + "".join(f"{i},{i % 7}.5,{'xyz'[i % 3]},{i % 2}\n" for i in range(60))
    frame = pd.read_csv(io.StringIO(text))
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["a"]), (OneHotEncoder(), ["b"])
    )
    make_pipeline(columns, LogisticRegression()).fit(frame, frame.target).predict_proba(frame)
    numbers = np.asarray(frame[["a"]])
    HistGradientBoostingClassifier(max_iter=2).fit(numbers, frame.target).predict(numbers)
    frame.to_csv(io.StringIO(), index=False)
