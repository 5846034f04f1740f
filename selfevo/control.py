"""`selfevo pause` and `selfevo stop`: acts on a campaign that another process drives.

Pause leaves a request in the campaign's folder. The driving process looks for it after every event
it writes, and leaves at the first one at which no job of it runs, so a running job is let finish
and none is started. Stop sends SIGTERM, which saves the state at once, and then cancels the jobs,
whose trainer saves its own. Any event is a safe point: `docs/recovery.md`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from agent_tools.errors import InfraError, UserError
from agent_tools.launcher import Job
from selfevo.arms import Commands, last_metrics, read_json
from selfevo.campaign import Campaign, open_campaign
from selfevo.events import Event
from selfevo.lab import campaign_folder, campaigns, find_campaign, locked
from selfevo.store import read_events
from selfevo.views import CampaignView, JobView, reduce

REQUEST = "pause.json"
END_LIMIT_S = 60.0  # for the driving process to save its state after SIGTERM
#: Events after which nothing may be cut short: the session's own frame.
FRAME = ("session.start", "session.end", "campaign.end", "campaign.pause")


class HaltedError(SystemExit):
    """A pause was asked for and this is a safe point: the process leaves with exit code 4."""

    def __init__(self) -> None:
        super().__init__(4)


@dataclass(frozen=True)
class Driver:
    """The process that runs a campaign now."""

    pid: int
    host: str


@dataclass(frozen=True)
class Told:
    """What a control command did.

    outcome: asked (a pause that is under way) · stopped · idle (no process and no job runs) ·
    ended (the campaign is over); jobs: those that run on (pause), or were cancelled (stop).
    """

    campaign: str
    outcome: str
    message: str
    jobs: tuple[str, ...] = ()


# ------------------------------------------------------------------ in the driving process


def halting(c: Campaign) -> Callable[[Event], None]:
    """A listener of the store that raises `HaltedError` at the first safe point after a request."""

    def look(event: Event) -> None:
        if event.kind in FRAME or c.view.state == "done" or not (c.folder / REQUEST).exists():
            return
        busy = any(job.state == "submitted" for job in c.view.jobs.values())
        if busy and event.kind != "job.submit.intent":  # no further job starts beside a running one
            return
        raise HaltedError

    return look


def withdraw(folder: Path) -> None:
    """Forget a request for a pause: it was followed, or a person resumed the campaign."""
    (folder / REQUEST).unlink(missing_ok=True)


# ------------------------------------------------------------------ from outside


def pause(path: Path, name: str | None) -> Told:
    """Ask the driving process to leave when the running job has ended. The same again is fine."""
    lab, found = find_campaign(path, name)
    folder = campaign_folder(lab, found)
    events = read_events(folder / "events.jsonl")[0]
    view = reduce(events)
    jobs = tuple(_shown(folder, job) for job in running(view))
    if driver(lab, folder, last_session(events)) is None:
        return _not_driven(view, jobs)
    request = folder / REQUEST
    again = request.exists()
    try:
        part = request.with_suffix(".part")
        part.write_text(json.dumps({"asked": time.time(), "pid": os.getpid()}), encoding="utf-8")
        part.replace(request)
    except OSError as error:
        raise InfraError(f"cannot write {request}: {error.strerror}; free some space") from error
    when = f"after {', '.join(jobs)}" if jobs else "at its next step"
    words = "was asked to pause before; it pauses" if again else "pauses"
    return Told(found, "asked", f"campaign {found} {words} {when}", jobs)


def stop(path: Path, name: str | None, commands: Commands | None = None) -> Told:
    """End the driving process and the campaign's jobs, with their state saved."""
    lab, found = find_campaign(path, name)
    folder = campaign_folder(lab, found)
    events = read_events(folder / "events.jsonl")[0]
    view = reduce(events)
    who = driver(lab, folder, last_session(events))
    if who is None and (view.state == "done" or not (running(view) or unlogged(view))):
        return _not_driven(view, ())
    if who is not None:
        _terminate(who, found)
    with locked(lab, "selfevo stop"):
        c = open_campaign(lab, found, lambda line: None, commands)
        try:
            if c.view.state == "done":
                return _not_driven(c.view, ())
            cancelled = _cancel(c)
            if who is None and not cancelled:
                return _not_driven(c.view, ())
            withdraw(folder)
            c.emit("campaign.stop", {"jobs": cancelled}, actor="human")
        finally:
            c.close()
    what = f"; {', '.join(cancelled)} cancelled, state saved" if cancelled else ""
    return Told(found, "stopped", f"campaign {found} is stopped{what}", tuple(cancelled))


def driver(lab: Path, folder: Path, session: Event | None) -> Driver | None:
    """The living process that runs the campaign in `folder`; read only.

    `session` is the log's last session.start. The lab's lock names its owner in owner.json; that
    file of a killed owner is told by its pid, where the owner ran on this host.
    """
    record = read_json(lab / "runs" / "owner.json")
    pid, host, command = record.get("pid"), record.get("host"), record.get("command")
    if not isinstance(pid, int) or command not in ("selfevo run", "selfevo resume"):
        return None
    if host == socket.gethostname() and not _lives(pid, str(record.get("since"))):
        return None
    if session is None:  # event 1 is written, the first session has not begun
        ours = campaigns(lab)[-1:] == [folder.name]
    else:
        ours = (session.data.get("pid"), session.data.get("host")) == (pid, host)
    return Driver(pid, str(host)) if ours else None


def last_session(events: Sequence[Event]) -> Event | None:
    """The last session.start."""
    return next((event for event in reversed(events) if event.kind == "session.start"), None)


def running(view: CampaignView) -> list[JobView]:
    """Jobs without an outcome in the log."""
    return [job for job in view.jobs.values() if job.state == "submitted"]


def unlogged(view: CampaignView) -> list[dict[str, Any]]:
    """Jobs that a loop meant to start and ended before it logged that it had."""
    return [
        data
        for key, data in view.intents.items()
        if key not in view.outcomes and {"job", "folder"} <= data.keys()
    ]


def _lives(pid: int, since: str) -> bool:
    """Whether the process that took the lock at local time `since` still lives."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        taken = time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S"))
        return process.create_time() <= taken + 2  # `since` has whole seconds
    except (psutil.NoSuchProcess, ValueError):
        return False


def _terminate(who: Driver, campaign: str) -> None:
    if who.host != socket.gethostname():
        raise UserError(
            f"campaign {campaign} is run by pid {who.pid} on {who.host}; "
            "give `selfevo stop` on that machine"
        )
    try:
        process = psutil.Process(who.pid)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_LIMIT_S
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise InfraError(
                    f"pid {who.pid} did not end within {END_LIMIT_S:.0f} s; `kill -9 {who.pid}` "
                    "loses nothing, then `selfevo stop` again"
                )
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as error:
        raise UserError(
            f"pid {who.pid} belongs to another user; let its owner give `selfevo stop`"
        ) from error


def _cancel(c: Campaign) -> list[str]:
    """Cancel the jobs that still run; returns their names."""
    handles = {
        job.id: Job(str(c.view.outcomes[job.key]["launcher_id"]), c.run_dir(job.folder))
        for job in running(c.view)
    }
    for data in unlogged(c.view):
        run_dir = c.run_dir(str(data["folder"]))
        if started := read_json(run_dir / "job.json").get("id"):
            handles[str(data["job"])] = Job(str(started), run_dir)
    cancelled = []
    for name, handle in handles.items():
        if not c.launcher.status(handle).finished:
            c.launcher.cancel(handle)
            cancelled.append(name)
    return cancelled


def _not_driven(view: CampaignView, jobs: tuple[str, ...]) -> Told:
    if view.state == "done":
        return Told(view.name, "ended", f"campaign {view.name} is over ({view.stop_reason})")
    waiting = view.pending_review()
    why = f"PR {waiting.number} waits for a review" if waiting else view.stop_reason or "killed"
    on = f"; {', '.join(jobs)} still runs, `selfevo stop` cancels it" if jobs else ""
    return Told(view.name, "idle", f"campaign {view.name} is not running ({why}){on}", jobs)


def _shown(folder: Path, job: JobView) -> str:
    step = last_metrics(folder / job.folder).get("step")
    return job.id if step is None else f"{job.id} (at step {step})"
