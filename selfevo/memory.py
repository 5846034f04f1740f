"""What a campaign has learnt: entries of memory/NOTES.md and the lines of the next prompt. Pure."""

from __future__ import annotations

import unicodedata
from typing import Any

from selfevo.agent_prompts import memory_line
from selfevo.config import NOTES
from selfevo.views import CampaignView, PrView, RoundView

PROMPT_LINES = 6
NOTES_LIMIT = 32_000  # characters; then the older entries move to a file of their own
NOTES_KEPT = 8_000
REVIEW_LINES = 3
REVIEW_CHARS = 200


def clean(text: str, limit: int | None = None) -> str:
    """Text of others for one line of ours: no control characters, single spaces, bounded."""
    kept = "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs") else " " for c in text
    )
    line = " ".join(kept.split())
    if limit is not None and len(line) > limit:
        return line[: limit - 1] + "…"
    return line


def number(value: Any) -> str:
    """A config value for people: short, exact."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def round_line(view: CampaignView, current: RoundView) -> str:
    """One round for the next prompt; empty when nothing was proposed."""
    pr = view.prs.get(current.pr) if current.pr is not None else None
    if pr is None:
        return f"r{current.number} no proposal" if current.verdict else ""
    shown = current.confirmation or current.gate
    diff = shown["difference"] if shown else None
    verdict = current.verdict
    return memory_line(current.number, pr.proposal["key"], pr.proposal["direction"], verdict, diff)


def prompt_memory(view: CampaignView) -> list[str]:
    """The last rounds' lines, oldest first."""
    lines = [str(entry["line"]) for entry in view.memory if entry.get("line")]
    return lines[-PROMPT_LINES:]


def prompt_reviews(view: CampaignView) -> list[str]:
    """The last reviews that said something, oldest first."""
    found: list[tuple[float, str]] = []
    for pr in view.prs.values():
        for review in pr.said:
            if review["body"]:
                words = str(review["answer"]).replace("_", " ")
                text = clean(str(review["body"]), REVIEW_CHARS)
                found.append((review["ts"], f"r{pr.round} {words} : {text}"))
    return [line for _, line in sorted(found)][-REVIEW_LINES:]


def tried(view: CampaignView) -> list[tuple[str, str]]:
    """(key, direction) of every proposal since the incumbent last changed, whatever its verdict."""
    pairs: list[tuple[str, str]] = []
    for number_ in sorted(view.prs):
        pr = view.prs[number_]
        if pr.state == "merged":
            pairs.clear()
        else:
            pairs.append((pr.proposal["key"], pr.proposal["direction"]))
    return pairs


def entry_text(view: CampaignView, current: RoundView) -> str:
    """The entry of one round for NOTES.md, with evidence ids (jobs and event numbers)."""
    pr = view.prs.get(current.pr) if current.pr is not None else None
    if pr is None:
        why = clean(current.note, 300) or "no reason given"
        return f"\n## {view.name} r{current.number}: no proposal\n\n- {why}\n"
    proposal = pr.proposal
    lines = [
        f"\n## {view.name} r{current.number}: {proposal['key']} "
        f"{number(proposal['before'])} → {number(proposal['after'])}: {current.verdict}\n",
        f"- why ({proposal['agent']}): {clean(proposal['why'], 300)}",
    ]
    if current.gate:
        lines.append("- " + gate_line(current.gate))
    if current.confirmation:
        lines.append("- " + confirm_line(current.confirmation))
    lines += [
        f"- review ({review['answer']}): {clean(review['body'], 300)}"
        for review in pr.said
        if review["body"]
    ]
    evidence = [job.id for job in evidence_jobs(view, pr)]
    if current.confirm_index is not None:
        for arm in (pr.control_arm, pr.arm):
            evidence += [job.id for job in view.arm_jobs(arm, fresh=current.confirm_index)]
    if evidence:
        lines.append("- evidence: " + ", ".join(evidence))
    return "\n".join(lines) + "\n"


def add_entry(notes: str, entry: str, archive: str) -> dict[str, str]:
    """Path → new content of the memory's files, with `entry` at the end of NOTES.md.

    Git keeps every version of a file whole, so a file that only ever grows would cost a campaign
    the square of its rounds. Above `NOTES_LIMIT` the older entries move to the new file `archive`.
    """
    if entry in notes:
        return {NOTES: notes}
    notes = notes.rstrip("\n") + "\n" + entry
    head, *entries = notes.split("\n## ")
    if len(notes) <= NOTES_LIMIT or len(entries) < 2:
        return {NOTES: notes}
    kept: list[str] = [entries.pop()]
    while entries and sum(map(len, kept)) + len(entries[-1]) <= NOTES_KEPT:
        kept.insert(0, entries.pop())
    line = f"(Earlier entries: {archive})"
    head = "\n".join(x for x in head.split("\n") if not x.startswith("(Earlier entries: "))
    return {
        archive: "# Notes\n\n" + "\n".join(f"## {text}" for text in entries).strip() + "\n",
        NOTES: "\n## ".join([head.rstrip("\n") + f"\n\n{line}\n", *kept]),
    }


def evidence_jobs(view: CampaignView, pr: PrView) -> list[Any]:
    """Training jobs of both arms of a PR, control first."""
    return [*view.arm_jobs(pr.control_arm), *view.arm_jobs(pr.arm)]


def gate_line(gate: dict[str, Any]) -> str:
    """The gate's numbers in one line."""
    return _numbers_line("gate", "α a round", gate)


def confirm_line(confirmation: dict[str, Any]) -> str:
    """A confirmation's numbers in one line."""
    return _numbers_line("fresh seeds", "α", confirmation)


def _numbers_line(what: str, level: str, gate: dict[str, Any]) -> str:
    if gate.get("candidate_mean") is None:
        return f"{what}: {gate['verdict']}: {gate['reason']}"
    p = gate["p_better"]
    smallest = gate["smallest_effect"]
    return (
        f"{what}: {gate['control_mean']:.1f} → {gate['candidate_mean']:.1f} "
        f"({gate['difference']:+.1f} points), "
        f"p {'–' if p is None else f'{p:.2g}'}, df {gate['df']}, "
        f"{level} {gate['alpha_round']:.3g}, smallest detectable effect "
        f"{'–' if smallest is None else f'{smallest:.1f}'}: {gate['verdict']}"
    )
