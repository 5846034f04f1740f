"""Real asynchronous runs for tests: a run file, its process, and what must be true at its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rl.config import RunConfig, dump_config, validate
from rl.errors import InfraError
from rl.forge.child import AliveLock
from rl.forge.messages import parse_episode
from rl.forge.places import GroupLog, Places, read_note
from rl.pool import Pool
from rl.run_dir import RunDir
from rl.window import Frontier, lag_bound, window_size

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
VICTIMS = ("engine", "gateway", "trainer", "worker", "scorer", "supervisor")


def run_config(checkpoint: Path, **changes: Any) -> RunConfig:
    """A small run over `forge_fakes`; `changes` are sections of the run file."""
    data: dict[str, Any] = {
        "model": {"checkpoint": str(checkpoint)},
        "competitions": [],
        "budget": {"steps": 3, "scripts_per_step": 4, "tokens_per_script": 32},
        "rollout": {"group_size": 2, "max_new_tokens": 24},
        "optim": {"lr": 1e-3, "warmup_steps": 1},
        "wandb": {"mode": "disabled"},
        "device": "cpu",
        "forge": {
            "mode": "async",
            "parts": "forge_fakes:seed_parts",
            "workers": 1,
            "episodes_per_worker": 8,
            "deadline_s": 60.0,
            "restarts": 30,
            "attempts": 20,
            "engine_options": ["--native", "off"],
        },
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value
    return validate(RunConfig, data, "test")


@dataclass
class Session:
    """One run directory and the supervisor that works in it now."""

    path: Path
    config: RunConfig
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    limit_file_bytes: int | None = None

    @property
    def run_dir(self) -> Path:
        return self.path / "run"

    def start(self) -> None:
        """`python -m rl.train`, resuming what is there."""
        self.path.mkdir(parents=True, exist_ok=True)
        run_file = self.path / "run.yaml"
        run_file.write_text(dump_config(self.config))
        inputs = self.path / "inputs"
        inputs.mkdir(exist_ok=True)
        paths = os.pathsep.join([str(ROOT), str(HERE)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment |= {"FORGE_INPUTS": str(inputs.absolute())} | self.environment
        command = [sys.executable, "-m", "rl.train", str(run_file), "--resume", "--run-dir"]
        if self.limit_file_bytes is not None:
            command = ["prlimit", f"--fsize={self.limit_file_bytes}", *command]
        with (self.path / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.run_dir)], stdout=log, stderr=log, env=environment, cwd=ROOT
            )

    def wait(self, seconds: float = 120) -> int:
        """The exit code."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            raise AssertionError(f"no end within {seconds} s: {self.log()[-2000:]}") from None

    def run(self) -> int:
        self.start()
        return self.wait()

    def log(self) -> str:
        return (self.path / "log").read_text()

    def pids(self) -> dict[str, int]:
        """Processes by name, as the supervisor notes them."""
        try:
            found: dict[str, int] = json.loads((self.run_dir / "forge/pids.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def kill(self, victim: str) -> bool:
        """SIGKILL to the first process of that name; False if there is none."""
        assert self.process is not None
        if victim == "supervisor":
            self.process.kill()
            self.process.wait()
            return True
        for name, pid in self.pids().items():
            if name.partition("-")[0] == victim:
                try:
                    if self.process.pid not in [p.pid for p in psutil.Process(pid).parents()]:
                        return False
                    os.kill(pid, signal.SIGKILL)
                except (ProcessLookupError, psutil.NoSuchProcess):
                    return False
                return True
        return False

    def wait_step(self, step: int, seconds: float = 60) -> None:
        """Until the run has done so many steps."""
        until = time.monotonic() + seconds
        rows = RunDir(self.run_dir)
        while len(rows.rows()) < step:
            assert time.monotonic() < until, self.log()[-2000:]
            assert self.process is not None and self.process.poll() is None, self.log()[-2000:]
            time.sleep(0.02)


def orphans(run_dir: Path, wait_s: float = 10.0) -> bool:
    """Whether a process of the run is alive although its supervisor is not."""
    try:
        AliveLock(run_dir / "forge/alive.lock", wait_s).close()
    except InfraError:
        return True
    except FileNotFoundError:
        return False
    return False


def violations(session: Session) -> list[str]:
    """What is wrong with a finished run; [] for a right one."""
    config, run_dir = session.config, session.run_dir
    steps, size = config.budget.steps, config.groups_per_step
    places, out = Places(run_dir), []
    status = json.loads((run_dir / "status.json").read_text())
    if status["state"] != "done" or not (run_dir / "result.json").is_file():
        return [f"status {status}, result.json {(run_dir / 'result.json').is_file()}"]
    rows = RunDir(run_dir).rows()
    done = len(rows)
    if [row["step"] for row in rows] != list(range(1, done + 1)) or not 1 <= done <= steps:
        out.append(f"rows {[row['step'] for row in rows]}")
    lines = GroupLog(places.groups).lines()
    if [line["step"] for line in lines] != list(range(1, done + 1)):
        out.append(f"group lines {[line['step'] for line in lines]}")
    consumed: Counter[int] = Counter()
    slots = (config.forge.steps_ahead + 1) * size
    width = window_size(config.forge.order, slots, config.forge.window_share)
    with Pool(places.pool_of(config), create=False) as pool:
        if damaged := pool.stats().damaged:
            out.append(f"damaged records {damaged}")
        for line in lines:
            if len(line["trained"]) != size and line["step"] < done:
                out.append(f"step {line['step']} trained {len(line['trained'])} groups")
            for group in [*line["trained"], *line["dropped"]]:
                parsed = [parse_episode(name) for name in group]
                (index,) = {found[0] for found in parsed if found is not None}
                consumed[index] += 1
                if [f and f[1] for f in parsed] != list(range(config.rollout.group_size)):
                    out.append(f"group {index} has members {group}")
            for name in (name for group in line["trained"] for name in group):
                reward, calls = pool.reward(name), pool.calls(name)
                if reward is None or (not calls and reward.status == "done"):
                    out.append(f"{name}: reward {reward}, {len(calls)} calls")
                versions = [of for call in calls for _, _, of in call.versions]
                lag = line["step"] - 1 - min(versions, default=line["step"] - 1)
                if lag > lag_bound(slots, width, size) or max(versions, default=0) >= line["step"]:
                    out.append(f"{name}: versions {set(versions)} in step {line['step']}")
    if twice := [index for index, count in consumed.items() if count > 1]:
        out.append(f"groups {twice} were consumed twice")
    note = read_note(run_dir / "checkpoints" / f"step-{done}")
    frontier = Frontier.from_dict(note["forge"]["frontier"])
    if sorted(consumed) != list(range(steps * size)) or frontier != Frontier(steps * size):
        out.append(f"consumed {sorted(consumed)} of {steps * size} groups, frontier {frontier}")
    with Pool(places.pool_of(config), create=False) as pool:
        trained = [[list(g.episodes) for g in step.groups] for step in pool.steps()]
    if trained != [line["trained"] for line in lines]:
        out.append("the pool's steps are not the run's")
    if list((run_dir / "checkpoints").glob(".*")):
        out.append("half a checkpoint is left")
    if orphans(run_dir):
        out.append("a process outlived the run")
    return out
