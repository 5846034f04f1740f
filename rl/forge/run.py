"""One asynchronous run from beginning to end: the same run directory as a synchronous one.

The figures of a row differ from the synchronous loop's where there is no common meaning:
`perf/generate_s` is the time during which any of the step's calls ran, `perf/execute_s` the sum of
the episodes' tool time (both overlap with the training of steps before), `perf/step_s` the time
from one step to the next. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rl.checkpoints import fingerprint, resolve_checkpoint
from rl.config import RunConfig, dump_config
from rl.errors import DivergedError
from rl.forge.places import Places, read_note
from rl.forge.resume import Start, find_start
from rl.forge.supervisor import Supervisor
from rl.objective_text import objective_text
from rl.plan import async_text
from rl.run_dir import Row, RunDir
from rl.run_end import result_of, run_status
from rl.step_metrics import Counts, drift
from rl.wandb_log import WandbLog


def run(config: RunConfig, path: Path, *, resume: bool, check: Callable[[], None]) -> int:
    """Run to the end, or to a signal or an error; the run directory always says which.

    Returns 0. Raises what the command line turns into exit codes.
    """
    folder = RunDir(path)
    source = resolve_checkpoint(config.model.checkpoint)
    folder.open(dump_config(config), resume=resume)
    try:
        if folder.result is not None:
            print(folder.done_text(config.budget.steps))
        else:
            _run(config, folder, source, check)
    finally:
        folder.close()
    return 0


def _run(config: RunConfig, folder: RunDir, source: Path, check: Callable[[], None]) -> None:
    with run_status(folder) as status:
        check()
        start = find_start(folder, source, fingerprint(source))
        with WandbLog(config, folder.path, folder.wandb_id(), start.rows) as wandb:
            _announce(config, start, source)
            device = start.note.get("device", "")
            rows = _Rows(config, folder, start.rows, wandb)
            if not start.note.get("last", False):
                supervisor = Supervisor(
                    config,
                    folder,
                    source,
                    start,
                    on_row=lambda row: rows.add(row, supervisor.crew.tasks.domains),
                    check=check,
                )
                supervisor.run()
                device = supervisor.device
            folder.drop_trainer_state()
            for weights in Places(folder.path).forge.glob("weights-*"):
                shutil.rmtree(weights)
        status.close("done", 0)
        folder.write_result(_result(config, folder, device))
        print(folder.done_text(config.budget.steps), flush=True)


class _Rows:
    """Every new row: to the side-car, to W&B, to the screen, and before the stop rule."""

    def __init__(self, config: RunConfig, folder: RunDir, kept: list[Row], wandb: WandbLog) -> None:
        self._config, self._folder, self._rows, self._wandb = config, folder, list(kept), wandb

    def add(self, row: Row, domains: Sequence[str]) -> None:
        """`domains` are those of the tasks. DivergedError where the stop rule says so."""
        self._rows.append(row)
        self._folder.append_row(row)
        self._wandb.log(row)
        print(_line(row, self._config.budget.steps, domains), flush=True)
        if reason := drift(self._rows, self._config.stop):
            raise DivergedError(reason)


def _result(config: RunConfig, folder: RunDir, device: str) -> dict[str, Any]:
    final = (folder.checkpoints / "latest").resolve()
    note = read_note(final)
    return result_of(
        config,
        final,
        step=note["step"],
        row=note["row"],
        counts=Counts(**note["counts"]),
        source=note["source"],
        device=device or note["device"],
    )


def _announce(config: RunConfig, start: Start, source: Path) -> None:
    print(objective_text(config))
    print(async_text(config))
    if start.step:
        print(f"resumed after step {start.step}")
    print(
        f"{config.budget.steps} steps × {config.budget.scripts_per_step} scripts from "
        f"{source.name}, seed {config.seed}",
        flush=True,
    )


def _line(row: Row, steps: int, domains: Sequence[str]) -> str:
    rewards = {f"reward {name}": f"reward/{name}/mean" for name in dict.fromkeys(domains)}
    names = {
        **rewards,
        "entropy": "policy/entropy",
        "grad": "policy/grad_norm",
        "lag": "lag/mean",
        "dropped": "group/dropped",
        "wait": "perf/wait_batch_s",
        "update": "perf/update_s",
        "s": "perf/step_s",
    }
    shown = {short: row[name] for short, name in names.items() if name in row}
    parts = " ".join(f"{key} {value:.3g}" for key, value in shown.items())
    return f"step {row['step']}/{steps} {parts}"
