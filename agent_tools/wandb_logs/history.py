"""One history of a run, whichever of its two logs it is read from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent_tools.errors import UserError
from agent_tools.wandb_logs.records import WandbFile, read_wandb
from agent_tools.wandb_logs.rows import RowCollector, flatten
from agent_tools.wandb_logs.sidecar import read_sidecar

Source = Literal["wandb", "sidecar"]
ENDED = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class RunHistory:
    """The metrics of one run.

    rows: by rising step, each ``{"step": n, metric: value, …}``; NaN and infinities are floats; at
        most a few thousand (longer runs keep every key's extremes over the whole range).
    config: resolved configuration with dotted keys; empty if the run left none.
    state: queued, running, done, failed or cancelled; "unknown" without any record of it.
    source: the log that was read.
    """

    rows: list[dict[str, float]]
    config: dict[str, object] = field(default_factory=dict)
    state: str = "unknown"
    source: Source = "sidecar"
    warnings: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of each row that has `key`, by rising step."""
        return [(int(row["step"]), row[key]) for row in self.rows if key in row]

    def keys(self) -> list[str]:
        """All metric names, sorted."""
        return sorted({key for row in self.rows for key in row} - {"step"})


def read_run(run_dir: Path, *, prefer: Literal["auto", "wandb", "sidecar"] = "auto") -> RunHistory:
    """Read a run directory.

    auto: a run that ended by itself (status done, or failed with an exit code) is read from its
    latest ``.wandb`` file; a live, cancelled or crashed one from ``metrics.jsonl``; the other log
    is the stand-in for a missing one, and the side-car for an unreadable ``.wandb`` file, with a
    warning. "wandb" and "sidecar" read that log only.

    Raises `UserError` if the directory or both logs are missing, or a log is another kind of file.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run directory at {run_dir}: list the runs, or check the path")
    state, by_itself = _state(run_dir)
    rows = RowCollector()
    wandb_file = latest_wandb_file(run_dir)
    sidecar = run_dir / "metrics.jsonl"
    source = _choose(prefer, by_itself, wandb_file is not None, sidecar.is_file(), rows)
    config = _resolved_config(run_dir, rows)
    if source == "wandb":
        assert wandb_file is not None
        content = _wandb_content(wandb_file, rows, prefer == "auto" and sidecar.is_file())
        if content is None:
            source = "sidecar"
        else:
            config = config or content.config
            if state == "unknown" and content.exit_code is not None:
                state = "done" if content.exit_code == 0 else "failed"
    if source == "sidecar":
        read_sidecar(sidecar, rows)
    elif source is None and state == "unknown":
        raise UserError(
            f"{run_dir} is no run directory (no status.json, metrics.jsonl or wandb/): "
            "give the --run-dir of a run"
        )
    return RunHistory(rows.rows(), config, state, source or "sidecar", rows.warnings)


def read_anything(path: Path) -> tuple[RunHistory, Path]:
    """Read whatever a person points at, and say which folder or file was read.

    A run directory, a ``.wandb`` file, the folder of one W&B run, or a folder of many (its newest
    run is read). Raises `UserError` if there is no log.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run directory or a wandb folder")
    if path.is_file():
        return _read_file(path), path
    own = sorted(path.glob("run-*.wandb"))
    if own:
        return _read_file(own[-1]), own[-1]
    ours = any((path / name).exists() for name in ("status.json", "metrics.jsonl"))
    if ours:
        return read_run(path), path
    found = latest_wandb_file(path) or latest_wandb_file(path.parent, path.name)
    if found is None:
        raise UserError(
            f"{path}: no run log here (metrics.jsonl, or wandb/*run-*/run-*.wandb); give a run "
            "directory or a wandb folder"
        )
    return _read_file(found), found


def _read_file(path: Path) -> RunHistory:
    """A run of which only the ``.wandb`` file is known."""
    rows = RowCollector()
    content = read_wandb(path, rows)
    state = {None: "unknown", 0: "done"}.get(content.exit_code, "failed")
    return RunHistory(rows.rows(), content.config, state, "wandb", rows.warnings)


def _wandb_content(path: Path, rows: RowCollector, has_stand_in: bool) -> WandbFile | None:
    """The file's content; with a stand-in, None (and a warning) where nothing could be read."""
    try:
        content = read_wandb(path, rows)
    except UserError as error:
        if not has_stand_in:
            raise
        rows.warn(f"{error}; the sidecar log was read instead")
        return None
    if has_stand_in and not rows.rows():
        rows.warn(f"{path.name} holds no row: the sidecar log was read instead")
        return None
    return content


def latest_wandb_file(run_dir: Path, folder: str = "wandb") -> Path | None:
    """The ``.wandb`` file of the run's last process; a resumed run has one a process."""
    files = [
        path
        for path in (run_dir / folder).glob("*run-*/run-*.wandb")
        if not path.parent.is_symlink()  # latest-run
    ]

    def order(path: Path) -> tuple[str, int]:
        stamp = re.search(r"run-(\d{8}_\d{6})-", path.parent.name)
        return (stamp.group(1) if stamp else "", path.stat().st_mtime_ns)

    return max(files, key=order, default=None)


def _choose(
    prefer: str, by_itself: bool, has_wandb: bool, has_sidecar: bool, rows: RowCollector
) -> Source | None:
    """Which log to read; None if the run has not written any yet."""
    available = {"wandb": has_wandb, "sidecar": has_sidecar}
    if prefer != "auto":
        if not available[prefer]:
            name = "wandb/*/run-*.wandb" if prefer == "wandb" else "metrics.jsonl"
            raise UserError(f"the run has no {name}: read it with the other source, or auto")
        return "wandb" if prefer == "wandb" else "sidecar"
    first, second = ("wandb", "sidecar") if by_itself else ("sidecar", "wandb")
    for source in (first, second):
        if available[source]:
            if source == second:
                rows.warn(f"the {first} log is missing: the {second} log was read instead")
            return "wandb" if source == "wandb" else "sidecar"
    rows.warn("the run has not logged anything yet")
    return None


def _state(run_dir: Path) -> tuple[str, bool]:
    """State of the run, and whether it ended by itself (its W&B file is then complete)."""
    status = _read_object(run_dir / "status.json")
    job = _read_object(run_dir / "job.json")
    state = str(status.get("state", "unknown"))
    exit_code = status.get("exit_code")
    if state not in ENDED and job.get("state") in ("failed", "cancelled"):
        # The trainer had no chance to say so (kill -9): its launcher knows.
        return str(job["state"]), False
    by_itself = state == "done" or (state == "failed" and isinstance(exit_code, int))
    if state == "unknown":
        by_itself = (run_dir / "result.json").is_file()
    return state, by_itself and not status.get("signal")


def _read_object(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # missing or cut off: the caller treats both as "not known"
    return value if isinstance(value, dict) else {}


def _resolved_config(run_dir: Path, rows: RowCollector) -> dict[str, object]:
    path = run_dir / "config.resolved.yaml"
    if not path.is_file():
        return {}
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe").load(path.read_text("utf-8"))
    except (YAMLError, UnicodeDecodeError):
        rows.warn(f"{path.name} is no YAML: the configuration was left out")
        return {}
    return flatten(value) if isinstance(value, dict) else {}
