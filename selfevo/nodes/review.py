"""review: a person's answer decides, where the lab asks for one. This node only looks."""

from __future__ import annotations

from selfevo.campaign import Campaign

WAIT = "wait for review"  # the graph interrupts: the process leaves with exit code 4


def run(c: Campaign) -> str:
    """launch (approved, or policy auto), drop (rejected), diagnose (changes), or WAIT."""
    if c.config.review == "auto":
        return "launch"
    number = c.view.now.pr
    assert number is not None
    pr = c.view.prs[number]
    if pr.state == "changes_requested":
        return "diagnose"
    answer = pr.answered
    if answer is None:
        return WAIT
    return "launch" if answer == "approve" else "drop"
