"""Where a run goes on: the newest checkpoint's frontier, and what the pool has beyond it.

No torch here.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ModelError
from model.layout import check_checkpoint
from rl.errors import CheckpointStateError
from rl.forge.groups import Known, known_members
from rl.forge.messages import parse_episode
from rl.forge.places import GroupLog, Places, read_note
from rl.pool import Pool
from rl.run_dir import Row, RunDir
from rl.window import Frontier


@dataclass(frozen=True)
class Start:
    """Step and policy version that are done, the weights to serve, what has been consumed, the
    rows that stand, and the checkpoint's note."""

    step: int
    version: int
    weights: Path
    frontier: Frontier
    rows: list[Row]
    note: dict[str, Any]


def find_start(folder: RunDir, source: Path, source_fingerprint: str) -> Start:
    """From the newest whole checkpoint, or from `source` where there is none.

    Rows and group lines after it are cut, its own are put back. CheckpointStateError where the run
    began from other weights, or was not an asynchronous one.
    """
    log = GroupLog(Places(folder.path).groups)
    latest = folder.latest()
    if latest is None:
        log.keep(0, None)
        return Start(0, 0, source, Frontier(), folder.keep_rows(0, None), {})
    note = read_note(latest)
    if note["source"] != source_fingerprint:
        raise CheckpointStateError(
            f"{source} is not the checkpoint that this run started from; put it back"
        )
    step = int(note["step"])
    log.keep(step, note["forge"]["groups"])
    rows = folder.keep_rows(step, note["row"])
    frontier = Frontier.from_dict(note["forge"]["frontier"])
    weights = Places(folder.path).weights(step)
    with suppress(ModelError):
        check_checkpoint(weights)
        return Start(step, int(note["version"]), weights, frontier, rows, note)
    return Start(step, int(note["version"]), latest, frontier, rows, note)


def known_of(pool: Pool, version: int, frontier: Frontier = Frontier()) -> Known:
    """Members with results that count for a policy at `version`, and numbers of attempts, of the
    groups that are not consumed at the frontier."""

    def open_(name: str) -> bool:
        parsed = parse_episode(name)
        return parsed is not None and parsed[0] >= frontier.head and parsed[0] not in taken

    taken = set(frontier.taken)
    results = []
    for reward in pool.rewards():
        if open_(reward.episode):
            versions = [of for call in pool.calls(reward.episode) for _, _, of in call.versions]
            results.append((reward.episode, reward.status, max(versions, default=0)))
    return known_members(filter(open_, pool.episodes()), results, version)
