"""Pull requests: their text, and what people do with them (review, merge into a branch)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError
from agent_tools.git_configs import LabRepo
from selfevo import arms, guard
from selfevo.campaign import Campaign
from selfevo.config import TRAIN_CONFIG
from selfevo.guard import ABSENT, FileChange
from selfevo.memory import clean, confirm_line, evidence_jobs, gate_line, number
from selfevo.views import CampaignView, PrView

MAX_REVISIONS = 2
ANSWERS = ("approve", "reject", "request_changes")
_LETTER = {"added": "A", "deleted": "D", "modified": "M", "type": "T"}


def pr_of(view: CampaignView, pr_number: int) -> PrView:
    """The PR with this number; `UserError` names those that exist."""
    pr = view.prs.get(pr_number)
    if pr is None:
        known = ", ".join(str(n) for n in sorted(view.prs)) or "none yet"
        raise UserError(f"{view.name} has no PR {pr_number}; PRs: {known}")
    return pr


def body(view: CampaignView, pr: PrView, stat: str) -> str:
    """The PR's text in Markdown: hypothesis, change, evidence, cost, risk, reproduce, who."""
    proposal = pr.proposal
    lines = [
        f"# PR {pr.number}: {pr.title}",
        "",
        f"{pr.state} · round {pr.round} · branch `{pr.branch}` · commit `{pr.commit[:12]}` · "
        f"proposed by **{proposal['agent']}**"
        + (f" ({proposal['model']})" if proposal["agent"] == "model" else ""),
        "",
        "## Hypothesis",
        "",
        clean(str(proposal["why"])),
        "",
        "## Change",
        "",
        f"`{proposal['key']}`: {number(proposal['before'])} → {number(proposal['after'])}",
        "",
        stat,
        "",
        "## Evidence",
        "",
        *evidence(view, pr),
        "",
        "## Risk and rollback",
        "",
        "The gate compared this change on held-out competitions only. To take it back, revert the "
        "merge commit; nothing else depends on it.",
        "",
        "## Reproduce",
        "",
        f"`selfevo replay . --campaign {view.name}` shows every step; each arm's RUN.yaml is "
        f"under `runs/{view.name}/arms/`.",
    ]
    for review in pr.said:
        lines += [
            "",
            f"**{str(review['answer']).replace('_', ' ')}**"
            + (f": {clean(str(review['body']))}" if review["body"] else ""),
        ]
    return "\n".join(lines)


def evidence(view: CampaignView, pr: PrView) -> list[str]:
    """Markdown lines: gate, scores by seed, cost, jobs."""
    if pr.gate is None:
        return ["Not measured yet."]
    lines = [gate_line(pr.gate), ""]
    if pr.confirmation is not None:
        lines += [confirm_line(pr.confirmation), ""]
    if pr.gate.get("candidate_mean") is None:
        return lines
    lines += ["| arm | seed | percentile | valid | medals |", "|---|---|---|---|---|"]
    for name, arm in (("control", pr.control_arm), ("candidate", pr.arm)):
        for score in view.arm_scores(arm):
            medals = score.medals
            lines.append(
                f"| {name} | {score.score.seed} | {score.score.score:.1f} | "
                f"{score.valid_share:.0%} | {medals['any_medal']} of {medals['scripts']} |"
            )
    spent = [(n, pr.gate[f"{n}_cost"]) for n in ("control", "candidate")]
    lines += [
        "",
        "Cost: "
        + "; ".join(
            f"{n} {s['seconds']:.0f} s and {s['tokens']:.0f} tokens in {s['runs']} runs"
            for n, s in spent
        )
        + f"; ratio of allowed budgets {pr.gate['budget_ratio']:.2f}.",
    ]
    lines.append("Jobs: " + ", ".join(job.id for job in evidence_jobs(view, pr)) + ".")
    return lines


def stat_text(repo: LabRepo, pr: PrView) -> str:
    """Diff-stat lines of a PR."""
    return "\n".join(
        f"    {path} | +{added} -{removed}"
        for path, (added, removed) in repo.diff_stat(pr.base, pr.commit).items()
    )


def branch_faults(c: Campaign, base: str, commit: str) -> list[str]:
    """What the guard says against the real difference between two commits, and the way there."""
    if not c.repo.is_ancestor(base, commit):
        return [f"is not based on {base[:12]}, the incumbent that it was made from"]
    log = c.repo.log(commit, exclude=base)
    merges = sum(len(one.parents) != 1 for one in log)
    steps = [changes_between(c, one.parents[0], one.sha) for one in log if len(one.parents) == 1]
    train = c.repo.read_file(base, TRAIN_CONFIG)
    tracked = c.repo.list_files(base)
    found = guard.check(changes_between(c, base, commit), train, c.space, tracked)
    if len(steps) > 1 or merges:
        return [*found.reasons, *guard.history_faults(steps, merges)]
    return list(found.reasons)


def changes_between(c: Campaign, base: str, commit: str) -> list[FileChange]:
    """The paths that differ between two commits, as the guard reads them."""
    changes = []
    for change in c.repo.changed_paths(base, commit):
        content = None
        if change.new_mode not in (ABSENT, "160000"):
            content = c.repo.read_bytes(commit, change.path)
        changes.append(
            FileChange(
                change.path, _LETTER[change.status], change.old_mode, change.new_mode, content
            )
        )
    return changes


def answer(c: Campaign, pr_number: int, choice: str, text: str) -> None:
    """Record a person's review of the PR that waits. `UserError` when it cannot be given."""
    import time

    pr = pr_of(c.view, pr_number)
    waiting = c.view.pending_review()
    if waiting is None or waiting.number != pr_number:
        hint = f"PR {waiting.number} waits" if waiting else "no PR waits for a review"
        state = f"{pr.state}, answered already" if pr.reviews else pr.state
        raise UserError(f"PR {pr_number} is {state}; {hint}")
    if choice != "approve" and not text.strip():
        raise UserError(f"`--{choice.replace('_', '-')}` needs a reason: add -b TEXT")
    if choice == "request_changes" and pr.revisions >= MAX_REVISIONS:
        raise UserError(
            f"PR {pr_number} was sent back {MAX_REVISIONS} times already; approve or reject it"
        )
    commit = c.repo.resolve(pr.branch) if c.repo.branch_exists(pr.branch) else pr.commit
    data: dict[str, Any] = {
        "number": pr_number,
        "answer": choice,
        "body": text,
        "commit": commit,
        "ts": time.time(),
        "key": f"answer/{pr_number}/{pr.commit}",
    }
    if commit != pr.commit:  # a person edited the branch: their commits are part of the answer
        if choice == "approve":
            reasons = branch_faults(c, pr.base, commit)
            if reasons:
                raise UserError(f"branch {pr.branch} cannot be approved: {reasons[0]}")
        data["arm"] = arms.arm_id(arms.arm_files(c.repo, commit))
        data["diff"] = c.store.blob(c.repo.diff(pr.base, commit))
    c.emit("review.answer", data, actor="human")


def merge_into(c: Campaign, pr_number: int, branch: str) -> str:
    """Merge a PR's branch into a branch of the user: the only act that moves one.

    The checkout moves only where `branch` is checked out in the lab (it must be clean then). A
    conflict leaves everything as it was. Returns the merge commit.
    """
    pr = pr_of(c.view, pr_number)
    if pr.state in ("rejected", "reverted", "closed"):
        raise UserError(f"PR {pr_number} is {pr.state}; only open or kept PRs are merged")
    if branch.startswith("selfevo/"):
        raise UserError(f"{branch} belongs to the loop; name a branch of your own with --into")
    if not c.repo.branch_exists(branch):
        raise UserError(f"{c.lab} has no branch {branch}; create it with `git branch {branch}`")
    key = f"merge_into/{pr_number}/{branch}"
    done = c.once(
        "pr.merge_into",
        key,
        {"number": pr_number, "into": branch},
        lambda: {"commit": _merge_into(c, pr, branch)},
    )
    return str(done["commit"])


def _merge_into(c: Campaign, pr: PrView, branch: str) -> str:
    message = f"Merge selfevo PR {pr.number}: {pr.title}"
    trailers = {"Selfevo-Campaign": c.name, "Selfevo-Round": str(pr.round)}

    def merge(tree: Path) -> str:
        return c.repo.merge(pr.commit, message, trailers, worktree=tree)

    if c.repo.head().branch == branch:
        return merge(c.lab)
    return _in_worktree(c, branch, merge)


def _in_worktree(c: Campaign, branch: str, act: Callable[[Path], str]) -> str:
    folder = c.folder / "worktrees" / "merge-into"
    c.repo.worktree_remove(folder)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        return act(c.repo.worktree_add(folder, branch))
    finally:
        c.repo.worktree_remove(folder)
