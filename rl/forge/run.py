"""One asynchronous run from beginning to end: the same run directory as a synchronous one.

The figures of a row differ from the synchronous loop's where there is no common meaning:
`perf/generate_s` is the time during which any of the step's calls ran, `perf/execute_s` the sum of
the episodes' tool time (both overlap with the training of steps before), `perf/step_s` the time
from one step to the next. No torch here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from rl.checkpoints import fingerprint, resolve_checkpoint
from rl.config import RunConfig, dump_config
from rl.errors import DivergedError, StoppedError, exit_code_of
from rl.forge.places import Places, read_note
from rl.forge.resume import Start, find_start
from rl.forge.supervisor import Supervisor
from rl.objective_text import objective_text
from rl.plan import async_text
from rl.run_dir import Row, RunDir, Status
from rl.step_metrics import drift
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
    status = Status(folder.path / "status.json")
    wandb: WandbLog | None = None
    code = 0
    try:
        check()
        start = find_start(folder, source, fingerprint(source))
        wandb = WandbLog(config, folder.path, folder.wandb_id(), start.rows)
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
        wandb.finish(0)
        wandb = None
        status.close("done", 0)
        folder.write_result(_result(config, folder, source, device))
        print(folder.done_text(config.budget.steps), flush=True)
    except StoppedError as error:
        code = error.exit_code
        status.close("cancelled", code, signal=error.signal_name, reason=str(error))
        raise
    except BaseException as error:
        code = exit_code_of(error)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        status.close("failed", code, reason=reason)
        raise
    finally:
        if wandb is not None:
            wandb.finish(code)


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


def _result(config: RunConfig, folder: RunDir, source: Path, device: str) -> dict[str, Any]:
    final = (folder.checkpoints / "latest").resolve()
    note = read_note(final)
    counts = note["counts"]
    return {
        "steps": note["step"],
        "checkpoint": f"checkpoints/{final.name}",
        "fingerprint": fingerprint(final),
        "source": str(config.model.checkpoint),
        "source_fingerprint": note["source"],
        "objective": config.objective,
        "seed": config.seed,
        "metrics": {k: v for k, v in note["row"].items() if k not in ("step", "t")},
        "tokens": counts["tokens"],
        "scripts": counts["scripts"],
        "infra_errors": counts["infra"],
        "cpu_seconds": round(counts["cpu_s"], 3),
        "seconds": round(counts["seconds"], 3),
        "device": device or note["device"],
        "versions": {name: package_version(name) for name in ("torch", "wandb", "scikit-learn")},
    }


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
