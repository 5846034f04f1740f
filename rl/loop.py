"""The training loop, top to bottom: roll out, judge, update, checkpoint, report.

Everything random derives from (seed, step, group, index), so a resumed run continues exactly: it
samples what the undisturbed run would have sampled, from exactly restored float32 weights.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from model.chat_format import render_ids
from model.checkpoint import load_model
from model.generate import Engine
from model.tokenizer import Tokenizer
from rl import cispo
from rl.advantages import group_advantages
from rl.checkpoints import fingerprint, resolve_checkpoint
from rl.config import RunConfig, dump_config
from rl.device import pick_device, settle_threads
from rl.errors import (
    CheckpointStateError,
    ConfigError,
    DivergedError,
    InfraLimitError,
    StoppedError,
    exit_code_of,
)
from rl.expert_iteration import ExpertPool, round_ends
from rl.rollout import Rollout, plan_step, run_local
from rl.run_dir import Row, RunDir, Status
from rl.step_metrics import (
    Counts,
    drift,
    returns_by_group,
    rollout_metrics,
    sampled_entropy,
    usable,
)
from rl.trainer import Sample, Trainer, read_info
from rl.types import Env, Episode, Task
from rl.wandb_log import WandbLog

MAX_INFRA_SHARE = 0.10
MAX_BATCH = 64


@dataclass(frozen=True)
class Parts:
    """What the loop trains against."""

    tasks: tuple[Task, ...]
    env: Env


PartsFactory = Callable[[RunConfig], AbstractContextManager[Parts]]


# ------------------------------------------------------------------ one run


def run(
    config: RunConfig,
    path: Path,
    *,
    resume: bool,
    parts: PartsFactory,
    check: Callable[[], None],
) -> int:
    """Run to the end, or to a signal or an error; the run directory always says which.

    Returns 0. Raises what the command line turns into exit codes (StoppedError, DivergedError, …).
    """
    folder = RunDir(path)
    source = resolve_checkpoint(config.model.checkpoint)
    pick_device(config.device)  # an unknown one is refused before anything is made
    folder.open(dump_config(config), resume=resume)
    try:
        if folder.result is not None:
            print(f"{path} is done: {folder.result['steps']} steps, {folder.result['checkpoint']}")
        else:
            _run(config, folder, source, parts, check)
    finally:
        folder.close()
    return 0


def _run(
    config: RunConfig, folder: RunDir, source: Path, parts: PartsFactory, check: Callable[[], None]
) -> None:
    status = Status(folder.path / "status.json")
    wandb: WandbLog | None = None
    try:
        loop = Loop(config, folder, source, check)
        latest = folder.latest()
        kept = loop.restore(latest) if latest else folder.keep_rows(0, None)
        wandb = WandbLog(config, folder.path, _wandb_id(folder), kept)
        _announce(config, loop, source)
        check()
        with parts(config) as built:
            loop.train(built, wandb)
        wandb.finish(0)
        folder.drop_trainer_state()
        status.close("done", 0)
        folder.write_result(loop.result())
    except StoppedError as error:
        _finish(wandb, error.exit_code)
        status.close("cancelled", error.exit_code, signal=error.signal_name, reason=str(error))
        raise
    except BaseException as error:
        code = exit_code_of(error)
        _finish(wandb, code)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        status.close("failed", code, reason=reason)
        raise


def _finish(wandb: WandbLog | None, exit_code: int) -> None:
    if wandb is not None:
        wandb.finish(exit_code)


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
        self.trainer = Trainer(model, config.optim)
        self.experts = ExpertPool(config.expert_iteration.keep_per_competition)
        self.counts = Counts()
        self.rows: list[Row] = []
        self.done = 0  # finished steps
        self.saved = 0  # step of the newest checkpoint

    # ---------------------------------------------------------- steps

    def train(self, parts: Parts, wandb: WandbLog) -> None:
        """All remaining steps. A signal is honoured between steps and while episodes run."""
        steps = self.config.budget.steps
        try:
            while self.done < steps:
                self.check()
                step = self.done + 1
                row = self._step(step, parts, wandb)
                self.done = step
                self.rows.append(row)
                last = step == steps
                if last or step % self.config.checkpoint_every == 0:
                    self._save(row)
                self.folder.append_row(row)
                wandb.log(row)
                print(_line(row, steps), flush=True)
                if self.counts.infra_share > MAX_INFRA_SHARE:
                    raise InfraLimitError(
                        f"{self.counts.infra} of {self.counts.scripts} scripts failed for reasons "
                        "that are not theirs; see the sandbox's log and try again"
                    )
                if reason := drift(self.rows, self.config.stop):
                    raise DivergedError(reason)
        except StoppedError:
            if self.done > self.saved:
                self._save(self.rows[-1])
            raise

    def _step(self, step: int, parts: Parts, wandb: WandbLog) -> Row:
        config = self.config
        started = time.monotonic()
        attempts = plan_step(
            parts.tasks,
            seed=config.seed,
            step=step,
            groups=config.groups_per_step,
            group_size=config.rollout.group_size,
            temperature=config.rollout.temperature,
            max_tokens=config.rollout.max_new_tokens,
        )
        self.engine.version = self.trainer.version
        rollout = run_local(attempts, parts.env, self.engine, self.tokenizer, self.check)
        row: Row = {"step": step, "t": time.time()}
        row |= rollout_metrics(rollout.episodes, config.competitions)
        updating = time.monotonic()
        try:
            row |= self._update(step, rollout)
            self.trainer.check_alive(
                [render_ids(task.prompt, None, self.tokenizer) for task in parts.tasks]
            )
        except DivergedError:
            # the failed step's row, with its loss as NaN; no checkpoint goes with it
            row |= {"loss/cispo/loss": math.nan, "policy/grad_norm": math.nan}
            self.folder.append_row(row)
            wandb.log(row)
            raise
        seconds = time.monotonic() - started
        self.counts = self.counts.plus(rollout.episodes, seconds)
        tokens = sum(len(c.response_ids) for e in rollout.episodes for c in e.calls)
        row |= {
            "perf/tokens_per_s": tokens / seconds,
            "perf/step_s": seconds,
            "perf/generate_s": rollout.generate_s,
            "perf/execute_s": rollout.execute_s,
            "perf/update_s": time.monotonic() - updating,
        }
        return row

    def _update(self, step: int, rollout: Rollout) -> Row:
        judged = usable(rollout.episodes)
        advantages = group_advantages(returns_by_group(judged), [e.group for e in judged])
        common: Row = {"group/zero_std_frac": advantages.zero_std_frac}
        if self.config.objective == "expert_iteration":
            return common | self._imitate(step, judged)
        samples = [
            Sample(call.prompt_ids, call.response_ids, call.logprobs, float(advantage))
            for episode, advantage in zip(judged, advantages.values, strict=True)
            for call in episode.calls
            if call.response_ids
        ]
        _refuse_constrained(judged)
        lr = self.trainer.warmup(step, self.config.optim.lr)
        stats = self.trainer.cispo_update(
            samples,
            lr=lr,
            is_weight_max=self.config.cispo.is_weight_max,
            temperature=self.config.rollout.temperature,
        )
        return common | {
            "loss/cispo/loss": stats.loss,
            "loss/cispo/weight_mean": stats.weight_mean,
            "loss/cispo/weight_max": stats.weight_max,
            "loss/cispo/capped_frac": stats.capped_frac,
            "mismatch_kl/mean": stats.kl_mean,
            "mismatch_kl/max": stats.kl_max,
            "policy/entropy": stats.entropy,
            "policy/grad_norm": stats.grad_norm,
            "rollout/nonfinite_logprobs": float(stats.nonfinite),
            "optim/lr": lr,
        }

    def _imitate(self, step: int, judged: Sequence[Episode]) -> Row:
        settings = self.config.expert_iteration
        _refuse_constrained(judged)
        for episode in judged:
            if len(episode.calls) == len(episode.scripts) == 1:
                call, script = episode.calls[0], episode.scripts[0]
                self.experts.add(
                    episode.task,
                    script.script,
                    episode.reward.outcome,
                    call.prompt_ids,
                    call.response_ids,
                )
        row: Row = {"policy/entropy": sampled_entropy(judged)}
        lr = self.trainer.warmup(step, settings.lr)
        if not round_ends(step, self.config.budget.steps, settings.round_steps):
            return row | {"optim/lr": 0.0}
        drawn = self.experts.draw(
            seed=self.config.seed, step=step, updates=settings.updates, batch=settings.batch
        )
        if not drawn:
            return row | {"optim/lr": 0.0}
        batches = [
            [Sample(expert.prompt_ids, expert.response_ids, ()) for expert in batch]
            for batch in drawn
        ]
        loss, norm = self.trainer.imitate(batches, lr=lr)
        return row | {"loss/imitation": loss, "policy/grad_norm": norm, "optim/lr": lr}

    # ---------------------------------------------------------- state

    def restore(self, checkpoint: Path) -> list[Row]:
        """Continue from a step checkpoint; returns the rows that stand."""
        info = read_info(checkpoint)
        if info["source"] != fingerprint(self.source):
            raise CheckpointStateError(
                f"{self.source} is not the checkpoint that this run started from; put it back"
            )
        if info["step"] < self.config.budget.steps:
            self.trainer.load(checkpoint)
        self.done = self.saved = int(info["step"])
        self.counts = Counts(**info["counts"])
        self.experts.restore(info["experts"])
        self.rows = self.folder.keep_rows(self.done, info["row"])
        print(f"resumed after step {self.done}", flush=True)
        return self.rows

    def _save(self, row: Row) -> None:
        info = {
            "step": self.done,
            "seed": self.config.seed,
            "source": fingerprint(self.source),
            "counts": asdict(self.counts),
            "experts": self.experts.state(),
            "row": row,
        }
        metadata = {"step": self.done, "objective": self.config.objective}

        def write(folder: Path) -> None:
            self.trainer.save(
                folder,
                info,
                tokenizer_from=self.source,
                # the last checkpoint is served or started from, never resumed
                with_state=self.done < self.config.budget.steps,
                metadata=metadata,
            )

        self.folder.save_checkpoint(self.done, write, self.config.keep_checkpoints)
        self.saved = self.done

    def result(self) -> dict[str, Any]:
        """What `result.json` holds."""
        final = self.folder.checkpoints / f"step-{self.done}"
        return {
            "steps": self.done,
            "checkpoint": str(final.relative_to(self.folder.path)),
            "fingerprint": fingerprint(final),
            "source": str(self.config.model.checkpoint),
            "source_fingerprint": fingerprint(self.source),
            "objective": self.config.objective,
            "seed": self.config.seed,
            "metrics": {k: v for k, v in self.rows[-1].items() if k not in ("step", "t")},
            "tokens": self.counts.tokens,
            "scripts": self.counts.scripts,
            "infra_errors": self.counts.infra,
            "cpu_seconds": round(self.counts.cpu_s, 3),
            "seconds": round(self.counts.seconds, 3),
            "device": str(self.engine.device),
            "versions": {
                name: package_version(name) for name in ("torch", "wandb", "scikit-learn")
            },
        }


# ------------------------------------------------------------------ small things


def _refuse_constrained(episodes: Sequence[Episode]) -> None:
    if any(call.constrained for episode in episodes for call in episode.calls):
        raise ConfigError(
            "a grammar-constrained reply is not training data: its log-probs are not the policy's; "
            "sample without tools"
        )


def _wandb_id(folder: RunDir) -> str:
    """The run's W&B id: drawn once, kept in the directory, the same after every resume."""
    path = folder.path / "wandb_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _announce(config: RunConfig, loop: Loop, source: Path) -> None:
    if config.objective == "cispo":
        print(cispo.describe(config.cispo.is_weight_max))
    else:
        print(f"expert iteration: {json.dumps(config.expert_iteration.model_dump())}")
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
