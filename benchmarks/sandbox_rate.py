"""What isolation costs: `python -m benchmarks.sandbox_rate --json`

48 committed scripts of the policy's grammar, on the prepared competitions, through two warm
bubblewrap workers and through the same two workers bare (no namespaces, user, limits or filter),
in turns. Figures: `scripts_s` and `bare_scripts_s` (median over the repeats), `rate_vs_bare` (the
median of the paired ratios; the target is ≥ 0.8), `ok` scripts of one pass. `--remake` writes the
scripts anew from the grammar, keeping those that finish within the limits.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.registry import competition_dir, load_competition, load_suite
from agent_tools.paths import script_python
from agent_tools.sandbox import Limits, ScriptJob, WarmPool, make_pool
from agent_tools.sandbox.process import ProcessSandbox
from benchmarks.common import emit, report

SCRIPTS = Path(__file__).parent / "data" / "scripts_48.jsonl"
COUNT, WORKERS = 48, 2
_CHUNK = 12
_LIMITS = Limits(cpu_seconds=3.0, wall_seconds=60.0)


def load_jobs(path: Path = SCRIPTS) -> list[ScriptJob]:
    """The committed scripts as jobs. Raises UserError where the data are not prepared."""
    jobs = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        inputs = competition_dir(row["competition"], None) / "prepared" / "public"
        if not inputs.is_dir():
            raise UserError(
                f"{row['competition']} is not prepared: run "
                "`python -m agent_tools.mle_bench prepare --suite offline-small-v0`"
            )
        jobs.append(ScriptJob(row["script"], inputs, limits=_LIMITS))
    return jobs


def make_scripts(seed: int = 0) -> list[dict[str, str]]:
    """48 scripts from the grammar, spread over the suite's competitions, that end as `ok`."""
    from rl.envs.mle.grammar import sample_script

    names = load_suite("offline-small-v0").ids()
    tasks = {name: load_competition(name) for name in names}
    rng = random.Random(seed)
    kept: list[dict[str, str]] = []
    with make_pool("bubblewrap", WORKERS) as pool:
        while len(kept) < COUNT:
            task = tasks[names[len(kept) % len(names)]]
            script = sample_script(task.facts, rng)
            job = ScriptJob(script, task.public_dir, limits=Limits(cpu_seconds=2.5))
            if pool.run([job])[0].status == "ok":
                kept.append({"competition": task.id, "script": script})
    return kept


def timed(pools: dict[str, WarmPool], jobs: Sequence[ScriptJob]) -> list[dict[str, Any]]:
    """One pass of every pool over the scripts, a dozen at a time and in changing order, so that
    whatever else the machine does falls on both sides alike."""
    rows: dict[str, dict[str, Any]] = {
        name: {"pool": name, "seconds": 0.0, "cpu_s": 0.0, "ok": 0} for name in pools
    }
    for number, first in enumerate(range(0, len(jobs), _CHUNK)):
        order = list(pools) if number % 2 == 0 else list(reversed(pools))
        for name in order:
            start = time.perf_counter()
            results = pools[name].run(jobs[first : first + _CHUNK])
            rows[name]["seconds"] += time.perf_counter() - start
            rows[name]["cpu_s"] += sum(r.cpu_s for r in results)
            rows[name]["ok"] += sum(r.status == "ok" for r in results)
    return [{**row, "scripts_s": len(jobs) / row["seconds"]} for row in rows.values()]


def measure(repeats: int) -> dict[str, Any]:
    """Isolated and bare in turns, after one untimed pass of a few scripts each."""
    jobs = load_jobs()
    rows: list[dict[str, Any]] = []
    bare_sandbox = ProcessSandbox(script_python(), isolated=False)
    with make_pool("bubblewrap", WORKERS) as isolated, WarmPool(bare_sandbox, WORKERS) as bare:
        pools = {"bubblewrap": isolated, "bare": bare}
        for pool in pools.values():
            pool.run(jobs[:6])
        for repeat in range(repeats):
            rows += [{"repeat": repeat, **row} for row in timed(pools, jobs)]
        missing = list(isolated.missing)
    rate = {name: [row["scripts_s"] for row in rows if row["pool"] == name] for name in pools}
    ratios = [ours / theirs for ours, theirs in zip(rate["bubblewrap"], rate["bare"], strict=True)]
    figures = {
        "rate_vs_bare": statistics.median(ratios),
        "scripts_s": statistics.median(rate["bubblewrap"]),
        "bare_scripts_s": statistics.median(rate["bare"]),
        "ok": min(row["ok"] for row in rows),
    }
    return report(
        "sandbox_rate", figures, rows, ("numpy", "pandas", "scikit-learn"), missing=missing
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the result; exit code 1 if the rate misses 0.8."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox_rate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--remake", action="store_true", help="write the 48 scripts anew")
    options = parser.parse_args(arguments)
    try:
        if options.remake:
            SCRIPTS.write_text("".join(json.dumps(row) + "\n" for row in make_scripts()))
        result = measure(options.repeats)
    except (UserError, InfraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    emit(result, options.json)
    return 0 if result["figures"]["rate_vs_bare"] >= 0.8 else 1


if __name__ == "__main__":
    sys.exit(main())
