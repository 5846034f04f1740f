"""confirm: a kept change is measured again with fresh seeds, and taken back if that fails."""

from __future__ import annotations

from typing import Any

from selfevo import arms, gate
from selfevo.campaign import Campaign
from selfevo.gate import FRESH
from selfevo.nodes.evaluate import measure_runs
from selfevo.nodes.gate import cost, integrity, other_arms
from selfevo.nodes.launch import train_requests
from selfevo.nodes.wait import train
from selfevo.views import PrView


def run(c: Campaign) -> str:
    """Train and measure both arms on seeds that nothing has used; then confirmed or reverted."""
    current = c.view.now
    assert current.pr is not None
    pr = c.view.prs[current.pr]
    seeds = c.config.gate.confirm_seeds
    if current.confirm_index is None:
        before = sum(r.confirm_index is not None for r in c.view.rounds.values())
        c.emit(
            "confirm.start",
            {"number": pr.number, "index": FRESH + before * seeds, "seeds": seeds},
        )
    assert current.confirm_index is not None
    if current.confirmation is None:
        indices = range(current.confirm_index, current.confirm_index + seeds)
        pairs = (("control", pr.control_arm), ("candidate", pr.arm))
        requests = train_requests(c, pairs, indices, pr.replaced[1])
        train(c, requests)
        measure_runs(c, requests)
        c.emit("confirm", {"number": pr.number, **_verdict(c, pr, current.confirm_index)})
    assert current.confirmation is not None
    if current.confirmation["verdict"] == "failed":
        c.once(
            "pr.revert", f"revert/{pr.number}", {"number": pr.number}, lambda: _revert(c, pr.number)
        )
    return "reflect"


def _verdict(c: Campaign, pr: PrView, first: int) -> dict[str, Any]:
    problems = integrity(c, pr)
    if problems:
        c.emit("integrity", {"ok": False, "problems": problems})
        return _without_numbers(f"the scores do not count: {problems[0]}")
    parent = arms.parent_id(pr.replaced[1])
    control = [s.score for s in c.view.arm_scores(pr.control_arm, parent, first)]
    candidate = [s.score for s in c.view.arm_scores(pr.arm, parent, first)]
    if not candidate:
        return _without_numbers("the fresh runs of the candidate failed")
    verdict, result = gate.confirm(
        control,
        candidate,
        other_arms(c, pr, parent),
        alpha=c.config.gate.confirm_alpha,
        max_infra_share=c.config.gate.max_infra_share,
    )
    return {
        **result.to_dict(),
        "verdict": verdict,
        "control_cost": cost(c, pr.control_arm, first),
        "candidate_cost": cost(c, pr.arm, first),
    }


def _without_numbers(reason: str) -> dict[str, Any]:
    return {
        "verdict": "unconfirmed",
        "reason": reason,
        "candidate_mean": None,
        "difference": None,
    }


def _revert(c: Campaign, number: int) -> dict[str, Any]:
    pr = c.view.prs[number]
    assert pr.merge_commit is not None and pr.confirmation is not None
    found = pr.confirmation
    tree = c.incumbent()
    last = c.repo.log(c.incumbent_branch, limit=1)[0]
    if last.trailers.get("Selfevo-Reverts") == pr.merge_commit:
        return {"commit": last.sha}  # killed after the commit
    p = found["p_better"]
    commit_id = c.repo.revert(
        pr.merge_commit,
        f"Take PR {number} back: {pr.title}\n\nNot better on fresh seeds.",
        {
            "Selfevo-Round": str(c.view.round),
            "Selfevo-Reverts": pr.merge_commit,
            "Selfevo-Gate": f"failed {found['difference']:+.2f} points"
            + ("" if p is None else f" p {p:.2g}"),
            "Selfevo-Cost": _spent(found),
        },
        worktree=tree,
    )
    return {"commit": commit_id}


def _spent(found: dict[str, Any]) -> str:
    costs = found["control_cost"], found["candidate_cost"]
    seconds, tokens = (sum(float(cost[key]) for cost in costs) for key in ("seconds", "tokens"))
    return f"{seconds:.0f} s {tokens:.0f} tokens"
