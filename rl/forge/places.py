"""Where things lie in the run directory of an asynchronous run, and its durable notes.

    pool.sqlite          calls, rewards and steps (or whatever `pool` names)
    groups.jsonl         one line a step: which groups were trained on, which dropped
    forge/alive.lock     held by every process of the run
    forge/pids.json      the processes that run now
    forge/<name>.log     what each of them says
    forge/weights-N/     weights for the engine, where a step has no checkpoint or one that rounds

No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import RunConfig
from rl.errors import CheckpointStateError
from rl.forge.messages import Step
from rl.pool import pool_at
from rl.run_dir import write_atomic


@dataclass(frozen=True)
class Places:
    """Paths of a run directory."""

    run: Path

    @property
    def config(self) -> Path:
        return self.run / "config.resolved.yaml"

    @property
    def forge(self) -> Path:
        return self.run / "forge"

    @property
    def groups(self) -> Path:
        return self.run / "groups.jsonl"

    def pool_of(self, config: RunConfig) -> str:
        """Path or URL of the data pool."""
        return pool_at(config.pool or "pool.sqlite", self.run)

    def weights(self, step: int) -> Path:
        return self.forge / f"weights-{step}"


def read_note(checkpoint: Path) -> dict[str, Any]:
    """`trainer.json` of a step checkpoint, which must come from an asynchronous run."""
    path = checkpoint / "trainer" / "trainer.json"
    try:
        note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        note["forge"]["frontier"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointStateError(
            f"{path}: no state of an asynchronous run ({error!r}); name another folder"
        ) from error
    return note


def group_line(message: Step, version: int) -> dict[str, Any]:
    """What `groups.jsonl` says of a step."""
    return {
        "step": message.step,
        "version": version,
        "trained": [list(group) for group in message.groups],
        "dropped": [list(group) for group in message.dropped],
    }


class GroupLog:
    """`groups.jsonl`: what every step consumed. Written after the step's checkpoint, which holds
    the same line: after a crash between the two it is put back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, last_step: int, last: Mapping[str, Any] | None) -> None:
        """Cut lines after `last_step`, and put its own line back."""
        lines = [line for line in self.lines() if line["step"] <= last_step]
        if last is not None and (not lines or lines[-1]["step"] < last_step):
            lines.append(dict(last))
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def append(self, line: Mapping[str, Any]) -> None:
        """One line. Not synced: the checkpoint has it too."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.path.is_file():
            return []
        *whole, _ = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole if line]
