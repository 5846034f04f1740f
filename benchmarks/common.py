"""What every benchmark prints beside its figures: commit, hardware, versions; and intervals."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Z95 = 1.959963984540054


def commit() -> str:
    """The commit of this checkout, with `+` when the tree is dirty; `unknown` outside git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, usable cores and the GPU, by torch where it is loaded, else by its driver."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    found: dict[str, Any] = {"cpu": processor, "cores": len(os.sched_getaffinity(0))}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    elif torch is None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
        if names := asked.stdout.splitlines():
            found["gpu"] = names[0]
    return found


def versions(*names: str) -> dict[str, str]:
    """Installed versions of the named distributions, and Python's."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion; (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def report(
    name: str,
    figures: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    packages: Sequence[str] = ("numpy", "torch"),
    **more: Any,
) -> dict[str, Any]:
    """The object that a benchmark prints last."""
    return {
        "name": name,
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(*packages),
        "figures": dict(figures),
        "rows": list(rows),
        **more,
    }


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the result: one JSON object, or `name value` lines for people."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result["figures"].items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
