"""propose: turn the agent's decision into one concrete edit of configs/train.yaml."""

from __future__ import annotations

from pathlib import Path

from agent_tools.errors import UserError
from agent_tools.git_configs import edit_text
from selfevo.campaign import Campaign
from selfevo.config import TRAIN_CONFIG, one_step
from selfevo.memory import clean, number
from selfevo.nodes.diagnose import strike


def run(c: Campaign) -> str:
    """Compute value and new text; an impossible edit is a strike and goes back to diagnose."""
    current = c.view.now
    if current.proposal is not None:
        return "guard"
    assert current.decision is not None
    call_id = current.decision["call_id"] if c.config.agent.kind == "model" else ""
    arguments = current.decision["arguments"]
    key, direction = arguments["key"], arguments["direction"]
    before = c.control_values()[key]
    after = _value(c, key, direction, before, arguments.get("value"))
    problem = _problem(c, key, direction, before, after)
    text = ""
    if problem is None:
        try:
            text, edit = edit_text(c.control_train(), key, after, Path(TRAIN_CONFIG))
            after = edit.after  # type: ignore[assignment]
        except UserError as error:
            problem = clean(str(error), 160)
    if problem is not None:
        strike(c, f"{key} {direction}: {problem}", f"error: {problem}", call_id)
        return "diagnose"
    word = "raise" if direction == "increase" else "lower"
    c.emit(
        "proposal",
        {
            "agent": c.config.agent.kind,
            "model": c.config.agent.model,
            "key": key,
            "direction": direction,
            "before": before,
            "after": after,
            "why": clean(str(arguments["why"]), 300),
            "call_id": call_id,
            "text": c.store.blob(text),
            "title": f"{word} {key} from {number(before)} to {number(after)}",
            "slug": f"{word}-{key.replace('.', '-').replace('_', '-')}",
        },
        actor="agent",
    )
    return "guard"


def _value(
    c: Campaign, key: str, direction: str, before: float, value: float | None
) -> float | int:
    """The agent's own value, or one largest step when it names none."""
    spec = c.space.keys[key]
    if value is None:
        return one_step(spec, before, direction)
    if spec.type != "float" and float(value).is_integer():
        return int(value)
    return value


def _problem(
    c: Campaign, key: str, direction: str, before: float, after: float | int
) -> str | None:
    if after == before:
        return f"{key} cannot {direction} any further"
    if (after > before) != (direction == "increase"):
        return f"the value {number(after)} does not {direction} {key}"
    for pr in c.view.prs.values():
        same = (
            pr.proposal["key"] == key
            and pr.proposal["after"] == after
            and pr.control_arm == c.view.control_arm
        )
        closed = pr.state == "closed" and any(said["answer"] == "close" for said in pr.remarks)
        answered = closed or pr.state in ("rejected", "reverted")
        if same and (answered or pr.number == c.view.now.pr):
            return f"this edit was answered in round {pr.round} , try another"
    return None
