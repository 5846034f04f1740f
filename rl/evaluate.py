"""Measure a policy on competitions: `python -m rl.evaluate --checkpoint DIR --split val --out DIR`.

Every competition gets the same number of samples. Splits: `dev` (dev rows of the train
competitions), `train` (their private tests), `val` (held-out competitions; every use is appended to
a ledger). Infrastructure errors are left out of all means and counted.

Writes `OUT/scores.jsonl` (a row a sample) and `OUT/result.json` (last). With `--base-url` any
OpenAI-compatible endpoint is measured, and torch is not imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from agent_tools.mle_bench.evaluator import evaluator_hash
from agent_tools.mle_bench.registry import load_suite
from agent_tools.paths import data_dir
from agent_tools.sandbox import POOL_KINDS, Limits, make_pool
from model.tokenizer import Tokenizer
from rl.checkpoints import fingerprint, resolve_checkpoint
from rl.cli import main_guard, plain_parser
from rl.engine import OpenAIClient, derive_seed
from rl.envs.mle.env import MleEnv, MleTaskset
from rl.envs.mle.prompts import load_scaffold
from rl.errors import ConfigError
from rl.rollout import CachingPool, Rollout, run_local, run_remote
from rl.run_dir import encode_row, pretty, write_atomic
from rl.train import StopSignals
from rl.types import Episode, Sampling, Task

Runner = Callable[[Sequence[Task]], Rollout]


@dataclass(frozen=True)
class Score:
    """One sample's final script, judged. `status` `infra` means: not the policy's fault."""

    competition: str
    index: int
    valid: bool
    score: float | None
    percentile: float
    any_medal: bool
    gold: bool
    silver: bool
    bronze: bool
    above_median: bool
    status: str
    cpu_s: float
    wall_s: float
    tokens: int
    truncated: bool
    message: str
    script_sha256: str


def plan(
    tasks: Sequence[Task], *, samples: int, temperature: float, max_tokens: int, seed: int
) -> list[Task]:
    """`samples` attempts a task; seeds depend on (seed, competition, index) only."""
    return [
        replace(
            task,
            episode=f"{task.id}-{i}",
            group=g,
            index=i,
            sampling=Sampling(temperature, max_tokens, derive_seed(seed, "eval", task.id, i)),
        )
        for g, task in enumerate(tasks)
        for i in range(samples)
    ]


def score_of(episode: Episode) -> Score:
    """The row of one episode: its last script."""
    final = episode.scripts[-1]
    infra = episode.reward.status not in ("done", "timeout")
    return Score(
        competition=episode.task,
        index=episode.index,
        valid=final.valid,
        score=final.score,
        percentile=final.percentile,
        any_medal=final.any_medal,
        gold=final.gold,
        silver=final.silver,
        bronze=final.bronze,
        above_median=final.above_median,
        status="infra" if infra else final.status,
        cpu_s=round(final.cpu_s, 4),
        wall_s=round(final.wall_s, 4),
        tokens=sum(len(call.response_ids) for call in episode.calls),
        truncated=episode.calls[-1].finish_reason == "length",
        message=final.message,
        script_sha256=hashlib.sha256(final.script.encode("utf-8", "surrogatepass")).hexdigest(),
    )


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Means a competition, and over competitions (each counts once, whatever its samples).

    A competition whose samples were all lost to infrastructure errors has mean None and is left out
    of the overall mean.
    """
    names = list(dict.fromkeys(s.competition for s in scores))
    table = {name: _summary([s for s in scores if s.competition == name]) for name in names}
    judged = [s for s in scores if s.status != "infra"]
    means = [row["mean_percentile"] for row in table.values() if row["samples"]]
    infra = len(scores) - len(judged)
    return {
        "mean_percentile": _mean(means),
        "valid_share": _mean([row["valid_share"] for row in table.values() if row["samples"]]),
        "any_medal_share": _mean(
            [row["any_medal_share"] for row in table.values() if row["samples"]]
        ),
        "medals": _medals(judged),
        "infra_errors": infra,
        "infra_share": infra / len(scores) if scores else 0.0,
        "competitions": table,
        "tokens": sum(s.tokens for s in scores),
        "cpu_seconds": round(sum(s.cpu_s for s in scores), 3),
    }


def _summary(scores: Sequence[Score]) -> dict[str, Any]:
    judged = [s for s in scores if s.status != "infra"]
    return {
        "samples": len(judged),
        "infra_errors": len(scores) - len(judged),
        "mean_percentile": _mean([s.percentile for s in judged]),
        "valid_share": _mean([float(s.valid) for s in judged]),
        "any_medal_share": _mean([float(s.any_medal) for s in judged]),
        "timeout_share": _mean([float(s.status == "timeout") for s in judged]),
        "truncated_share": _mean([float(s.truncated) for s in judged]),
        "medals": _medals(judged),
    }


def _medals(scores: Sequence[Score]) -> dict[str, int]:
    return {kind: sum(getattr(s, kind) for s in scores) for kind in ("gold", "silver", "bronze")}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def evaluate(attempts: Sequence[Task], runner: Runner, out: Path) -> dict[str, Any]:
    """Run the attempts, write `scores.jsonl`, return the summary."""
    rollout = runner(attempts)
    scores = [score_of(episode) for episode in rollout.episodes]
    text = "".join(encode_row(score.__dict__) + "\n" for score in scores)
    write_atomic(out / "scores.jsonl", text)
    return summarise(scores) | {
        "seconds": round(rollout.wall_s, 3),
        "generate_seconds": round(rollout.generate_s, 3),
    }


def append_ledger(path: Path, entry: dict[str, Any]) -> None:
    """One durable line: looking at held-out scores is always recorded, before they are seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry, sort_keys=True) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# ------------------------------------------------------------------ command


def _parser() -> argparse.ArgumentParser:
    parser = plain_parser("rl.evaluate", "measure a policy on competitions")
    parser.add_argument("--checkpoint", help="folder, or nano (the bundled model)")
    parser.add_argument("--base-url", help="measure this OpenAI-compatible endpoint instead")
    parser.add_argument("--model", default="nano", help="model name at --base-url")
    parser.add_argument("--split", required=True, choices=("val", "train", "dev"))
    parser.add_argument("--suite", default="offline-small-v0")
    parser.add_argument("--competitions", nargs="+", help="a part of the split")
    parser.add_argument("--samples", type=int, default=8, help="a competition")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, help="scripts an episode (default: the scaffold's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu-seconds", type=float, default=3.0, help="limit a script")
    parser.add_argument("--sandbox", default="bubblewrap", choices=POOL_KINDS)
    parser.add_argument("--require-full-isolation", action="store_true", help="else refuse")
    parser.add_argument("--workers", type=int, default=2, help="scripts at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scaffold", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ledger", type=Path, help="where uses of val are written down")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _check(args: argparse.Namespace) -> None:
    if bool(args.checkpoint) == bool(args.base_url):
        raise ConfigError("give either --checkpoint DIR or --base-url URL")
    if args.samples < 1 or args.workers < 1 or args.max_new_tokens < 1:
        raise ConfigError("--samples, --workers and --max-new-tokens must be 1 or more")
    if args.temperature < 0:
        raise ConfigError("--temperature must be 0 or more")
    if (args.out / "result.json").exists():
        raise ConfigError(f"{args.out} already holds a result; name another folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, write; returns the exit code."""
    args = _parser().parse_args(argv)
    _check(args)
    scaffold = load_scaffold(args.scaffold)
    # the scaffold's own sampling rules win: they are part of what is measured
    temperature = args.temperature if scaffold.temperature is None else scaffold.temperature
    taskset = MleTaskset(
        args.suite, args.split, data_dir(), scaffold=scaffold, turns=args.turns or scaffold.turns
    )
    tasks = [taskset.task(name) for name in args.competitions or taskset.ids()]
    attempts = plan(
        tasks,
        samples=args.samples,
        temperature=temperature,
        max_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    about = {
        "split": args.split,
        "suite": args.suite,
        "suite_version": load_suite(args.suite).version,
        "evaluator": evaluator_hash(load_suite(args.suite)),
        "samples": args.samples,
        "temperature": temperature,
        "turns": tasks[0].turns,
        "max_new_tokens": args.max_new_tokens,
        "cpu_seconds_per_script": args.cpu_seconds,
        "sandbox": args.sandbox,
        "seed": args.seed,
        **_subject(args),
    }
    signals = StopSignals()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        full = args.require_full_isolation
        made = make_pool(args.sandbox, args.workers, require_full_isolation=full)
        with CachingPool(made) as pool:
            for missing in pool.missing:
                print(f"sandbox: {missing}", file=sys.stderr, flush=True)
            env = MleEnv(pool, Limits(cpu_seconds=args.cpu_seconds), scaffold=scaffold)
            runner = _runner(args, env, signals.check)
            if args.split == "val":
                ledger = args.ledger or data_dir() / "val_ledger.jsonl"
                names = [task.id for task in tasks]
                append_ledger(ledger, {"t": time.time(), **about, "competitions": names})
            result = about | evaluate(attempts, runner, args.out)
    finally:
        signals.restore()
    result["versions"] = {
        name: package_version(name) for name in ("torch", "scikit-learn", "pandas")
    }
    write_atomic(args.out / "result.json", pretty(result))
    sys.stdout.write(json.dumps(result) + "\n" if args.json else _table(result))
    return 0


def _subject(args: argparse.Namespace) -> dict[str, Any]:
    if args.base_url:
        return {"checkpoint": None, "base_url": args.base_url, "model": args.model}
    folder = resolve_checkpoint(args.checkpoint)
    return {"checkpoint": str(args.checkpoint), "fingerprint": fingerprint(folder)}


def _runner(args: argparse.Namespace, env: MleEnv, check: Callable[[], None]) -> Runner:
    if args.base_url:
        client = OpenAIClient(
            args.base_url, args.model, api_key=os.environ.get("OPENAI_API_KEY", "none")
        )
        return lambda attempts: run_remote(attempts, env, client)
    from model.checkpoint import load_model
    from model.generate import Engine
    from rl.device import pick_device, settle_threads

    folder = resolve_checkpoint(args.checkpoint)
    tokenizer = Tokenizer.load(folder)
    policy = load_model(folder, device=pick_device(args.device))
    settle_threads(policy.device, policy.config.hidden_size)
    engine = Engine(policy)
    return lambda attempts: run_local(attempts, env, engine, tokenizer, check)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'competition':24} samples valid percentile medals (gold silver bronze)"]
    for name, row in result["competitions"].items():
        medals = " ".join(str(row["medals"][kind]) for kind in ("gold", "silver", "bronze"))
        lines.append(
            f"{name:24} {row['samples']:7} {_cell(row['valid_share'])} "
            f"{_cell(row['mean_percentile'])} {medals}"
        )
    lines.append(
        f"mean percentile {_cell(result['mean_percentile'])} · valid "
        f"{_cell(result['valid_share'])} · infrastructure errors {result['infra_errors']} · "
        f"{result['seconds']} s"
    )
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main_guard(main)
