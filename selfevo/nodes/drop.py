"""drop: the incumbent stays. Rejected PRs are closed; an indecisive one stays open."""

from __future__ import annotations

from selfevo.campaign import Campaign


def run(c: Campaign) -> str:
    """Close or leave the PR; its branch stays either way, its worktree goes."""
    current = c.view.now
    assert current.pr is not None
    pr = c.view.prs[current.pr]
    if current.gate is None and not current.verdict:  # a person rejected it before any run
        why = pr.reviews[-1]["body"] if pr.reviews else ""
        c.emit(
            "pr.close",
            {"number": pr.number, "state": "rejected", "verdict": "rejected_by_review", "why": why},
        )
    elif (
        current.gate is not None
        and current.gate["verdict"] in ("reject", "void")
        and pr.state != "rejected"
    ):
        c.emit("pr.close", {"number": pr.number, "state": "rejected"})
    c.repo.worktree_remove(c.pr_tree(pr.branch))
    return "reflect"
