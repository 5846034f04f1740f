"""The whole architecture study in small, with a kill in the middle: `make verify-study`.

Two processes share one log; one is killed and started again. Afterwards every run must be there
once, nothing is left to do, and the report must hold every study.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model.study.variants import STUDIES, names_of

SEEDS = 2
KILL_AFTER = 3  # lines
TOKENS = 600_000
TIMEOUT_S = 900


def _study(*args: str) -> list[str]:
    return [sys.executable, "-m", "model.study", *args]


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def main() -> int:
    """0 if all of it holds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        corpus, log = Path(folder) / "corpus.xz", Path(folder) / "study.jsonl"
        subprocess.run(_study("corpus", str(corpus), "--tokens", str(TOKENS)), check=True)
        everything = _study(
            *("all", "--size", "mini", "--seeds", str(SEEDS), "--threads", "1"),
            *("--corpus", str(corpus), "--log", str(log)),
        )
        start = time.monotonic()
        both = [subprocess.Popen(everything, env=environment) for _ in range(2)]
        while len(_lines(log)) < KILL_AFTER:
            assert time.monotonic() - start < TIMEOUT_S, "no line after so long"
            assert any(process.poll() is None for process in both), "the study ended too early"
            time.sleep(0.2)
        both[0].send_signal(signal.SIGKILL)
        assert both[0].wait() == -signal.SIGKILL, "it ended before it was killed"
        both[0] = subprocess.Popen(everything, env=environment)
        assert [process.wait(timeout=TIMEOUT_S) for process in both] == [0, 0]
        # A run that the other process had claimed when the first came past is made by now.
        again = subprocess.run(everything, env=environment, check=True, capture_output=True)
        names = names_of([*STUDIES])
        asked = len(names) * SEEDS
        assert f"0 of {asked} runs" in again.stdout.decode(), again.stdout
        runs = [(line["variant"], line["seed"]) for line in map(json.loads, _lines(log))]
        assert sorted(runs) == sorted((name, seed) for name in names for seed in range(SEEDS))
        report = subprocess.run(_study("report", str(log)), check=True, capture_output=True)
        text = report.stdout.decode()
        assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [*STUDIES]
        print(text)
        print(
            f"{asked} runs in {time.monotonic() - start:.0f} s, one of them killed and made again"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
