"""keep: the accepted PR is merged into the incumbent; its runs are the next control."""

from __future__ import annotations

from typing import Any

from selfevo.campaign import Campaign
from selfevo.jobs import trained_checkpoint


def run(c: Campaign) -> str:
    """Merge commit with trailers, exactly once; then confirm, where the lab asks for it."""
    current = c.view.now
    assert current.pr is not None and current.gate is not None
    pr = c.view.prs[current.pr]
    c.once("pr.merge", f"merge/{pr.number}", {"number": pr.number}, lambda: _merge(c, pr.number))
    c.repo.worktree_remove(c.pr_tree(pr.branch))
    return "confirm" if c.config.gate.confirm_seeds else "reflect"


def _merge(c: Campaign, number: int) -> dict[str, Any]:
    pr = c.view.prs[number]
    assert pr.gate is not None
    tree = c.incumbent()
    gate, spent = pr.gate, pr.gate["candidate_cost"]
    commit = c.repo.merge(
        pr.commit,  # what was measured, wherever its branch is now
        f"Keep PR {number}: {pr.title}",
        {
            "Selfevo-Round": str(pr.round),
            "Selfevo-Gate": f"accept {gate['difference']:+.2f} points p {gate['p_better']:.2g}",
            "Selfevo-Cost": f"{spent['seconds']:.0f} s {spent['tokens']:.0f} tokens",
        },
        worktree=tree,
    )
    parent = c.view.control_parent
    if c.config.gate.parent == "incumbent":  # always the first seed's, never the better one
        first = c.view.arm_jobs(pr.arm)[0]
        parent = str(trained_checkpoint(c, pr.arm, first.parent, first.index))
    return {"commit": commit, "parent": parent}
