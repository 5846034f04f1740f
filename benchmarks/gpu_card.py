"""What a GPU's memory holds while something runs: sampled beside it with nvidia-smi.

The card is the first that CUDA_VISIBLE_DEVICES names, as children of the benchmark see it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil

PERIOD_S = 2.0
MIB = 2**20 / 1e9  # GB


@dataclass
class CardUse:
    """GB of the card. `before`: in use at the start; `peak`: the most that was seen;
    `by_role`: the most that processes of a role held together, where the driver tells their pids;
    `busy`: mean share of time with a kernel running, 0 … 1."""

    before: float = 0.0
    peak: float = 0.0
    by_role: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    samples: int = 0


def _ask(what: str, kind: str) -> list[list[str]]:
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    command = ["nvidia-smi", "-i", card, f"--query-{kind}={what}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [[word.strip() for word in line.split(",")] for line in lines if line.strip()]


def role_of(pid: int) -> str:
    """engine, trainer or other, by the command lines of a process and of those above it."""
    with contextlib.suppress(psutil.Error):
        process: psutil.Process | None = psutil.Process(pid)
        while process is not None and process.pid > 1:
            words = process.cmdline()
            for module, role in (
                ("rl.forge.trainer", "trainer"),
                ("model.serve", "engine"),
                ("rl.evaluate", "evaluation"),
            ):
                if module in words:
                    return role
            process = process.parent()
    return "other"


def _sample(use: CardUse, role: Callable[[int], str]) -> None:
    cards = _ask("memory.used,utilization.gpu", "gpu")
    with contextlib.suppress(ValueError, IndexError):
        used, busy = float(cards[0][0]) * MIB, float(cards[0][1]) / 100
        if use.samples == 0:
            use.before = used
        use.peak = max(use.peak, used)
        use.busy += (busy - use.busy) / (use.samples + 1)
        use.samples += 1
    held: dict[str, float] = {}
    for row in _ask("pid,used_gpu_memory", "compute-apps"):
        with contextlib.suppress(ValueError, IndexError):
            name = role(int(row[0]))
            held[name] = held.get(name, 0.0) + float(row[1]) * MIB
    for name, gb in held.items():
        use.by_role[name] = max(use.by_role.get(name, 0.0), gb)


@contextlib.contextmanager
def watched(role: Callable[[int], str] = role_of) -> Iterator[CardUse]:
    """Samples every `PERIOD_S` seconds until the block ends; nothing where there is no card."""
    use, over = CardUse(), threading.Event()

    def watch() -> None:
        _sample(use, role)
        while not over.wait(PERIOD_S):
            _sample(use, role)

    thread = threading.Thread(target=watch, name="card", daemon=True)
    found = shutil.which("nvidia-smi") is not None
    if found:
        thread.start()
    try:
        yield use
    finally:
        over.set()
        if found:
            thread.join(timeout=60)
