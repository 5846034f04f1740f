"""`python -m rl.forge.trainer RUN_DIR`: the trainer process, started by the supervisor.

It goes on from the newest whole checkpoint. A step reads its calls and rewards from the pool,
updates, and writes a checkpoint that holds weights, moments, the window's frontier and the row;
only then it is said to be done. Killed before that, the same step comes again, over the same
records; killed after it, the next start tells that it is done.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import load_model, save_checkpoint
from model.errors import ModelError
from model.tokenizer import Tokenizer
from rl.checkpoints import resolve_checkpoint
from rl.config import RunConfig, load_config
from rl.device import pick_device, settle_threads
from rl.engine_http import HttpEngine
from rl.errors import (
    CheckpointStateError,
    ConfigError,
    DivergedError,
    InfraError,
    UserError,
)
from rl.forge.engine_match import engine_match
from rl.forge.messages import Message, Push, Pushed, Ready, Step, Stepped, plain
from rl.forge.pipe import Pipe
from rl.forge.places import Places, group_line
from rl.forge.records import TaskNames, episode_of, group_records
from rl.forge.replay import ReplayedPacks
from rl.learner import Learner
from rl.mfu import mfu
from rl.pool import Pool, StepRecord
from rl.run_dir import RunDir
from rl.run_end import check_infra
from rl.step_checkpoints import StepCheckpoints
from rl.step_metrics import Counts, perf_metrics, rollout_metrics
from rl.trainer import Trainer
from rl.types import CallRecord
from rl.weight_sync import WeightPush

Row = dict[str, Any]


class TrainerProcess:
    """Weights, moments and totals between two steps."""

    def __init__(self, config: RunConfig, places: Places) -> None:
        self.config, self.places = config, places
        self.folder = RunDir(places.run)
        self.source = resolve_checkpoint(config.model.checkpoint)
        self.tokenizer = Tokenizer.load(self.source)
        model = load_model(self.source, device=pick_device(config.device))
        settle_threads(model.device, model.config.hidden_size)
        self._replay = ReplayedPacks(model.config)
        self.trainer = Trainer(model, config.optim, self._replay, config.optim.pack_tokens)
        self.learner = Learner(config, self.trainer, self.tokenizer.hash)
        self.checkpoints = StepCheckpoints(
            config, self.folder, self.source, self.trainer, self.learner
        )
        self.counts = Counts()
        self.done, self.last = 0, False
        self.row: Row | None = None
        self.weights = self.source
        self.pool = Pool(places.pool_of(config), create=False)
        self._push: tuple[tuple[str, int], WeightPush] | None = None
        latest = self.folder.latest()
        if latest is not None:
            self._restore(latest)

    def _restore(self, checkpoint: Path) -> None:
        info = self.checkpoints.restore(checkpoint)
        self.last = bool(info["last"])
        self.done, self.row = int(info["step"]), info["row"]
        self.counts = Counts(**info["counts"])
        self.weights = checkpoint
        if self._exact and not self.last:
            self.weights = self._weights(self.done)

    @property
    def _exact(self) -> bool:
        """The model computes in float32 and checkpoints are bfloat16: the engine gets its own
        folder, so that it has what the trainer has."""
        return self.trainer.model.dtype == torch.float32

    def ready(self) -> Ready:
        """Where the checkpoint stands."""
        return Ready(
            step=self.done,
            version=self.trainer.version,
            weights=str(self.weights),
            row=None if self.row is None else plain(self.row),
            device=str(self.trainer.model.device),
        )

    # ---------------------------------------------------------- a step

    def step(self, message: Step) -> Stepped:
        """Train on the groups, save, and tell. With a DivergedError, `row` is the failed step's."""
        if message.step != self.done + 1:
            raise CheckpointStateError(
                f"step {message.step} was asked for after step {self.done}; resume the run"
            )
        config, started = self.config, time.monotonic()
        tasks = TaskNames(message.tasks, message.domains)
        trained = [episode_of(self.pool, name, tasks) for g in message.groups for name in g]
        dropped = [episode_of(self.pool, name, tasks) for g in message.dropped for name in g]
        everything = trained + dropped
        self.pool.add_step(StepRecord(message.step, group_records(message.groups, tasks)))
        row: Row = {"step": message.step, "t": time.time()}
        row |= rollout_metrics(everything, message.tasks)
        row |= engine_match(
            self.trainer,
            [call for e in trained for call in e.calls],
            config.rollout.temperature,
            config.forge.probe_calls,
        )
        self.row = plain(row | self.learner.diverged())
        row["routing/recorded_frac"] = self._replay.remember(
            call for e in trained for call in e.calls
        )
        updating = time.monotonic()
        row |= self.learner.learn(message.step, trained, message.last)
        self.trainer.check_alive(
            list({e.task: e.calls[0].prompt_ids for e in trained if e.calls}.values())
        )
        model, now = self.trainer.model, time.monotonic()
        row |= mfu(config, model.config, model.device, trained, now - updating)
        update_s = now - started
        wait_s, sync_s = message.metrics["perf/wait_batch_s"], message.metrics["perf/sync_s"]
        seconds = wait_s + update_s + sync_s
        self.counts = self.counts.plus(everything, seconds, len(everything))
        generate_s = call_seconds([call for e in everything for call in e.calls])
        row |= perf_metrics(everything, seconds, generate_s, wait_s, update_s, sync_s)
        row["perf/execute_s"] = sum(e.reward.t_tool for e in everything)
        if self.trainer.model.device.type == "cuda":
            row["perf/trainer_gpu_gb"] = torch.cuda.max_memory_reserved() / 1e9
        row |= message.metrics | {"group/dropped": float(len(message.dropped))}
        self.row, self.done, self.last = plain(row), message.step, message.last
        saved = self.last or message.step % config.checkpoint_every == 0
        if saved:
            self.weights = self._save(message, self.row)
        if not self.last and (self._exact or not saved):
            self.weights = self._weights(message.step)
        check_infra(self.counts, "workers' logs")
        return Stepped(message.step, self.trainer.version, str(self.weights), self.row, saved)

    # ---------------------------------------------------------- durable

    def _save(self, message: Step, row: Row) -> Path:
        more = {
            "device": str(self.trainer.model.device),
            "forge": {
                "frontier": message.frontier,
                "groups": group_line(message, self.trainer.version),
            },
        }
        return self.checkpoints.save(self.done, row, self.counts, last=self.last, more=more)

    def _weights(self, step: int) -> Path:
        """Weights alone, for the engine, in the type that the model computes in. All but those of
        the step before, from which an engine may be starting, are removed."""
        folder = self.places.weights(step)
        dtype = str(self.trainer.model.dtype).removeprefix("torch.")
        try:
            save_checkpoint(self.trainer.model, folder, dtype=dtype, tokenizer_from=self.source)
        except OSError as error:
            raise InfraError(f"cannot write {folder}: {error}; free some space") from error
        for old in self.places.forge.glob("weights-*"):
            if old not in (folder, self.places.weights(step - 1)):
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def push(self, message: Push) -> Pushed:
        """Weights into the engine through the card's memory; an engine that went away is news for
        the supervisor, no error of ours."""
        key = (message.url, message.engine)
        try:
            if self._push is None or self._push[0] != key:
                engine = HttpEngine(message.url, timeout_s=self.config.forge.sync_timeout_s)
                self._push = (key, WeightPush(engine, "ipc", pause="keep"))
            self._push[1].push(self.trainer.model, message.version)
        except InfraError as error:
            self._push = None
            return Pushed(message.version, str(error))
        return Pushed(message.version)


def call_seconds(calls: Sequence[CallRecord]) -> float:
    """Seconds during which at least one of the calls ran."""
    total, until = 0.0, 0.0
    for start, end in sorted((c.t_start, c.t_end) for c in calls):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main(argv: Sequence[str]) -> int:
    """Runs until its standard input ends, or with the code of an error."""
    pipe = Pipe()
    places = Places(Path(argv[0]))
    process: TrainerProcess | None = None
    try:
        config = load_config(places.config)
        process = TrainerProcess(config, places)
        pipe.send(process.ready())
        for message in pipe:
            pipe.send(_answer(process, message))
    except DivergedError as error:
        return pipe.fail(error, process.row if process else None)
    except (UserError, InfraError, ModelError, ConfigError, OSError) as error:
        return pipe.fail(error)
    return 0


def _answer(process: TrainerProcess, message: Message) -> Message:
    if isinstance(message, Step):
        return process.step(message)
    if isinstance(message, Push):
        return process.push(message)
    raise ConfigError(f"the trainer got {type(message).__name__}, which is not for it")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
