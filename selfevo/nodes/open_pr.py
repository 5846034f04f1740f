"""open_pr: the proposal as a commit on its own branch, in its own worktree."""

from __future__ import annotations

from typing import Any

from selfevo import arms
from selfevo.campaign import Campaign
from selfevo.config import TRAIN_CONFIG


def run(c: Campaign) -> str:
    """Open the round's PR, or add a commit to it after a review asked for changes."""
    current = c.view.now
    proposal = current.proposal
    assert proposal is not None
    if current.pr is not None:
        pr = c.view.prs[current.pr]
        number, branch, base, revision = pr.number, pr.branch, pr.base, pr.revisions
        start = pr.commit
    else:
        number, revision = len(c.view.prs) + 1, 0
        base = start = c.view.incumbent_head
        branch = f"selfevo/{c.name}/r{current.number}-{proposal['slug']}"
    key = f"pr/{number}/{revision}"
    if key in c.view.intents:  # killed before the outcome: the incumbent may not move meanwhile
        base = c.view.intents[key]["base"]
        start = base if c.view.now.pr is None else start
    data = {
        "number": number,
        "branch": branch,
        "base": base,
        "title": proposal["title"],
        "proposal": {k: v for k, v in proposal.items() if k != "call_id"},
    }
    c.once("pr.open", key, data, lambda: _commit(c, branch, base, start, proposal))
    if c.config.review == "always":
        commit = c.view.prs[number].commit
        review = f"review/{number}/{commit}"
        if review not in c.view.outcomes:
            c.emit("review.request", {"key": review, "number": number, "commit": commit})
    return "review"


def _commit(
    c: Campaign, branch: str, base: str, start: str, proposal: dict[str, Any]
) -> dict[str, Any]:
    if not c.repo.branch_exists(branch):
        c.repo.create_branch(branch, start)
    tree = c.worktree(c.pr_tree(branch), branch)
    (tree / TRAIN_CONFIG).write_bytes(c.store.read(proposal["text"]))
    commit = c.repo.commit(
        [TRAIN_CONFIG],
        f"{proposal['title']}\n\n{proposal['why']}",
        {"Selfevo-Round": str(c.view.round), "Selfevo-Agent": str(proposal["agent"])},
        worktree=tree,
    )
    return {
        "commit": commit,
        "arm": arms.arm_id(arms.arm_files(c.repo, commit)),
        "diff": c.store.blob(c.repo.diff(base, commit)),
    }
