"""`selfevo watch`: follow a campaign while another process runs it, from its folder alone.

Events come from the log, the progress of running jobs from their run directories. Reads only, and
takes no lock, so it disturbs nobody.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from agent_tools.wandb_logs.rows import RowCollector, as_number
from agent_tools.wandb_logs.sidecar import read_sidecar
from selfevo import control, text
from selfevo.arms import last_metrics
from selfevo.events import Event, parse_line
from selfevo.jobs import CURVE_KEYS
from selfevo.memory import clean
from selfevo.replay import curve_lines
from selfevo.views import CampaignView, JobView, apply

POLL_S = 0.5
CURVES = (("reward/mle/mean", "reward"), ("rollout/valid_frac", "valid"))


class Reader(Protocol):
    """What is told: events of the log, and steps of running training jobs."""

    def event(self, event: Event, view: CampaignView) -> None: ...

    def step(self, job: JobView, row: dict[str, Any], run_dir: Path) -> None: ...


@dataclass
class Tail:
    """The whole lines of a growing event log, each once."""

    path: Path
    _offset: int = 0

    def read(self) -> Iterator[Event]:
        """Events that came since the last call; a line that is half written comes later."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    event = parse_line(line.decode("utf-8"))
                except (ValueError, KeyError, TypeError):
                    return  # a torn write of a killed process; its successor cuts it
                self._offset += len(line)
                yield event


def follow(lab: Path, folder: Path, reader: Reader) -> tuple[int, CampaignView]:
    """Tell everything from the first event on, until no process will add to it.

    Returns (exit code, view); the code says what the campaign came to: 0 over · 3 its hours are
    used up · 4 waits for a person (a review, a pause) · 143 stopped · 5 its process is gone.
    """
    tail = Tail(folder / "events.jsonl")
    view = CampaignView()
    steps: dict[str, int] = {}
    session: Event | None = None
    while True:
        # asked before the log is read, so what a process wrote before it went is not missed
        driven = control.driver(lab, folder, session) is not None
        for event in tail.read():
            session = event if event.kind == "session.start" else session
            apply(view, event)
            reader.event(event, view)
        for job in control.running(view):
            if job.kind == "train":
                _look(folder / job.folder, job, steps, reader)
        if view.state == "done":
            return 3 if view.stop_reason == "budget" else 0, view
        if not driven and control.driver(lab, folder, session) is None:
            return outcome(view), view
        time.sleep(POLL_S)


def _look(run_dir: Path, job: JobView, steps: dict[str, int], reader: Reader) -> None:
    row = last_metrics(run_dir)
    step = row.get("step")
    if isinstance(step, int) and steps.get(job.key) != step:
        steps[job.key] = step
        reader.step(job, row, run_dir)


def outcome(view: CampaignView) -> int:
    """Exit code of a campaign that is not over and that no process runs."""
    if view.pending_review() is not None or view.stop_reason == "paused":
        return 4
    return 143 if view.stop_reason in ("requested", "interrupted") else 5


def last_line(view: CampaignView, code: int) -> str:
    """Why nothing more will come, and what goes on."""
    if code in (0, 3):
        return ""
    waiting = view.pending_review()
    if waiting is not None:
        return f"PR {waiting.number} waits: `selfevo pr review {waiting.number}`"
    why = {4: "paused", 143: "stopped", 5: "its process is gone"}[code]
    return f"{why}: `selfevo resume` goes on"


@dataclass
class Lines:
    """For people: live lines, and the curve of a running job whenever it has come further."""

    emit: Callable[[str], None]
    folder: Path
    _curves: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def event(self, event: Event, view: CampaignView) -> None:
        for line in text.live(event, view):
            self.emit(line)
        if event.kind == "job.done":
            for line in curve_lines(self.folder, event.data.get("curves")):
                self.emit(f"    {line}")

    def step(self, job: JobView, row: dict[str, Any], run_dir: Path) -> None:
        known = self._curves.get(job.key)
        if known is None:
            known = self._curves[job.key] = _so_far(run_dir)
        else:
            for key, values in known.items():
                number = as_number(row.get(key))
                values += [] if number is None else [number]
        parts = [f"step {row['step']}"]
        for key, label in CURVES:
            finite = [value for value in known[key] if math.isfinite(value)]
            if finite:
                parts.append(f"{label} {text.sparkline(finite, 20)} {finite[-1]:.2f}")
        self.emit(f"    {clean(job.id)}: {'  '.join(parts)}")


def _so_far(run_dir: Path) -> dict[str, list[float]]:
    """The curves up to now; later values come one by one, so a long run is read once."""
    rows = RowCollector()
    read_sidecar(run_dir / "metrics.jsonl", rows)
    found = rows.rows()
    return {key: [row[key] for row in found if key in row] for key, _ in CURVES}


@dataclass
class JsonLines:
    """For programs: every event as logged, and `job.progress` records, which no log holds."""

    emit: Callable[[str], None]

    def event(self, event: Event, view: CampaignView) -> None:
        self.emit(event.line())

    def step(self, job: JobView, row: dict[str, Any], run_dir: Path) -> None:
        metrics = {key: row[key] for key in CURVE_KEYS if key in row}
        record = {"kind": "job.progress", "job": job.id, "step": row["step"], "metrics": metrics}
        self.emit(json.dumps(record, ensure_ascii=False))
