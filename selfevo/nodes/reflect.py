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
    tree = c.incumbent()
    archive = f"memory/{c.name}-until-r{c.view.round}.md"
    there = c.repo.list_files(c.incumbent_branch, NOTES)
    notes = c.repo.read_file(c.incumbent_branch, NOTES) if NOTES in there else "# Notes\n"
    files = memory.add_entry(notes, entry, archive)
    for path, text in files.items():
        (tree / path).parent.mkdir(exist_ok=True)
        (tree / path).write_text(text, encoding="utf-8")
    commit = c.repo.commit(
        list(files),
        f"Note round {c.view.round}: {c.view.now.verdict}",
        {"Selfevo-Round": str(c.view.round)},
        worktree=tree,
    )
    return {"commit": commit, "entry": c.store.blob(entry)}
