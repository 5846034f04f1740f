"""What a step checkpoint holds besides tensors, written and read by both training loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rl.checkpoints import fingerprint
from rl.config import RunConfig
from rl.errors import CheckpointStateError
from rl.learner import Learner
from rl.run_dir import Row, RunDir
from rl.step_metrics import Counts
from rl.trainer import Trainer, read_info


class StepCheckpoints:
    """The step checkpoints of one run, which started from the checkpoint in `source`."""

    def __init__(
        self, config: RunConfig, folder: RunDir, source: Path, trainer: Trainer, learner: Learner
    ) -> None:
        self._config, self._folder, self._source = config, folder, source
        self._trainer, self._learner = trainer, learner
        self.source_fingerprint = fingerprint(source)

    def save(
        self,
        step: int,
        row: Row,
        counts: Counts,
        *,
        last: bool,
        more: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `step-N` and point `latest` to it. `last`: no step follows, so it can be served or
        started from, never resumed. `more` goes into `trainer.json`."""
        info: dict[str, Any] = {
            "step": step,
            "last": last,
            "seed": self._config.seed,
            "source": self.source_fingerprint,
            "counts": asdict(counts),
            "experts": self._learner.experts.state(),
            "row": row,
            **(more or {}),
        }

        def write(folder: Path) -> None:
            self._trainer.save(
                folder,
                info,
                tokenizer_from=self._source,
                with_state=not last,
                metadata={"step": step, "objective": self._config.objective},
            )

        return self._folder.save_checkpoint(step, write, self._config.keep_checkpoints)

    def restore(self, checkpoint: Path) -> dict[str, Any]:
        """Weights, moments and kept experts of a step; returns its `trainer.json`.

        CheckpointStateError where the run started from another checkpoint.
        """
        info = read_info(checkpoint)
        if info["source"] != self.source_fingerprint:
            raise CheckpointStateError(
                f"{self._source} is not the checkpoint that this run started from; put it back"
            )
        if info.get("last", info["step"] == self._config.budget.steps):
            self._trainer.version = int(info["version"])
        else:
            self._trainer.load(checkpoint)
        self._learner.experts.restore(info["experts"])
        return info
