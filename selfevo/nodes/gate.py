"""gate: protected files first, then the numbers."""

from __future__ import annotations

from typing import Any

from selfevo import arms, gate, guard
from selfevo.campaign import Campaign
from selfevo.config import PROTECTED
from selfevo.gate import SeedScore
from selfevo.views import PrView


def run(c: Campaign) -> str:
    """Emit the verdict with all numbers; then keep or drop."""
    current = c.view.now
    assert current.pr is not None
    pr = c.view.prs[current.pr]
    if current.gate is None:
        c.emit("gate", {"number": pr.number, **_verdict(c, pr)})
    assert current.gate is not None
    return "keep" if current.gate["verdict"] == "accept" else "drop"


def _verdict(c: Campaign, pr: PrView) -> dict[str, Any]:
    problems = integrity(c, pr)
    c.emit("integrity", {"ok": not problems, "problems": problems})
    if problems:
        return _without_numbers("void", f"the score does not count: {problems[0]}")
    parent = arms.parent_id(c.view.control_parent)
    control = [s.score for s in c.view.arm_scores(pr.control_arm, parent)]
    candidate = [s.score for s in c.view.arm_scores(pr.arm, parent)]
    if not candidate:
        job = c.view.arm_jobs(pr.arm)
        why = job[-1].reason if job and job[-1].reason else "no seed could be measured"
        return _without_numbers("indecisive", f"the candidate's runs failed: {why}")
    mixed = evaluators(c, pr, parent)
    if len(mixed) > 1:
        return _without_numbers(
            "void",
            f"the two arms were measured by different evaluators ({', '.join(mixed)}): a suite's "
            "version, field or grader has changed; start a new campaign",
        )
    result = gate.decide(
        control,
        candidate,
        other_arms(c, pr, parent),
        alpha=c.config.gate.alpha,
        rounds=c.view.rounds_planned,
        budget_ratio=budget_ratio(c, pr),
        max_budget_ratio=c.config.gate.max_budget_ratio,
        max_infra_share=c.config.gate.max_infra_share,
    )
    return {
        **result.to_dict(),
        "control_cost": cost(c, pr.control_arm),
        "candidate_cost": cost(c, pr.arm),
    }


def _without_numbers(verdict: str, reason: str) -> dict[str, Any]:
    return {"verdict": verdict, "reason": reason, "candidate_mean": None, "difference": None}


def evaluators(c: Campaign, pr: PrView, parent: str) -> list[str]:
    """What measured the two arms; scores of different suite versions are never compared."""
    scores = [s for arm in (pr.control_arm, pr.arm) for s in c.view.arm_scores(arm, parent)]
    return sorted({s.evaluator for s in scores if s.evaluator})


def other_arms(c: Campaign, pr: PrView, parent: str) -> list[list[SeedScore]]:
    """Seeds of the campaign's arms but the PR's two, each arm and parent apart."""
    groups: dict[tuple[str, str], list[SeedScore]] = {}
    known = evaluators(c, pr, parent)
    for score in c.view.scores.values():
        if (score.arm, score.parent) in ((pr.arm, parent), (pr.control_arm, parent)):
            continue
        if score.evaluator and known and score.evaluator not in known:
            continue
        groups.setdefault((score.arm, score.parent), []).append(score.score)
    return list(groups.values())


def budget_ratio(c: Campaign, pr: PrView) -> float:
    """Allowed budget of the candidate's runs over the control's, from their RUN.yaml files."""
    budgets = []
    for arm in (pr.arm, pr.control_arm):
        job = c.view.arm_jobs(arm)[-1]
        text = (c.arm_folder(arm) / f"{job.id}.yaml").read_text(encoding="utf-8")
        budgets.append(arms.allowed_budget(text))
    return budgets[0].ratio(budgets[1])


def cost(c: Campaign, arm: str, fresh: int | None = None) -> dict[str, float]:
    """What the arm's training runs consumed; printed beside the verdict, never blocking."""
    done = c.view.arm_jobs(arm, fresh=fresh)
    return {
        "seconds": round(sum(float(j.result.get("seconds") or 0) for j in done), 1),
        "tokens": sum(float(j.result.get("tokens") or 0) for j in done),
        "runs": len(done),
    }


def integrity(c: Campaign, pr: PrView) -> list[str]:
    """Protected files and arms, hashed again: the commit, the worktrees, and what was run."""
    manifest = c.view.info["protected"]
    problems = []
    for where, commit in (("the PR", pr.commit), ("the incumbent", c.view.incumbent_head)):
        files: dict[str, bytes | None] = dict.fromkeys(manifest)
        present = set(c.repo.list_files(commit))
        for path in PROTECTED:
            if path in present:
                files[path] = c.repo.read_bytes(commit, path)
        problems += [f"{p} in {where}" for p in guard.tampered(manifest, files)]
    for arm in {pr.arm, pr.control_arm}:
        folder = c.arm_folder(arm)
        found = {"configs/train.yaml": (folder / "train.yaml").read_bytes()}
        scaffold = folder / "scaffold"
        for file in sorted(scaffold.rglob("*")):
            if file.is_file():
                found[f"scaffold/{file.relative_to(scaffold)}"] = file.read_bytes()
        if arms.arm_id(found) != arm:
            problems.append(f"the files of arm {arm} have changed since they were written")
    return problems
