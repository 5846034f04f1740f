"""What `selfevo run` prints when it ends. Pure, apart from reading diffs from the blobs."""

from __future__ import annotations

import shlex
from pathlib import Path

from selfevo import text
from selfevo.store import read_blob
from selfevo.views import CampaignView


def lines(view: CampaignView, folder: Path, code: int) -> list[str]:
    """Rounds, medals before and after, where the time went, the report, what to try next."""
    found = [""]
    for number in sorted(view.rounds):
        if number == 0:
            continue
        current = view.rounds[number]
        diff = ""
        if current.pr is not None:
            diff = read_blob(folder, view.prs[current.pr].diff).decode("utf-8", "replace")
        found += [*text.round_lines(view, current, diff), ""]
    found += text.medal_change(view)
    found += ["", "where the time went", *(f"  {line}" for line in text.time_table(view))]
    found += ["", f"report  {folder / 'report.html'}", "", "try next"]
    found += [f"  {command}" for command in next_commands(view, folder, code)]
    return found


def next_commands(view: CampaignView, folder: Path, code: int) -> list[str]:
    """Three commands that make sense now."""
    lab = shlex.quote(str(folder.parent.parent))
    if code == 4 and view.now.pr is not None:
        number = view.now.pr
        return [
            f"selfevo pr view {number} {lab}",
            f"selfevo pr review {number} {lab} --approve",
            f"selfevo resume {lab}",
        ]
    if view.state == "stopped":
        return [f"selfevo resume {lab}", f"selfevo status {lab}", f"selfevo replay {lab}"]
    commands = [f"selfevo replay {lab} --campaign {view.name}"]
    merged = [pr.number for pr in view.prs.values() if pr.state == "merged"]
    if merged:
        branch = view.info["user_branch"]
        commands.append(f"selfevo pr merge {merged[-1]} {lab} --into {branch}")
    elif view.prs:
        commands.append(f"selfevo pr view {max(view.prs)} {lab}")
    else:
        commands.append(f"selfevo medals {lab}")
    commands.append(f"selfevo run {lab} --review always --seed {view.info['seed'] + 1}")
    return commands
