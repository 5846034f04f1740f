"""What a start costs, and whether anything is left: `python -m benchmarks.sandbox --json`

One fixed scikit-learn script, whose fit takes 0.15 to 0.2 s on a quiet core, in four ways: in a
warm worker (`warm_ms`), in a new bubblewrap sandbox (`cold_ms`), in a new container (`docker_ms`)
and by exec in a running one (`docker_exec_ms`); medians, from the job to its result.
`warm_vs_cold` is the ratio of scripts a second on two workers each, taken in turns (the target is
≥ 5). `leaks` counts processes, mounts, control groups, open and temporary files that are there
after 500 small scripts and were not before (the target is 0). Without an engine the Docker figures
are null.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from agent_tools.errors import InfraError, UserError
from agent_tools.paths import script_python
from agent_tools.sandbox import Limits, PoolKind, ScriptJob, WarmPool, make_pool, open_shell
from agent_tools.sandbox.cgroups import find_hierarchies
from benchmarks.common import emit, report

SCRIPT = """
import time
import numpy as np
from sklearn.ensemble import RandomForestClassifier
x = np.random.default_rng(0).normal(size=(600, 12))
y = x[:, 0] * x[:, 1] > 0
start = time.perf_counter()
model = RandomForestClassifier(85, random_state=0).fit(x, y)
print(time.perf_counter() - start)
open("submission.csv", "w").write("score,%f" % model.score(x, y))
"""
SMALL = """
import os
open("submission.csv", "w").write("1")
open("/dev/shm/left", "w").write("x" * 10000)
if os.fork() == 0:
    os.setsid()
    os.execvp("sleep", ["sleep", "100"])
"""
_LIMITS = Limits(cpu_seconds=10.0, wall_seconds=120.0)
WORKERS = 2


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run_all(pool: WarmPool, jobs: Sequence[ScriptJob]) -> list[float]:
    """The fit times of a batch. Raises InfraError where a script does not end as ok."""
    results = pool.run(jobs)
    for result in results:
        if result.status != "ok":
            raise InfraError(f"a script ended as {result.status} ({result.last_line}): try again")
    return [float(result.stdout or 0) for result in results]


def latency(kind: PoolKind, job: ScriptJob, repeats: int, *, cold: bool = False) -> dict[str, Any]:
    """Median milliseconds of one script at a time, after one untimed."""
    with make_pool(kind, 1, cold=cold) as pool:
        fits = run_all(pool, [job])
        seconds = []
        for _ in range(repeats):
            seconds.append(timed(lambda: fits.extend(run_all(pool, [job]))))
    return {
        "way": f"{kind}{' cold' if cold else ''}",
        "ms": 1e3 * statistics.median(seconds),
        "fit_ms": 1e3 * statistics.median(fits[1:]),
    }


def rates(job: ScriptJob, repeats: int) -> list[dict[str, Any]]:
    """Scripts a second of two warm and two cold workers, in turns."""
    rows = []
    with (
        make_pool("bubblewrap", WORKERS) as warm,
        make_pool("bubblewrap", WORKERS, cold=True) as cold,
    ):
        run_all(warm, [job] * WORKERS)
        for repeat in range(repeats):
            row: dict[str, Any] = {"repeat": repeat}
            for name, pool, count in (("warm", warm, 12), ("cold", cold, 4)):
                start = time.perf_counter()
                run_all(pool, [job] * count)
                row[f"{name}_scripts_s"] = count / (time.perf_counter() - start)
            rows.append({**row, "ratio": row["warm_scripts_s"] / row["cold_scripts_s"]})
    return rows


def docker_exec_ms(repeats: int) -> float:
    """Median milliseconds of the script by exec in one running container."""
    from agent_tools.sandbox.docker_engine import ContainerInstance

    python = str(script_python())
    with open_shell("docker", limits=_LIMITS) as shell:
        instance = shell.instance
        assert isinstance(instance, ContainerInstance)

        def once() -> None:
            code, printed = instance.container.exec_run([python, "-c", SCRIPT])
            if code != 0:
                raise InfraError(f"exec failed ({printed[-200:]!r}): see the engine's log")

        once()
        return 1e3 * statistics.median(timed(once) for _ in range(repeats))


def state() -> dict[str, set[str]]:
    """What scripts could leave: processes below us, mounts, groups, open and temporary files."""
    groups = {path for h in find_hierarchies() for path in h.folders.values()}
    temporary = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    return {
        "processes": {str(p.pid) for p in psutil.Process().children(recursive=True)},
        "mounts": set(Path("/proc/self/mounts").read_text().splitlines()),
        "cgroups": {str(p) for g in groups for p in g.glob(f"selfevo-{os.getpid()}-*")},
        "descriptors": set(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "files": {str(p) for d in temporary for p in d.glob("*selfevo*")}
        | {str(p) for d in temporary for p in d.glob("left*")},
    }


def leaks(inputs: Path, scripts: int) -> dict[str, int]:
    """What is left after scripts that leave all they can, in an open pool and after it."""
    job = ScriptJob(SMALL, inputs, limits=_LIMITS)
    before = state()
    with make_pool("bubblewrap", WORKERS) as pool:
        pool.run([job] * 4)
        open_pool = state()
        pool.run([job] * scripts)
        during = state()
    after = state()
    return {
        name: len(during[name] - open_pool[name]) + len(after[name] - before[name])
        for name in before
    }


def measure(repeats: int, scripts: int) -> dict[str, Any]:
    """All figures; rows are the single measurements."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder)
        job = ScriptJob(SCRIPT, inputs, limits=_LIMITS)
        warm = latency("bubblewrap", job, 3 * repeats)
        cold = latency("bubblewrap", job, repeats, cold=True)
        rows: list[dict[str, Any]] = [warm, cold]
        missing = []
        docker_ms = exec_ms = None
        try:
            docker = latency("docker", job, repeats)
            docker_ms, exec_ms = docker["ms"], docker_exec_ms(repeats)
            rows.append(docker)
        except InfraError as error:
            missing.append(str(error))
        ratios = rates(job, repeats)
        left = leaks(inputs, scripts)
    figures = {
        "warm_vs_cold": statistics.median(row["ratio"] for row in ratios),
        "warm_ms": warm["ms"],
        "cold_ms": cold["ms"],
        "docker_ms": docker_ms,
        "docker_exec_ms": exec_ms,
        "fit_ms": warm["fit_ms"],
        "leaks": sum(left.values()),
    }
    packages = ("numpy", "scikit-learn", "docker")
    return report("sandbox", figures, [*rows, *ratios, left], packages, missing=missing)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if warm against cold misses 5 or anything is left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scripts", type=int, default=500, help="scripts of the leak count")
    options = parser.parse_args(arguments)
    try:
        result = measure(options.repeats, options.scripts)
    except (UserError, InfraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    emit(result, options.json)
    figures = result["figures"]
    return 0 if figures["warm_vs_cold"] >= 5 and figures["leaks"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
