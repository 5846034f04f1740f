"""guard: code decides whether the proposal stays inside what the lab allows."""

from __future__ import annotations

from selfevo import guard
from selfevo.campaign import Campaign, trainer_fault
from selfevo.config import TRAIN_CONFIG
from selfevo.guard import REGULAR, FileChange
from selfevo.memory import clean
from selfevo.nodes.diagnose import strike


def run(c: Campaign) -> str:
    """Check the planned change, then the trainer's own dry run; refused → back to diagnose."""
    current = c.view.now
    assert current.proposal is not None
    content = c.store.read(current.proposal["text"])
    change = FileChange(TRAIN_CONFIG, "M", REGULAR, REGULAR, content)
    tracked = c.repo.list_files(c.view.incumbent_head)
    result = guard.check([change], c.control_train(), c.space, tracked)
    reasons = list(result.reasons)
    if result.ok:
        check = c.folder / "check"
        check.mkdir(exist_ok=True)
        fault = trainer_fault(
            check, content.decode("utf-8"), c.config, c.view.control_parent, c.commands
        )
        if fault:
            reasons.append(f"the trainer refuses it: {clean(fault, 160)}")
    c.emit(
        "guard",
        {
            "ok": not reasons,
            "reasons": reasons,
            "edits": [{"key": e.key, "before": e.before, "after": e.after} for e in result.edits],
        },
    )
    if reasons:
        answer = f"error: refused: {reasons[0]}"
        strike(c, f"guard: {reasons[0]}", answer, current.proposal["call_id"])
        return "diagnose"
    return "open_pr"
