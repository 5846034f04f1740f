"""A storm of kills: `python -m tests.selfevo.storm --kills 200 [--seed 0]`

Campaigns over the test double, real git and real job processes, killed with SIGKILL at random: at
a random point (the edge of an event, a blob, a git command, a job's start, a graph checkpoint), or
after a random time. Between two sessions the graph's database may be deleted, the log's last line
torn, every job and supervisor killed as well (a dead machine), the worktrees removed, or another
branch checked out. Every campaign must end as the same one undisturbed: one job a run, one PR and
one memory entry a round, every budget spent exactly. Exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.selfevo.selfevo_driver import Sessions
from tests.selfevo.selfevo_lab import new_lab, point_at
from tests.selfevo.selfevo_outcome import git, signature, violations

STEPS = 5
ROUNDS = 3
MAX_SESSIONS = 400  # of one campaign; more would mean that it gets nowhere
POINTS_A_SESSION = 60
SECONDS_A_SESSION = 2.0


@dataclass(frozen=True)
class Variant:
    """A scripted campaign: who proposes, its seed, and whether kept changes fail their test."""

    agent: str
    seed: int
    confirm: int
    fluke: bool

    def make(self, path: Path) -> Path:
        lab = new_lab(path)
        if self.fluke:
            (lab / "fluke").touch()
        if self.confirm:
            point_at(lab, "auto", confirm_seeds=str(self.confirm))
        return lab


VARIANTS = (
    Variant("rules", 0, 0, False),
    Variant("rules", 1, 2, True),
    Variant("rules", 2, 2, False),
    Variant("random", 3, 0, False),
    Variant("random", 4, 2, False),
)


class Storm:
    """`kills` counts sessions that were ended by SIGKILL; `weather` what else happened."""

    def __init__(self, sessions: Sessions, folder: Path, seed: int) -> None:
        self.sessions = sessions
        self.folder = folder
        self.rng = random.Random(seed)
        self.kills = 0
        self.weather: Counter[str] = Counter()
        self.calm: dict[Variant, dict[str, object]] = {}
        self.problems: list[str] = []

    def undisturbed(self, variant: Variant) -> dict[str, object]:
        if variant not in self.calm:
            lab = variant.make(self.folder / f"calm-{len(self.calm)}")
            code = self.sessions.run(lab, "start", **self.order(variant))
            if code != 0:
                raise RuntimeError(f"the undisturbed campaign ended with {code}: {self.log(lab)}")
            self.calm[variant] = signature(lab)
        return self.calm[variant]

    def order(self, variant: Variant) -> dict[str, object]:
        return {"agent": variant.agent, "seed": variant.seed, "rounds": ROUNDS}

    def log(self, lab: Path) -> str:
        return " ".join(lab.with_suffix(".log").read_text().split())[-400:]

    def campaign(self, variant: Variant, number: int, most: int) -> None:
        """One campaign, killed `most` times at most, to its end."""
        expected = self.undisturbed(variant)
        lab = variant.make(self.folder / f"lab-{number}")
        events = lab / "runs/c1/events.jsonl"
        left = most
        for _ in range(MAX_SESSIONS):
            begun = events.exists() and events.stat().st_size > 0
            if not begun:
                shutil.rmtree(lab / "runs", ignore_errors=True)
                git(lab, "checkout", "--quiet", "main")  # a start refuses a detached head
            order = self.order(variant)
            if left > 0:
                order |= self.blow()
            code = self.sessions.run(lab, "resume" if begun else "start", **order)
            if code == 0:
                break
            if code != -9:
                self.problems.append(f"lab-{number} {variant}: exit code {code}: {self.log(lab)}")
                return
            self.kills += 1
            left -= 1
            self.disturb(lab, events)
        else:
            self.problems.append(f"lab-{number} {variant}: no end after {MAX_SESSIONS} sessions")
            return
        found = violations(lab, STEPS)
        if signature(lab) != expected:
            ours = signature(lab)
            differ = [key for key in expected if ours[key] != expected[key]]
            found.append(f"not as undisturbed: {', '.join(differ)}")
        self.problems += [f"lab-{number} {variant}: {problem}" for problem in found]
        if not found:
            shutil.rmtree(lab)

    def blow(self) -> dict[str, object]:
        if self.rng.random() < 0.8:
            return {"number": 1 + int(POINTS_A_SESSION * self.rng.random() ** 2)}
        return {"kill_after_s": self.rng.uniform(0.0, SECONDS_A_SESSION)}

    def disturb(self, lab: Path, events: Path) -> None:
        """What may happen beside the kill."""
        if self.rng.random() < 0.4:
            self.weather["database deleted"] += 1
            (lab / "runs/c1/checkpoints.sqlite").unlink(missing_ok=True)
        if self.rng.random() < 0.2 and events.exists() and events.stat().st_size:
            self.weather["last line torn"] += 1
            with events.open("ab") as file:
                file.write(b'{"v":1,"seq":99,"ts":17')
        if self.rng.random() < 0.2:
            self.weather["machine dead"] += 1
            kill_jobs(lab)
        if self.rng.random() < 0.1:
            self.weather["worktrees removed"] += 1
            shutil.rmtree(lab / "runs/c1/worktrees", ignore_errors=True)
        if self.rng.random() < 0.1:
            self.weather["checkout"] += 1
            git(lab, "checkout", "--quiet", "--detach", self.rng.choice(["main", "main~0"]))
        elif self.rng.random() < 0.5:
            git(lab, "checkout", "--quiet", "main")


def kill_jobs(lab: Path) -> None:
    """SIGKILL to every supervisor and job of a lab: what a power cut leaves."""
    mark = str(lab)
    dead = []
    for process in psutil.process_iter():
        try:
            supervisor = any("supervisor" in word for word in process.cmdline())
            files = {f.path for f in process.open_files()} if supervisor else set()
            ours = any(path.startswith(mark) for path in files)
            if ours or process.environ().get("SELFEVO_JOB", "").find(f":{mark}/") >= 0:
                process.kill()
                dead.append(process)
        except (psutil.Error, OSError):
            continue
    psutil.wait_procs(dead, timeout=20)


def run(kills: int, seed: int) -> Storm:
    """Campaigns until `kills` sessions were killed, each to its end."""
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    began = time.monotonic()
    with Sessions() as sessions:
        storm = Storm(sessions, folder, seed)
        number = 0
        while storm.kills < kills and not storm.problems:
            variant = VARIANTS[number % len(VARIANTS)]
            most = min(kills - storm.kills, storm.rng.randint(20, 60))
            storm.campaign(variant, number, most)
            number += 1
            print(f"  {storm.kills} kills, {number} campaigns", file=sys.stderr, flush=True)
    print(
        f"{storm.kills} kills in {number} campaigns of {ROUNDS} rounds, "
        f"{time.monotonic() - began:.0f} s; "
        + ", ".join(f"{what} {n}" for what, n in sorted(storm.weather.items()))
    )
    for problem in storm.problems:
        print(f"violation: {problem}")
    if storm.problems:
        print(f"kept for a look: {folder}")
    else:
        print("one job a run, one PR and one memory entry a round, every budget exact")
        shutil.rmtree(folder)
    return storm


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.selfevo.storm")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return 1 if run(args.kills, args.seed).problems else 0


if __name__ == "__main__":
    sys.exit(main())
