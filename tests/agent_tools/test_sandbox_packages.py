"""The script environment's packages inside warm workers of both kinds."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_tools.errors import UserError
from agent_tools.paths import script_python
from agent_tools.sandbox import Limits, ScriptJob, WarmPool, make_pool

PATIENT = Limits(cpu_seconds=3, wall_seconds=30)


@pytest.fixture(scope="module", params=("bubblewrap", "process"))
def packaged(request: pytest.FixtureRequest) -> Iterator[WarmPool]:
    """One worker with the script environment's packages."""
    try:
        python = script_python()
    except UserError:
        python = Path(sys.executable)
    with make_pool(request.param, 1, python=python) as made:
        yield made


def test_script_packages_are_loaded_and_use_one_thread(packaged: WarmPool, tmp_path: Path) -> None:
    code = """
        import os, sys
        print(all(n in sys.modules for n in ("numpy", "pandas", "sklearn.ensemble")))
        import numpy as np, threadpoolctl
        from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
        x = np.random.rand(200, 3); y = x[:, 0] > 0.5
        HistGradientBoostingClassifier(max_iter=3).fit(x, y)
        RandomForestClassifier(5, n_jobs=-1).fit(x, y)
        print({p["num_threads"] for p in threadpoolctl.threadpool_info()})
        print(len(os.listdir("/proc/self/task")))
    """
    result = packaged.run([ScriptJob(textwrap.dedent(code), tmp_path, (), PATIENT)])[0]
    assert result.stdout.split() == ["True", "{1}", "1"], result


def test_modules_that_were_not_loaded_import(packaged: WarmPool, tmp_path: Path) -> None:
    """As root the script's user may not reach the interpreter's folder by its path."""
    code = """
        import sys
        names = ("sqlite3", "wsgiref.util", "sklearn.datasets", "scipy.signal", "xml.dom.minidom")
        assert not any(name in sys.modules for name in names)
        for name in names: __import__(name)
        b"x".decode("cp1252")
        from sklearn.datasets import load_iris
        print(load_iris().data.shape)
    """
    result = packaged.run([ScriptJob(textwrap.dedent(code), tmp_path, (), PATIENT)])[0]
    assert result.stdout == "(150, 4)\n", result
