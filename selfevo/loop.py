"""Running a campaign from outside: model endpoint, live lines, the graph, the report, exit code."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from selfevo import control, text
from selfevo.arms import Commands
from selfevo.campaign import Campaign, RunOptions, Say, create, open_campaign
from selfevo.events import Event
from selfevo.lab import check_lab, find_campaign, locked
from selfevo.llm import Endpoint
from selfevo.store import LOG, read_events

EXIT_CODES = {"done": 0, "budget": 3, "review": 4, "paused": 4}


def start(
    lab: Path, options: RunOptions, say: Say, commands: Commands | None = None
) -> tuple[int, Path]:
    """`selfevo run`: a new campaign, to its end or to the first review. (exit code, folder)."""
    lab = lab.absolute()
    repo = check_lab(lab)
    with locked(lab, "selfevo run"):
        campaign = create(lab, repo, options, say, commands)
        return _drive(campaign, "run"), campaign.folder


def resume(
    path: Path, name: str | None, say: Say, commands: Commands | None = None
) -> tuple[int, Path]:
    """`selfevo resume`: go on where the event log ends. (exit code, folder)."""
    lab, found = find_campaign(path, name)
    with locked(lab, "selfevo resume"):
        campaign = open_campaign(lab, found, say, commands)
        return _drive(campaign, "resume"), campaign.folder


def _drive(c: Campaign, command: str) -> int:
    from selfevo import graph, report  # LangGraph takes over a second to import

    def tell(event: Event) -> None:
        for line in text.live(event, c.view):
            c.say(line)

    try:
        if command == "run":  # event 1 was written before anybody listened
            for event in read_events(c.folder / LOG)[0]:
                tell(event)
        c.store.listeners.append(tell)
        control.withdraw(c.folder)
        c.store.listeners.append(control.halting(c))
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            waiting = c.view.pending_review() is not None and c.view.sessions > 0
            if c.config.agent.kind == "model" and c.view.state != "done" and not waiting:
                endpoint = Endpoint(c.config.agent, c.folder, c.commands.serve)
                c.endpoint = stack.enter_context(endpoint)
            try:
                reason = graph.run(c, command, startup_s=time.monotonic() - began)
            except control.HaltedError:
                c.emit("campaign.pause", actor="human")
                reason = "paused"
        report.write(c.folder)
        return EXIT_CODES[reason]
    finally:
        c.close()


@contextlib.contextmanager
def opened(lab: Path, name: str) -> Iterator[Campaign]:
    """A campaign opened for one human act, under the lab's lock."""
    with locked(lab, "selfevo pr"):
        campaign = open_campaign(lab, name, lambda line: None)
        try:
            yield campaign
        finally:
            campaign.close()
