"""stop: the harness, not the model, decides whether the campaign goes on."""

from __future__ import annotations

from selfevo.campaign import Campaign


def run(c: Campaign) -> str:
    """Start the next round, or end the campaign (all rounds done, or the hours are used up)."""
    if c.view.round and not c.view.now.ended:
        return "observe"  # killed after the next round had begun
    limit = c.config.budget.campaign_hours * 3600
    if c.view.round >= c.view.rounds_planned:
        c.emit("campaign.end", {"reason": "rounds"})
        return "end"
    if limit and c.view.active_seconds >= limit:
        c.emit("campaign.end", {"reason": "budget"})
        return "end"
    c.store.append("round.start", {"control": c.view.control_arm}, round_=c.view.round + 1)
    return "observe"
