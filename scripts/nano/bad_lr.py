"""Which learning rate breaks the lab's short run? The template's bad setting is the answer.

For each rate and seed: the lab's short run (5 steps × 24 scripts, warm-up 1), and the fall of the
share of valid scripts from its first step to its last. The bad setting is the smallest rate at
which the share falls by at least 30 points in every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agent_tools.wandb_logs import read_run
from benchmarks.agent_digests import quiet_worker

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
FALL = 0.30


def short_run(rate: float, seed: int, checkpoint: str, overrides: list[str]) -> dict[str, Any]:
    """One short run; the valid share and the reward of each step."""
    from rl.train import main as train

    with tempfile.TemporaryDirectory(prefix="bad-lr-") as folder:
        config = Path(folder) / "run.yaml"
        config.write_text("{}\n")
        run_dir = Path(folder) / "run"
        code = train(
            [
                str(config),
                "--run-dir",
                str(run_dir),
                f"optim.lr={rate}",
                f"seed={seed}",
                f"model.checkpoint={checkpoint}",
                "optim.warmup_steps=1",
                "budget.steps=5",
                "budget.scripts_per_step=24",
                "checkpoint_every=1000",
                *overrides,
            ]
        )
        rows = read_run(run_dir).rows
    return {
        "lr": rate,
        "seed": seed,
        "exit_code": code,
        "valid": [round(row["rollout/valid_frac"], 3) for row in rows],
        "reward": [round(row["reward/mle/mean"], 3) for row in rows],
        "grad_norm": [round(row["policy/grad_norm"], 3) for row in rows],
        "entropy": [round(row["policy/entropy"], 3) for row in rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write one JSON object a run here")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    jobs = [(rate, seed) for rate in RATES for seed in range(args.seeds)]
    with ProcessPoolExecutor(
        args.workers, mp_context=get_context("spawn"), initializer=quiet_worker
    ) as pool:
        results = list(
            pool.map(
                short_run,
                *zip(*jobs, strict=True),
                [args.checkpoint] * len(jobs),
                [args.overrides] * len(jobs),
            )
        )
    if args.out:
        args.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    falls: dict[float, list[float]] = defaultdict(list)
    for result in results:
        falls[result["lr"]].append(result["valid"][0] - result["valid"][-1])
        print(json.dumps(result))
    bad = [rate for rate in RATES if min(falls[rate]) >= FALL]
    for rate in RATES:
        print(f"lr {rate:g}: falls {' '.join(f'{fall:+.2f}' for fall in falls[rate])}")
    print(f"bad setting: {bad[0]:g}" if bad else "no rate breaks every seed")
    return 0 if bad else 1


if __name__ == "__main__":
    sys.exit(main())
