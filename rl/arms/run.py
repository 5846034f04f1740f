"""Runs arms as processes, several at once, until all are done or the time is up.

Each arm keeps its state in `WORK/ARM`, so the same command goes on where the last one stopped; an
arm whose log says that it is done is not run again, on whichever machine. No torch here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rl.arms.log import log_lines, read_log, write_log
from rl.arms.spec import Settings
from rl.errors import ConfigError

POLL_S = 1.0
LOG_EVERY_S = 10.0
GRACE_S = 40.0
STOPPED = (143, 130)


@dataclass
class Running:
    """A child at work on an arm."""

    name: str
    slot: int
    process: subprocess.Popen[bytes]
    told: bool = False
    """It was told to stop."""


def is_done(name: str, logs: Path) -> bool:
    """Whether a log says that the arm is finished."""
    path = logs / f"{name}.jsonl"
    return path.is_file() and read_log(path).done is not None


def check_same(names: Sequence[str], settings: Settings, logs: Path) -> None:
    """ConfigError where a log was made with settings that change what is compared."""
    compared = ("suite", "steps", "scripts", "eval_every", "samples", "final_samples", "checkpoint",
                "overrides")  # fmt: skip
    mine = asdict(settings)
    for name in names:
        path = logs / f"{name}.jsonl"
        if not path.is_file():
            continue
        theirs = read_log(path).head["settings"]
        for key in compared:
            known, asked = theirs[key], mine[key]
            if (tuple(known) if isinstance(known, list) else known) != asked:
                raise ConfigError(
                    f"{path} was made with {key} {known!r}, asked for is {asked!r}; "
                    "name another --log"
                )


def run_arms(
    names: Sequence[str],
    settings: Settings,
    work: Path,
    logs: Path,
    *,
    minutes: float,
    parallel: int,
    gpus: int,
    about: dict[str, Any],
    check: Callable[[], None] = lambda: None,
    command: Sequence[str] = (sys.executable, "-m", "rl.arms"),
) -> dict[str, str]:
    """Run what is left, `parallel` at once; how each arm stands: done, stopped, waiting or failed.

    Past `minutes`, or when `check` raises, every child gets SIGTERM, on which it saves and stops;
    -9 if that is not enough.
    """
    check_same(names, settings, logs)
    state = {name: "done" if is_done(name, logs) else "waiting" for name in names}
    queue = [name for name in names if state[name] == "waiting"]
    deadline = time.monotonic() + 60 * minutes
    running: list[Running] = []
    logged = time.monotonic()
    try:
        while (queue and time.monotonic() < deadline) or running:
            while queue and len(running) < parallel and time.monotonic() < deadline:
                slot = min(set(range(parallel)) - {r.slot for r in running})
                name = queue.pop(0)
                running.append(
                    Running(name, slot, _start(name, settings, work, slot, gpus, command))
                )
            time.sleep(POLL_S)
            check()
            for child in [r for r in running if r.process.poll() is not None]:
                running.remove(child)
                state[child.name] = _ended(child, work)
                print(f"{child.name}: {state[child.name]}", flush=True)
                _write(child.name, settings, work, logs, about)
            if time.monotonic() > deadline:
                _stop(running)
            if time.monotonic() - logged > LOG_EVERY_S:
                logged = time.monotonic()
                for child in running:
                    _write(child.name, settings, work, logs, about)
    finally:
        _stop(running)
        for child in running:
            _write(child.name, settings, work, logs, about)
    return state


def _start(
    name: str, settings: Settings, work: Path, slot: int, gpus: int, command: Sequence[str]
) -> subprocess.Popen[bytes]:
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(slot % gpus)
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [*command, "arm", name, "--work", str(work), *options(settings)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
        )


def options(settings: Settings) -> list[str]:
    """The settings as command-line options."""
    out = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if field.name == "overrides":
            out += [part for text in value for part in ("--set", text)]
        else:
            out += [flag, str(value)]
    return out


def _ended(child: Running, work: Path) -> str:
    code = child.process.returncode
    if code == 0 and (work / child.name / "done").is_file():
        return "done"
    if code in STOPPED or (child.told and code < 0):
        return "stopped"
    tail = (work / child.name / "log.txt").read_text(errors="replace").strip().splitlines()
    print(f"{child.name}: exit {code}: {tail[-1] if tail else ''}", file=sys.stderr, flush=True)
    return "failed"


def _stop(running: Sequence[Running]) -> None:
    """SIGTERM to all, then -9 to those that stay."""
    for child in running:
        if child.process.poll() is None:
            child.told = True
            child.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    for child in running:
        try:
            child.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _write(name: str, settings: Settings, work: Path, logs: Path, about: dict[str, Any]) -> None:
    write_log(logs / f"{name}.jsonl", log_lines(name, settings, work / name, about))
