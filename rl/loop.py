"""The training loop, top to bottom: roll out, judge, update, checkpoint, report.

Everything random derives from (seed, step, group, index), so a resumed run continues exactly: it
samples what the undisturbed run would have sampled, from exactly restored float32 weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from model.checkpoint import load_model
from model.generate import Engine
from model.tokenizer import Tokenizer
from rl.checkpoints import resolve_checkpoint
from rl.collect import Collected, LocalSource, PoolSource, Source
from rl.config import RunConfig, dump_config
from rl.device import pick_device, settle_threads
from rl.errors import (
    ConfigError,
    DivergedError,
    StoppedError,
)
from rl.learner import Learner
from rl.mfu import mfu
from rl.parts import Parts, PartsFactory
from rl.pool import Pool, pool_at
from rl.run_dir import Row, RunDir
from rl.run_end import check_infra, result_of, run_status
from rl.step_checkpoints import StepCheckpoints
from rl.step_metrics import Counts, drift, perf_metrics, rollout_metrics
from rl.trainer import Trainer
from rl.tree_update import backward_packs
from rl.wandb_log import WandbLog

MAX_BATCH = 64


# ------------------------------------------------------------------ one run


def run(
    config: RunConfig,
    path: Path,
    *,
    resume: bool,
    parts: PartsFactory,
    check: Callable[[], None],
    from_pool: str | None = None,
) -> int:
    """Run to the end, or to a signal or an error; the run directory always says which.

    `from_pool`: compute the updates of the run that wrote this pool, without engine or scripts.

    Returns 0. Raises what the command line turns into exit codes (StoppedError, DivergedError, …).
    """
    folder = RunDir(path)
    source = resolve_checkpoint(config.model.checkpoint)
    if from_pool is not None and config.objective == "expert_iteration":
        raise ConfigError("expert iteration keeps scripts, which a pool does not; use a loss")
    pick_device(config.device)  # an unknown one is refused before anything is made
    folder.open(dump_config(config), resume=resume)
    try:
        if folder.result is not None:
            print(folder.done_text(config.budget.steps))
        else:
            _run(config, folder, source, parts, check, from_pool)
    finally:
        folder.close()
    return 0


def _run(
    config: RunConfig,
    folder: RunDir,
    source: Path,
    parts: PartsFactory,
    check: Callable[[], None],
    from_pool: str | None,
) -> None:
    with run_status(folder) as status:
        loop = Loop(config, folder, source, check)
        latest = folder.latest()
        kept = loop.restore(latest) if latest else folder.keep_rows(0, None)
        with WandbLog(config, folder.path, folder.wandb_id(), kept) as wandb:
            _announce(config, loop, source)
            check()
            if from_pool is not None:
                with Pool(from_pool, create=False) as pool:
                    loop.train(PoolSource(pool), wandb)
            else:
                with parts(config) as built, pool_of(config, folder.path) as kept_in:
                    loop.train(loop.local(built, kept_in), wandb)
        folder.drop_trainer_state()
        status.close("done", 0)
        folder.write_result(loop.result())
        print(folder.done_text(config.budget.steps), flush=True)


class Loop:
    """State of a run between steps: weights and moments, totals, kept experts, rows."""

    def __init__(
        self, config: RunConfig, folder: RunDir, source: Path, check: Callable[[], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self.source = source
        self.check = check
        self.tokenizer = Tokenizer.load(source)
        model = load_model(source, device=pick_device(config.device))
        self.threads = settle_threads(model.device, model.config.hidden_size)
        self.engine = Engine(model, max_batch=MAX_BATCH)
        self.trainer = Trainer(model, config.optim, backward_packs, config.optim.pack_tokens)
        self.learner = Learner(config, self.trainer, self.tokenizer.hash)
        self.checkpoints = StepCheckpoints(config, folder, source, self.trainer, self.learner)
        self.counts = Counts()
        self.rows: list[Row] = []
        self.done = 0  # finished steps
        self.saved = 0  # step of the newest checkpoint
        self.last = False  # no step follows the one that is being done

    # ---------------------------------------------------------- steps

    def local(self, parts: Parts, pool: Pool | None) -> LocalSource:
        """Episodes sampled here."""
        return LocalSource(
            self.config, parts.tasks, parts.env, self.engine, self.tokenizer, self.check, pool
        )

    def train(self, source: Source, wandb: WandbLog) -> None:
        """All remaining steps. A signal is honoured between steps and while episodes run."""
        steps = self.config.budget.steps
        try:
            while self.done < steps:
                self.check()
                step = self.done + 1
                row = self._step(step, source, wandb)
                if row is None:
                    print(f"nothing is left for step {step} of {steps}: the run ends", flush=True)
                    break
                self.done = step
                self.rows.append(row)
                if self.last or step % self.config.checkpoint_every == 0:
                    self._save(row)
                self.folder.append_row(row)
                wandb.log(row)
                print(_line(row, steps), flush=True)
                check_infra(self.counts, "sandbox's log")
                if reason := drift(self.rows, self.config.stop):
                    raise DivergedError(reason)
        except StoppedError:
            if self.done > self.saved:
                self._save(self.rows[-1])
            raise

    def _step(self, step: int, source: Source, wandb: WandbLog) -> Row | None:
        config = self.config
        started = time.monotonic()
        got = source.collect(step, self.counts.attempts, self.trainer.version)
        if got is None:
            return None
        row: Row = {"step": step, "t": time.time()}
        row |= rollout_metrics(got.episodes, config.competitions)
        updating = time.monotonic()
        spent = self.counts.attempts + got.attempts
        self.last = step == config.budget.steps or not source.left(step + 1, spent)
        try:
            row |= self.learner.learn(step, got.learnt, self.last)
            self.trainer.check_alive(source.prompts)
        except DivergedError:
            # the failed step's row, with its loss as NaN; no checkpoint goes with it
            row |= self.learner.diverged()
            self.folder.append_row(row)
            wandb.log(row)
            raise
        row |= {"rollout/attempts": float(got.attempts)} | _dropped(got, config)
        seconds, update_s = time.monotonic() - started, time.monotonic() - updating
        self.counts = self.counts.plus(got.episodes, seconds, got.attempts)
        row |= perf_metrics(got.episodes, seconds, got.generate_s, got.wall_s, update_s)
        model = self.trainer.model
        return row | mfu(config, model.config, model.device, got.learnt, update_s)

    # ---------------------------------------------------------- state

    def restore(self, checkpoint: Path) -> list[Row]:
        """Continue from a step checkpoint; returns the rows that stand."""
        info = self.checkpoints.restore(checkpoint)
        self.done = self.saved = int(info["step"])
        self.counts = Counts(**info["counts"])
        self.rows = self.folder.keep_rows(self.done, info["row"])
        print(f"resumed after step {self.done}", flush=True)
        return self.rows

    def _save(self, row: Row) -> None:
        self.checkpoints.save(self.done, row, self.counts, last=self.last)
        self.saved = self.done

    def result(self) -> dict[str, Any]:
        """What `result.json` holds."""
        return result_of(
            self.config,
            self.folder.checkpoints / f"step-{self.done}",
            step=self.done,
            row=self.rows[-1],
            counts=self.counts,
            source=self.checkpoints.source_fingerprint,
            device=str(self.engine.device),
        )


# ------------------------------------------------------------------ small things


def pool_of(config: RunConfig, run_dir: Path) -> AbstractContextManager[Pool | None]:
    """The pool that the run writes to, or nothing."""
    return nullcontext() if config.pool is None else Pool(pool_at(config.pool, run_dir))


def _dropped(got: Collected, config: RunConfig) -> Row:
    """With dynamic sampling, the share of all groups that were dropped."""
    if not config.rollout.dynamic_sampling.refills:
        return {}
    groups = len({e.group for e in got.episodes})
    return {"group/zero_std_frac": got.dropped / groups, "group/dropped": float(got.dropped)}


def _announce(config: RunConfig, loop: Loop, source: Path) -> None:
    print(loop.learner.text)
    print(
        f"{config.budget.steps} steps × {config.budget.scripts_per_step} scripts "
        f"from {source.name} on {loop.engine.device} ({loop.threads} threads), "
        f"seed {config.seed}",
        flush=True,
    )


def _line(row: Row, steps: int) -> str:
    shown = {
        "reward": row.get("reward/mle/mean"),
        "valid": row.get("rollout/valid_frac"),
        "entropy": row.get("policy/entropy"),
        "grad": row.get("policy/grad_norm"),
        "lr": row.get("optim/lr"),
        "s": row.get("perf/step_s"),
    }
    parts = " ".join(f"{key} {value:.3g}" for key, value in shown.items() if value is not None)
    return f"step {row['step']}/{steps} {parts}"
