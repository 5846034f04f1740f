"""The W&B run of a training run: real `wandb`, offline unless configured, finished on SIGTERM."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.config import RunConfig
from rl.errors import exit_code_of
from rl.run_dir import Row


class WandbLog:
    """Logs rows at their own step. A resumed run opens a new file with the same id and logs all
    kept rows again, so that the last file alone is complete."""

    def __init__(
        self, config: RunConfig, run_dir: Path, run_id: str, kept_rows: Sequence[Row]
    ) -> None:
        self._run: Any = None
        if config.wandb.mode == "disabled":
            return
        # a service inherited from a parent process outlives us: after a kill -9 it would still hold
        # this run's id, and the resumed run could not start
        os.environ.pop("WANDB_SERVICE", None)
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=config.wandb.project,
            group=config.wandb.group,
            name=config.wandb.name,
            job_type=config.wandb.job_type,
            id=run_id,
            mode=config.wandb.mode,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
            ),
        )
        for row in kept_rows:
            self.log(row)

    def log(self, row: Mapping[str, Any]) -> None:
        """One row; `step` is W&B's step, `t` is left out."""
        if self._run is not None:
            values = {key: value for key, value in row.items() if key not in ("step", "t")}
            self._run.log(values, step=int(row["step"]))

    def __enter__(self) -> WandbLog:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Finished with the exit code that the command will have."""
        self.finish(0 if error is None else exit_code_of(error))

    def finish(self, exit_code: int) -> None:
        """Flush and close; safe to call twice."""
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None
