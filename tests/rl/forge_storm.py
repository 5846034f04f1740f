"""A storm of kills over asynchronous runs: `python -m tests.rl.forge_storm --kills 100 [--seed 0]`

Real runs (engine, gateway, trainer, workers, scorer and supervisor as processes) in all three
orders, graded by scripts in a real sandbox; at random times one of the processes gets SIGKILL.
Every run must end right (`forge_runs.violations`), no episode may be an `env_error`, and after the
death of a supervisor no process may be left. Prints a table and, last, one JSON object. Exit code 1
where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import median

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from forge_runs import VICTIMS, Session, orphans, run_config, violations
from rl_fakes import tiny_checkpoint

from rl.forge.places import Places
from rl.pool import Pool

KILLS_A_RUN = 10
LONGEST_PAUSE_S = 3.0
ORDERS = ("fifo", "windowed", "greedy")


READY = re.compile(r"^([a-z]+)(?:-\d+)? is ready after ([\d.]+) s$", re.MULTILINE)


class Storm:
    """`kills` by victim, what went wrong, seconds from start to use, and megabytes of memory."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.checkpoint = tiny_checkpoint(folder / "start")
        self.kills: Counter[str] = Counter()
        self.problems: list[str] = []
        self.ready_s: dict[str, list[float]] = defaultdict(list)
        self.memory_mb: dict[str, float] = {}
        self.runs = self.sessions = 0

    def one_run(self, most: int) -> None:
        """A run with up to `most` kills."""
        number = self.runs
        self.runs += 1
        order = ORDERS[number % len(ORDERS)]
        config = run_config(
            self.checkpoint,
            seed=number,
            budget={"steps": 8},
            rollout={"turns": 2},
            checkpoint_every=1 + number % 2,
            forge={
                "order": order,
                "parts": "forge_fakes:script_parts",
                "window_share": 0.5,
                "workers": 2,
                "zero_variance": "keep" if number % 3 == 0 else "drop",
            },
        )
        faults = {"FORGE_PAUSE_S": "0.3", "FORGE_FAULTS": "flat:3,flat:9"}
        session = Session(self.folder / f"run-{number}", config, faults)
        session.start()
        self.sessions += 1
        left = min(most, KILLS_A_RUN)
        while left:
            time.sleep(self.rng.uniform(0.0, LONGEST_PAUSE_S))
            if not self._kill(session, self.rng.choice(VICTIMS)):
                break
            left -= 1
        code = session.wait(300)
        problems = violations(session) if code == 0 else [f"exit code {code}: {session.log()}"]
        problems += failed_episodes(session) if code == 0 else []
        self.problems += [f"run {number} ({order}): {problem}" for problem in problems]
        for name, seconds in READY.findall(session.log()):
            self.ready_s[name].append(float(seconds))
        mark = "right" if not problems else "WRONG"
        print(f"run {number:3} {order:9} {sum(self.kills.values()):4} kills  {mark}", flush=True)

    def _kill(self, session: Session, victim: str) -> bool:
        """Kill it as soon as it is there. False if the run ended before."""
        assert session.process is not None
        self._weigh(session)
        while session.process.poll() is None:
            if not session.kill(victim):
                time.sleep(0.05)
                continue
            self.kills[victim] += 1
            if victim == "supervisor":
                if orphans(session.run_dir):
                    self.problems.append(f"{session.path.name}: a process outlived its supervisor")
                session.start()
                self.sessions += 1
            return True
        return False

    def _weigh(self, session: Session) -> None:
        """Resident memory of each process, the largest seen."""
        assert session.process is not None
        for name, pid in {**session.pids(), "supervisor": session.process.pid}.items():
            with suppress(psutil.NoSuchProcess):
                used = psutil.Process(pid).memory_info().rss / 2**20
                kind = name.partition("-")[0]
                self.memory_mb[kind] = max(self.memory_mb.get(kind, 0.0), used)


def failed_episodes(session: Session) -> list[str]:
    """Episodes whose script did not say what it says: a death of the scorer must not show."""
    with Pool(Places(session.run_dir).pool_of(session.config), create=False) as pool:
        wrong = [reward.episode for reward in pool.rewards() if reward.status == "env_error"]
    return [f"episodes {wrong} failed"] if wrong else []


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to leave the runs in")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        storm = Storm(options.keep or Path(temporary), options.seed)
        while (done := sum(storm.kills.values())) < options.kills:
            storm.one_run(options.kills - done)
    ready = {name: median(values) for name, values in storm.ready_s.items()}
    print("\n| process | killed | median s from start to use | resident MB |\n|---|---|---|---|")
    for name in VICTIMS:
        seconds = f"{ready[name]:.1f}" if name in ready else "–"
        print(f"| {name} | {storm.kills[name]} | {seconds} | {storm.memory_mb.get(name, 0):.0f} |")
    for problem in storm.problems:
        print(problem, file=sys.stderr)
    print(
        json.dumps(
            {
                "kills": sum(storm.kills.values()),
                "by_victim": dict(storm.kills),
                "runs": storm.runs,
                "sessions": storm.sessions,
                "wrong": len(storm.problems),
                "ready_s": {name: round(value, 2) for name, value in ready.items()},
                "memory_mb": {name: round(value) for name, value in storm.memory_mb.items()},
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )
    return 1 if storm.problems else 0


if __name__ == "__main__":
    sys.exit(main())
