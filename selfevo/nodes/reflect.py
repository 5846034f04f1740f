"""reflect: write what the round showed into memory/NOTES.md on the incumbent branch."""

from __future__ import annotations

from typing import Any

from selfevo import memory
from selfevo.campaign import Campaign
from selfevo.config import NOTES


def run(c: Campaign) -> str:
    """One entry and one commit a round, then the round is over."""
    current = c.view.now
    entry = memory.entry_text(c.view, current)
    data = {"line": memory.round_line(c.view, current), "verdict": current.verdict}
    c.once("memory", f"memory/{current.number}", data, lambda: _append(c, entry))
    if not current.ended:
        c.emit("round.end", {"verdict": current.verdict})
    return "stop"


def _append(c: Campaign, entry: str) -> dict[str, Any]:
    tree = c.repo.worktree_add(c.incumbent_tree, c.incumbent_branch)
    notes = tree / NOTES
    old = notes.read_text(encoding="utf-8")
    if entry not in old:  # killed after the write: the entry is there already
        notes.write_text(old.rstrip("\n") + "\n" + entry, encoding="utf-8")
    commit = c.repo.commit(
        [NOTES],
        f"Note round {c.view.round}: {c.view.now.verdict}",
        {"Selfevo-Round": str(c.view.round)},
        worktree=tree,
    )
    return {"commit": commit, "entry": c.store.blob(entry)}
