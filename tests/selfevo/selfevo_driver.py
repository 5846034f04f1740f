"""Runs or resumes a campaign in a process of its own, and dies where it is told to.

`python selfevo_driver.py start|resume LAB AGENT [KIND before|after]`: SIGKILL to itself before or
after the first event of KIND is written.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from selfevo import campaign, loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions
from selfevo.store import Store

DOUBLE = str(Path(__file__).with_name("selfevo_double.py"))


def die_at(kind: str, when: str) -> None:
    real = Store.append

    def append(self: Store, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == kind and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        event = real(self, name, *args, **kwargs)
        if name == kind:
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    Store.append = append  # type: ignore[method-assign]


def main() -> int:
    action, lab, agent, *point = sys.argv[1:]
    campaign.POLL_S = 0.02
    if point:
        die_at(point[0], point[1])
    commands = Commands(
        (sys.executable, DOUBLE, "train"), (sys.executable, DOUBLE, "evaluate"), check_machine=False
    )

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if action == "start":
        return loop.start(Path(lab), RunOptions(agent=agent), say, commands)[0]
    return loop.resume(Path(lab), None, say, commands)[0]


if __name__ == "__main__":
    sys.exit(main())
