"""The run directory: the only contract between a training run and who watches it.

    config.resolved.yaml   every value, after defaults
    status.json            state, pid, host, started, heartbeat, exit_code, signal, reason
    metrics.jsonl          one flushed line a step; NaN and Inf as strings
    checkpoints/step-N/    Hugging Face layout + trainer/; `latest` is a link, moved after fsync
    result.json            written last

A step's checkpoint is written before its metrics line, and holds that line: after a crash between
the two the line is restored; lines after the checkpoint are cut.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from model.errors import CheckpointError
from model.layout import check_checkpoint, last_whole, open_shard
from rl.errors import CheckpointStateError, InfraError

HEARTBEAT_S = 2.0
Row = dict[str, Any]


def write_atomic(path: Path, text: str) -> None:
    """Write beside, fsync, rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def encode_row(row: Mapping[str, Any]) -> str:
    """One JSON line; non-finite numbers become the strings NaN, Infinity, -Infinity."""
    return json.dumps({key: _plain(value) for key, value in row.items()}, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def decode_row(line: str) -> Row:
    """Inverse of `encode_row`."""
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return {
        key: words.get(value, value) if isinstance(value, str) else value
        for key, value in json.loads(line).items()
    }


class Status:
    """`status.json`, kept fresh by a thread every `HEARTBEAT_S` seconds until it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._closed = threading.Event()
        now = time.time()
        self._value: dict[str, Any] = {
            "state": "running",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": now,
            "heartbeat": now,
            "exit_code": None,
            "signal": None,
            "reason": None,
        }
        self._write()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def update(self, **changes: Any) -> None:
        """Change fields and write at once."""
        with self._lock:
            self._value |= changes
            self._write()

    def close(
        self, state: str, exit_code: int, *, signal: str | None = None, reason: str | None = None
    ) -> None:
        """The last word: `done`, `failed` or `cancelled`."""
        self._closed.set()
        self._thread.join(timeout=10)
        self.update(state=state, exit_code=exit_code, signal=signal, reason=reason)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_S):
            with self._lock:
                self._write()

    def _write(self) -> None:
        self._value["heartbeat"] = time.time()
        write_atomic(self._path, json.dumps(self._value) + "\n")


class RunDir:
    """Paths and durable writes of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self._lock = FileLock(path / ".lock")

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.release()

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        path = self.path / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def wandb_id(self) -> str:
        """The run's W&B id: drawn once, kept here, the same after every resume."""
        path = self.path / "wandb_id"
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

    def open(self, config_text: str, *, resume: bool) -> None:
        """Create the directory, or check that the run in it is the one that is asked for.

        CheckpointStateError if it holds a run and `resume` is not given, or another configuration,
        or if another process is writing in it. The lock goes with the process, also on kill -9.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointStateError(
                f"another process is running in {self.path}; wait for it or stop it"
            ) from error
        except OSError as error:
            raise CheckpointStateError(
                f"cannot make the run directory {self.path}: {error.strerror}; name another folder"
            ) from error
        config_path = self.path / "config.resolved.yaml"
        if config_path.is_file():
            if not resume:
                raise CheckpointStateError(
                    f"{self.path} already holds a run; add --resume to go on with it, or name "
                    "another folder"
                )
            known = config_path.read_text(encoding="utf-8")
            if known != config_text:
                raise CheckpointStateError(
                    f"{self.path} holds a run with another configuration "
                    f"({_first_difference(known, config_text)}); name another folder"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for stale in self.checkpoints.glob(".*"):
            shutil.rmtree(stale, ignore_errors=True)
        write_atomic(config_path, config_text)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None where nothing was saved yet.

        Damaged ones are passed over with a word on stderr. CheckpointStateError if all are damaged.
        """
        found, faults = last_whole(self.checkpoints, _check_step)
        for fault in faults:
            print(f"warning: passed over a damaged checkpoint: {fault}", file=sys.stderr)
        if found is None and faults:
            raise CheckpointStateError(
                f"{self.checkpoints}: no checkpoint is whole; name another folder to start again"
            )
        return found.resolve() if found else None

    def rows(self) -> list[Row]:
        """Complete metrics lines; a cut-off last line is left out."""
        if not self.metrics_path.is_file():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        return [decode_row(line) for line in lines[:-1] if line.strip()]

    def keep_rows(self, last_step: int, last_row: Row | None) -> list[Row]:
        """Cut rows after `last_step`, restore its own row from the checkpoint; returns them."""
        rows = [row for row in self.rows() if row["step"] <= last_step]
        if last_row is not None and (not rows or rows[-1]["step"] < last_step):
            rows.append(last_row)
        write_atomic(self.metrics_path, "".join(encode_row(row) + "\n" for row in rows))
        return rows

    def append_row(self, row: Row) -> None:
        """One flushed line."""
        with self.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(encode_row(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: int) -> Path:
        """`write(folder)` fills a temporary folder; it is renamed to `step-N`, then `latest` moves.

        All but the newest `keep` step folders are removed afterwards.
        """
        target = self.checkpoints / f"step-{step}"
        temporary = self.checkpoints / f".step-{step}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
        except (OSError, SafetensorError) as error:
            raise InfraError(
                f"cannot write {target}: {error}; free some space, then go on with --resume"
            ) from error
        for folder in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
            fsync_folder(folder)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        fsync_folder(self.checkpoints)
        link = self.checkpoints / ".latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(target.name)
        link.replace(self.checkpoints / "latest")
        fsync_folder(self.checkpoints)
        for old in self._steps()[:-keep]:
            shutil.rmtree(old)
        return target

    def _steps(self) -> list[Path]:
        folders = self.checkpoints.glob("step-*")
        return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))

    def drop_trainer_state(self) -> None:
        """A run that ended by itself needs no optimiser state: keep weights and trainer.json."""
        for folder in self._steps():
            (folder / "trainer" / "state.safetensors").unlink(missing_ok=True)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """The last file of a run."""
        write_atomic(self.path / "result.json", pretty(result))

    def done_text(self, steps: int) -> str:
        """One line on a run that has its result and was given `steps`."""
        result = self.result
        assert result is not None
        fewer = "" if result["steps"] >= steps else f" of {steps} (dropped groups cost steps)"
        return (
            f"{self.path} is done: {result['steps']} steps{fewer}, {result['scripts']} scripts, "
            f"{result['checkpoint']}"
        )


def _check_step(folder: Path) -> None:
    """Raise ModelError if a step's weights or trainer files are missing or cut off."""
    check_checkpoint(folder)
    trainer = folder / "trainer"
    try:
        json.loads((trainer / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{trainer / 'trainer.json'}: unreadable ({error})") from None
    if (trainer / "state.safetensors").is_file():  # the last checkpoint of a run has none
        with open_shard(trainer / "state.safetensors", "numpy"):
            pass


def pretty(value: Mapping[str, Any]) -> str:
    """Indented JSON with non-finite numbers as strings, at any depth."""

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        return _plain(item)

    return json.dumps(clean(value), indent=2, allow_nan=False) + "\n"


def _first_difference(known: str, asked: str) -> str:
    for old, new in zip(known.splitlines(), asked.splitlines(), strict=False):
        if old != new:
            return f"{old.strip()!r} there, {new.strip()!r} here"
    return "a different number of values"
