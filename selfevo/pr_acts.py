"""What a person does to a PR beside answering its review: comment, edit, close; and its checks.

Every act is one event of actor `human`, written under the lab's lock; it counts as an intervention,
and its words reach the agent's next prompt as a review's do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from agent_tools.errors import UserError
from agent_tools.git_configs import edit_text
from selfevo import arms, proposals
from selfevo.campaign import Campaign
from selfevo.config import TRAIN_CONFIG
from selfevo.memory import clean, confirm_line, gate_line, number
from selfevo.proposals import pr_of
from selfevo.views import CampaignView, PrView

State = Literal["passed", "failed", "pending"]
MAX_TITLE = 120
OVER = ("merged", "rejected", "reverted", "closed")


# ------------------------------------------------------------------ checks


def checks(view: CampaignView, pr: PrView) -> list[dict[str, Any]]:
    """Guard, review, integrity, gate and confirmation of a PR: name, state, detail, numbers.

    An indecisive gate has failed: it did not say yes. What the lab does not ask for, and what a PR
    that ended before never reached, is left out.
    """
    current = view.rounds[pr.round]
    over = pr.state in OVER
    found = [_guard(current.guard or {}, pr)]
    if view.info["review"] == "always":
        found.append(_review(pr, over))
    if pr.gate is not None:
        untouched = pr.gate["verdict"] != "void"
        detail = "protected files and arms are as they were"
        found.append(
            _check("integrity", "passed", detail)
            if untouched
            else _check("integrity", "failed", "; ".join(current.integrity))
        )
        state: State = "passed" if pr.gate["verdict"] == "accept" else "failed"
        found.append(_check("gate", state, gate_line(pr.gate), pr.gate))
    elif not over:
        found.append(_check("gate", "pending", "not measured yet"))
    if pr.confirmation is not None:
        state = "passed" if pr.confirmation["verdict"] == "confirmed" else "failed"
        found.append(_check("confirmation", state, confirm_line(pr.confirmation), pr.confirmation))
    elif current.confirm_index is not None:
        found.append(_check("confirmation", "pending", "fresh seeds are being measured"))
    return found


def _guard(record: dict[str, Any], pr: PrView) -> dict[str, Any]:
    if not record:  # sent back by a review: the next commit is to come
        return _check("guard", "pending", "waits for another commit")
    if not record["ok"]:
        return _check("guard", "failed", "; ".join(record["reasons"]), record)
    before, after = (number(pr.proposal[side]) for side in ("before", "after"))
    detail = f"inside the search space: {pr.proposal['key']} {before} → {after}"
    return _check("guard", "passed", detail, record)


def _review(pr: PrView, over: bool) -> dict[str, Any]:
    last = str(pr.reviews[-1]["answer"]) if pr.reviews else ""
    if last == "approve":
        return _check("review", "passed", "approved")
    if over:
        return _check("review", "failed", last.replace("_", " ") or "closed without an answer")
    return _check("review", "pending", last.replace("_", " ") or "waits for a person")


def _check(
    name: str, state: State, detail: str, numbers: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"name": name, "state": state, "detail": clean(detail), "numbers": numbers or {}}


def exit_code(view: CampaignView, pr: PrView, rows: list[dict[str, Any]]) -> int:
    """0 all passed · 4 nothing failed and the PR waits for a person · 1 otherwise."""
    states = {row["state"] for row in rows}
    if states == {"passed"}:
        return 0
    waiting = view.pending_review()
    waits = waiting is not None and waiting.number == pr.number
    return 4 if waits and "failed" not in states else 1


# ------------------------------------------------------------------ acts


def comment(c: Campaign, pr_number: int, body: str) -> None:
    """Say something about a PR, in whatever state it is; decides nothing."""
    pr = pr_of(c.view, pr_number)
    if not body.strip():
        raise UserError("a comment needs words: add -b TEXT")
    c.emit("pr.comment", {"number": pr_number, "body": body, "commit": pr.commit}, actor="human")


def close(c: Campaign, pr_number: int, why: str) -> None:
    """Close a PR without running it, or one that the gate left open."""
    pr = pr_of(c.view, pr_number)
    if not why.strip():
        raise UserError("closing needs a reason: add -b TEXT")
    waiting = c.view.pending_review()
    if waiting is not None and waiting.number == pr_number:
        proposals.answer(c, pr_number, "reject", why)  # the round ends with the next resume
        return
    if pr.state in OVER:
        hint = "; revert its merge commit to take it back" if pr.state == "merged" else ""
        raise UserError(f"PR {pr_number} is {pr.state} already{hint}")
    if pr.gate is None:
        raise UserError(
            f"PR {pr_number} is under way in round {pr.round}; `selfevo resume` measures it first"
        )
    c.emit("pr.close", {"number": pr_number, "state": "closed", "why": why}, actor="human")


def edit(c: Campaign, pr_number: int, value: str | None, title: str | None) -> None:
    """Change the proposed value or the title of the PR that waits; a value is a new commit.

    The guard judges the whole difference again. Raises `UserError` with its first reason.
    """
    pr = pr_of(c.view, pr_number)
    waiting = c.view.pending_review()
    if waiting is None or waiting.number != pr_number:
        raise UserError(
            f"PR {pr_number} is {pr.state}; only a PR that waits for a review is edited"
        )
    if value is None and title is None:
        raise UserError("nothing to edit: give --value NUMBER, --title TEXT, or both")
    proposal = dict(pr.proposal)
    data: dict[str, Any] = {"number": pr_number, "commit": pr.commit, "arm": pr.arm}
    data["diff"] = pr.diff
    said = []
    if value is not None:
        said.append(f"{proposal['key']} {number(proposal['after'])} → {value}")
        data |= _edited(c, pr, value)
        proposal |= {"after": data.pop("after"), "direction": data.pop("direction")}
        word = "raise" if proposal["direction"] == "increase" else "lower"
        proposal["title"] = (
            f"{word} {proposal['key']} from {number(proposal['before'])} to "
            f"{number(proposal['after'])}"
        )
    if title is not None:
        if not clean(title):
            raise UserError("--title is empty: give some words")
        proposal["title"] = clean(title, MAX_TITLE)
        said.append(f"title: {proposal['title']}")
    data |= {"title": proposal["title"], "proposal": proposal, "body": "; ".join(said)}
    c.emit("pr.edit", data, actor="human")


def _edited(c: Campaign, pr: PrView, value: str) -> dict[str, Any]:
    """Commit the PR's key at another value on its branch; the fields of the event."""
    key, before = pr.proposal["key"], pr.proposal["before"]
    after = _number(value, key)
    if not c.repo.branch_exists(pr.branch):
        raise UserError(
            f"branch {pr.branch} is gone; `selfevo pr close {pr.number}` ends the round"
        )
    tree = c.worktree(c.pr_tree(pr.branch), pr.branch)
    if c.repo.is_dirty(worktree=tree, tracked_only=True):
        raise UserError(f"{tree} has uncommitted changes; commit them or take them back")
    head = c.repo.resolve(pr.branch)
    text, made = edit_text(c.repo.read_file(head, TRAIN_CONFIG), key, after, Path(TRAIN_CONFIG))
    assert isinstance(made.after, (int, float))
    (tree / TRAIN_CONFIG).write_text(text, encoding="utf-8")
    commit = c.repo.commit(
        [TRAIN_CONFIG],
        f"Set {key} to {number(made.after)}",
        {"Selfevo-Round": str(pr.round), "Selfevo-Actor": "human"},
        worktree=tree,
    )
    reasons = proposals.branch_faults(c, pr.base, commit)
    if reasons:
        c.repo.reset(head, worktree=tree)
        raise UserError(f"the guard refuses this edit: {reasons[0]}")
    return {
        "commit": commit,
        "arm": arms.arm_id(arms.arm_files(c.repo, commit)),
        "diff": c.store.blob(c.repo.diff(pr.base, commit)),
        "after": made.after,
        "direction": "increase" if made.after > before else "decrease",
    }


def _number(text: str, key: str) -> int | float:
    """A number as a person writes it; whole ones stay whole."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--value {clean(text, 40)}: {key} needs a number") from None
