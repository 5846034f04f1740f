"""launch: write the arms and submit the first training jobs."""

from __future__ import annotations

from collections.abc import Sequence

from selfevo import arms, jobs, proposals
from selfevo.arms import RunRequest
from selfevo.campaign import Campaign


def run(c: Campaign) -> str:
    """Round 0 trains the start itself; later rounds train candidate and, if not cached, control.

    The PR's real difference is checked once more, as it stands in git: a person may have added
    commits. What the guard refuses here is closed without being run.
    """
    current = c.view.now
    if current.pr is not None:
        pr = c.view.prs[current.pr]
        reasons = proposals.branch_faults(c, pr.base, pr.commit)
        if reasons:
            c.emit("guard", {"ok": False, "reasons": reasons, "edits": []})
            c.emit(
                "pr.close",
                {"number": pr.number, "state": "rejected", "verdict": "refused", "why": reasons[0]},
            )
            return "drop"
        c.export_arm(pr.commit)
    c.export_arm(c.view.control_commit)
    jobs.pump(c, training(c))
    return "wait"


def pairs(c: Campaign) -> Sequence[tuple[str, str]]:
    """(role, arm) of this round."""
    current = c.view.now
    found = [("control", c.view.control_arm)]
    if current.pr is not None:
        found.append(("candidate", c.view.prs[current.pr].arm))
    return found


def seed_indices(c: Campaign) -> list[int]:
    """Train seed indices of this round.

    An edit that is tried again after an indecisive verdict gets fresh seeds; the gate then pools
    them with the earlier ones.
    """
    n = c.evaluation.train_seeds
    current = c.view.now
    attempt = 0
    if current.pr is not None:
        arm = c.view.prs[current.pr].arm
        attempt = sum(
            1
            for pr in c.view.prs.values()
            if pr.number < current.pr
            and pr.arm == arm
            and pr.gate is not None
            and pr.control_arm == c.view.control_arm
            and pr.gate["verdict"] == "indecisive"
        )
    return list(range(attempt * n, (attempt + 1) * n))


def training(c: Campaign) -> list[RunRequest]:
    """The training runs that this round needs."""
    return train_requests(c, pairs(c), seed_indices(c), c.view.control_parent)


def train_requests(
    c: Campaign, arms_: Sequence[tuple[str, str]], indices: Sequence[int], parent: str
) -> list[RunRequest]:
    """Training runs of (role, arm) × seed indices from a parent checkpoint."""
    return arms.requests_for(
        arms_,
        indices,
        parent=parent,
        budget=c.budget_id,
        campaign_seed=c.campaign_seed,
    )
