"""Random kills, few enough for a test; `make verify-storm` has many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real
def test_twenty_random_kills_leave_no_trace() -> None:
    argv = [sys.executable, "-m", "tests.selfevo.storm", "--kills", "20", "--seed", "7"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("20 kills in ")
