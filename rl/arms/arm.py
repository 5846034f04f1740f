"""One arm from start to end: train (resumable), then measure its checkpoints on val."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent_tools.paths import data_dir
from agent_tools.sandbox import Limits, make_pool
from model.checkpoint import load_model
from model.generate import Engine
from model.tokenizer import Tokenizer
from rl.arms.log import VAL_FILE, Val, read_val
from rl.arms.spec import START, Arm, Settings, run_config
from rl.checkpoints import fingerprint, resolve_checkpoint
from rl.config import RunConfig, load_config
from rl.device import pick_device, settle_threads
from rl.envs.mle.env import MleEnv, MleTaskset
from rl.evaluate import append_ledger, plan, score_of
from rl.loop import run
from rl.mle_parts import mle_parts
from rl.parts import Parts, PartsFactory
from rl.rollout import CachingPool, run_local
from rl.run_dir import RunDir
from rl.splits import trainable_ids

EVAL_SEED = 1
"""The same for every arm and step: common random numbers."""


@contextmanager
def val_parts(settings: Settings) -> Iterator[Parts]:
    """The held-out competitions of the suite and their private tests."""
    config = run_config(Arm("cispo", 1, 0), settings)
    taskset = MleTaskset(settings.suite, "val", data_dir())
    with CachingPool(make_pool(config.sandbox.kind, settings.workers)) as pool:
        env = MleEnv(pool, Limits(cpu_seconds=config.env.cpu_seconds))
        yield Parts(tuple(taskset.task(name) for name in taskset.ids()), env)


def run_arm(
    name: str,
    settings: Settings,
    work: Path,
    check: Callable[[], None],
    *,
    train_parts: PartsFactory = mle_parts,
    measure: Callable[[Settings], Any] = val_parts,
) -> None:
    """Do what is left of an arm in `work/NAME`. StoppedError when `check` says so, state saved."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == START:
        points = [(0, resolve_checkpoint(settings.checkpoint), settings.final_samples)]
    else:
        config = run_config(Arm.parse(name), settings)
        ids = trainable_ids(config.suite, config.competitions)
        config = _as_begun(config.model_copy(update={"competitions": ids}), folder / "run")
        run(config, folder / "run", resume=True, parts=train_parts, check=check)
        points = _points(folder, settings)
    todo = [p for p in points if p[0] not in read_val(folder)]
    if todo:
        with measure(settings) as parts:
            _measure(name, todo, settings, parts, folder, check)
    if name != START:
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    (folder / "done").touch()


def _as_begun(config: RunConfig, run_dir: Path) -> RunConfig:
    """With the sandbox and device of an arm that is gone on with: they change nothing but speed,
    and a run directory holds one configuration."""
    path = run_dir / "config.resolved.yaml"
    if not path.is_file():
        return config
    known = load_config(path)
    return config.model_copy(update={"sandbox": known.sandbox, "device": known.device})


def _points(folder: Path, settings: Settings) -> list[tuple[int, Path, int]]:
    result = RunDir(folder / "run").result
    last = int(result["steps"]) if result else 0
    checkpoints = folder / "run" / "checkpoints"
    return [
        (step, checkpoints / f"step-{step}", samples)
        for step in settings.eval_steps(last)
        for samples in [settings.final_samples if step == last else settings.samples]
    ]


def _measure(
    name: str,
    points: list[tuple[int, Path, int]],
    settings: Settings,
    parts: Parts,
    folder: Path,
    check: Callable[[], None],
) -> None:
    model = load_model(points[0][1], device=pick_device(settings.device))
    settle_threads(model.device, model.config.hidden_size)
    engine = Engine(model)
    tokens = run_config(Arm("cispo", 1, 0), settings).rollout.max_new_tokens
    for step, checkpoint, samples in points:
        engine.load(checkpoint, step)
        append_ledger(
            data_dir() / "val_ledger.jsonl",
            {"t": time.time(), "split": "val", "suite": settings.suite, "arm": name, "step": step,
             "fingerprint": fingerprint(checkpoint), "samples": samples},
        )  # fmt: skip
        attempts = plan(
            parts.tasks, samples=samples, temperature=1.0, max_tokens=tokens, seed=EVAL_SEED
        )
        tokenizer = Tokenizer.load(checkpoint)
        rollout = run_local(attempts, parts.env, engine, tokenizer, check)
        val: Val = {}
        for score in map(score_of, rollout.episodes):
            if score.status != "infra":
                val.setdefault(score.competition, []).append(round(score.percentile, 1))
        with (folder / VAL_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, "val": val}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
