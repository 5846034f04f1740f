"""Words for people: live lines, tables, the closing summary. Pure functions of events and views.

Everything that a model, a job or a person wrote passes through `clean`, so no control character
reaches a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from selfevo.events import Event
from selfevo.medals import MedalRow, before_after, medal_rows
from selfevo.memory import clean, confirm_line, gate_line, number
from selfevo.views import CampaignView, RoundView

BARS = "▁▂▃▄▅▆▇█"

VERDICT_WORDS = {
    "accept": "accepted and kept",
    "reject": "rejected: worse than the incumbent",
    "indecisive": "indecisive: the incumbent stays, the PR stays open",
    "void": "void: a protected file was changed",
    "no_proposal": "no proposal",
    "rejected_by_review": "rejected by the reviewer",
    "refused": "refused by the guard",
    "reverted": "kept, then taken back: not better on fresh seeds",
}


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Bars of equal buckets' means, from the least to the largest value."""
    if not values:
        return ""
    n = min(width, len(values))
    means = []
    for i in range(n):
        part = values[i * len(values) // n : (i + 1) * len(values) // n]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[min(7, int((v - low) / span * 7.999))] for v in means)


def seconds(value: float) -> str:
    """A duration for people."""
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{int(value) // 60} min {int(value) % 60:02d} s"


def count(n: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Aligned columns, two spaces apart; columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


# ------------------------------------------------------------------ live lines


def live(event: Event, view: CampaignView) -> list[str]:
    """What a running loop tells about an event that has just been folded into `view`."""
    teller = _LIVE.get(event.kind)
    return (
        [
            clean(line) if not line.startswith(" ") else _indented(line)
            for line in teller(event, view)
        ]
        if teller
        else []
    )


def _indented(line: str) -> str:
    body = line.lstrip(" ")
    return " " * (len(line) - len(body)) + clean(body)


def _start(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    who = f"{data['agent']} ({data['model']})" if data["agent"] == "model" else data["agent"]
    return [
        f"campaign {event.campaign}: {count(data['rounds'], 'round')}, {data['train_seeds']} train "
        f"seeds an arm, agent {who}, review {data['review']}, suite {data['suite']}",
        f"branch {data['branch']} from {data['commit'][:12]} of {data['user_branch']}",
        "round 0: the start, as it is",
    ]


def _session(event: Event, view: CampaignView) -> list[str]:
    if view.sessions < 2 or view.state == "done":
        return []
    return [f"resumed: round {view.round}, {view.phase}"]


def _submit(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    what = "train" if data["kind"] == "train" else "evaluate"
    return [f"  {what} {data['job']} (seed {data['seed']}, arm {data['arm']})"]


def _job_done(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    if data["kind"] == "eval" and data["state"] == "done":
        return []
    spent = data["result"].get("seconds")
    tail = f" in {seconds(float(spent))}" if spent else ""
    why = f": {data['reason']}" if data["reason"] else ""
    detail = f" ({data['detail']})" if data.get("detail") else ""
    return [f"  {data['job']} {data['state']}{tail}{why}{detail}"]


def _scores(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    if data["diverged"]:
        return [f"  {data['role']} seed {data['seed']}: diverged, score 0"]
    medals = data["medals"]
    infra = f", {data['infra']} lost to the machine" if data["infra"] else ""
    return [
        f"  {data['job']}: percentile {data['score']:.1f}, valid {data['valid_share']:.0%}, "
        f"{medals['any_medal']} of {medals['scripts']} scripts with a medal{infra}"
    ]


def _digest(event: Event, view: CampaignView) -> list[str]:
    record = view.rounds[event.round].digests[event.data["run"]]
    names = [f["name"] for f in record["findings"]]
    return [
        f"  log of {record['run']} ({record['source']}): "
        + (", ".join(names) if names else "nothing stands out")
    ]


def call_text(data: Any) -> str:
    """A tool call as `name(argument=value, …)`."""
    inner = ", ".join(f"{k}={number(v)}" for k, v in data["arguments"].items())
    return clean(f"{data['name']}({inner})", 300)


def _call(event: Event, view: CampaignView) -> list[str]:
    return [f"  agent: {call_text(event.data)}"]


def _strike(event: Event, view: CampaignView) -> list[str]:
    count = view.rounds[event.round].strikes
    return [f"  failed call {count} of 3: {event.data['reason']}"]


def _proposal(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    return [f"  proposal ({data['agent']}): {data['title']}: {data['why']}"]


def _guard(event: Event, view: CampaignView) -> list[str]:
    if event.data["ok"]:
        return ["  guard: inside the allowed paths, keys, ranges and steps"]
    return [f"  guard refuses: {event.data['reasons'][0]}"]


def _pr_open(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    return [f"  PR {data['number']}: commit {data['commit'][:12]} on {data['branch']}"]


def _review_request(event: Event, view: CampaignView) -> list[str]:
    n = event.data["number"]
    return [
        f"  PR {n} waits for a review: selfevo pr review {n} --approve | --reject -b TEXT | "
        "--request-changes -b TEXT"
    ]


def _review_answer(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    text = f": {data['body']}" if data["body"] else ""
    return [f"  review of PR {data['number']}: {data['answer'].replace('_', ' ')}{text}"]


def _remark(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    word = {"pr.comment": "comment on", "pr.edit": "edit of", "pr.close": "closed:"}[event.kind]
    if event.kind == "pr.close" and event.actor != "human":
        return []
    said = data["why"] if event.kind == "pr.close" else data["body"]
    return [f"  {word} PR {data['number']}: {said}"]


def _stopped(event: Event, view: CampaignView) -> list[str]:
    jobs = ", ".join(event.data["jobs"])
    return ["stopped by request" + (f"; {jobs} cancelled, state saved" if jobs else "")]


def _gate(event: Event, view: CampaignView) -> list[str]:
    return [f"  {gate_line(dict(event.data))}", f"  because: {event.data['reason']}"]


def _integrity(event: Event, view: CampaignView) -> list[str]:
    return [f"  tampering: {problem}" for problem in event.data["problems"]]


def _merge(event: Event, view: CampaignView) -> list[str]:
    return [f"  PR {event.data['number']} kept: merged as {event.data['commit'][:12]}"]


def _confirm_start(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    return [f"  confirming PR {data['number']} with {data['seeds']} fresh seeds an arm"]


def _confirm(event: Event, view: CampaignView) -> list[str]:
    return [f"  {confirm_line(dict(event.data))}", f"  because: {event.data['reason']}"]


def _revert(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    return [f"  PR {data['number']} taken back: reverted as {data['commit'][:12]}"]


def _restored(event: Event, view: CampaignView) -> list[str]:
    data = event.data
    return [
        f"  {data['branch']} was moved by somebody: put back; {data['found'][:12]} is kept as "
        f"{data['kept_as']}"
    ]


def _memory(event: Event, view: CampaignView) -> list[str]:
    return [f"  noted in memory/NOTES.md ({event.data['commit'][:12]})"]


def _round_end(event: Event, view: CampaignView) -> list[str]:
    verdict = event.data["verdict"]
    note = view.rounds[event.round].note
    why = f": {note}" if note else ""
    return [f"  round {event.round}: {VERDICT_WORDS.get(verdict, verdict)}{why}"]


_LIVE: dict[str, Callable[[Event, CampaignView], list[str]]] = {
    "campaign.start": _start,
    "session.start": _session,
    "round.start": lambda e, v: [f"round {e.round} of {v.rounds_planned}"],
    "job.submit": _submit,
    "job.done": _job_done,
    "eval.scores": _scores,
    "digest": _digest,
    "tool.call": _call,
    "agent.strike": _strike,
    "proposal": _proposal,
    "guard": _guard,
    "pr.open": _pr_open,
    "review.request": _review_request,
    "review.answer": _review_answer,
    "pr.comment": _remark,
    "pr.edit": _remark,
    "pr.close": _remark,
    "campaign.pause": lambda e, v: ["paused by request: `selfevo resume` goes on"],
    "campaign.stop": _stopped,
    "integrity": _integrity,
    "gate": _gate,
    "pr.merge": _merge,
    "confirm.start": _confirm_start,
    "confirm": _confirm,
    "pr.revert": _revert,
    "branch.restored": _restored,
    "memory": _memory,
    "round.end": _round_end,
    "campaign.end": lambda e, v: [
        "all rounds are done" if e.data["reason"] == "rounds" else "the hours are used up"
    ],
}


# ------------------------------------------------------------------ tables


def medal_table(view: CampaignView) -> list[str]:
    """Offline medals of each measured arm."""
    rows = medal_rows(view)
    if not rows:
        return ["nothing measured yet"]
    head = ["round", "arm", "percentile", "valid", "gold", "silver", "bronze", "any", "scripts", ""]
    body = [_medal_cells(row) for row in rows]
    return table([head, *body], right=(0, 2, 3, 4, 5, 6, 7, 8))


def _medal_cells(row: MedalRow) -> list[str]:
    return [
        str(row.round),
        row.name,
        f"{row.percentile:.1f}",
        f"{row.valid_share:.0%}",
        str(row.gold),
        str(row.silver),
        str(row.bronze),
        f"{row.any_medal} ({row.share:.0%})",
        str(row.scripts),
        "incumbent" if row.incumbent else row.verdict,
    ]


def time_rows(view: CampaignView) -> list[tuple[str, float]]:
    """(what, seconds) of the campaign's working time; they sum to it."""
    spent = view.node_seconds
    groups = (
        ("training runs (CISPO)", ("launch", "wait")),
        ("measuring on held-out competitions", ("evaluate",)),
        ("agent: reading logs and deciding", ("start", "observe", "diagnose", "propose")),
        ("guard, with the trainer's dry run", ("guard",)),
        ("confirming kept changes", ("confirm",)),
    )
    rows = [(label, sum(spent.get(n, 0.0) for n in nodes)) for label, nodes in groups]
    used = {n for _, nodes in groups for n in nodes}
    rest = sum(value for node, value in spent.items() if node not in used)
    rows.append(("git, gate, memory, records", rest))
    return [row for row in rows if row[1] > 0.005]


def time_table(view: CampaignView) -> list[str]:
    """Where the time went."""
    total = view.active_seconds or 1.0
    rows = [[label, seconds(value), f"{value / total:.1%}"] for label, value in time_rows(view)]
    rows.append(["in all", seconds(view.active_seconds), "100%"])
    return table(rows, right=(1, 2))


def status_lines(view: CampaignView) -> list[str]:
    """`selfevo status`: where the campaign stands."""
    info = view.info
    lines = [
        f"campaign {view.name}: {view.state}"
        + (f" ({view.stop_reason})" if view.stop_reason and view.state != "running" else ""),
        f"round {view.round} of {view.rounds_planned}, next step {view.phase}",
        f"agent {info['agent']}, review {info['review']}, suite {info['suite']}",
        f"incumbent {view.incumbent_head[:12]} on {info['branch']}",
        f"worked {seconds(view.active_seconds)}, {count(len(view.jobs), 'job')}, "
        f"{count(len(view.prs), 'PR')}, {count(view.head, 'event')}",
    ]
    waiting = view.pending_review()
    if waiting is not None:
        lines.append(f"PR {waiting.number} waits for a review: selfevo pr view {waiting.number}")
    lines += [f"  running: {job.id}" for job in view.jobs.values() if job.state == "submitted"]
    return lines


def round_lines(view: CampaignView, current: RoundView, diff: str) -> list[str]:
    """One round of the closing summary: hypothesis, diff, gate numbers, verdict."""
    pr = view.prs.get(current.pr) if current.pr is not None else None
    lines = [f"round {current.number}"]
    if pr is not None:
        lines.append(f"  hypothesis ({pr.proposal['agent']}): {clean(pr.proposal['why'])}")
        lines += [
            f"  {_indented(line)}"
            for line in diff.splitlines()
            if line[:1] in "+-" and line[:3] not in ("+++", "---")
        ]
    if current.gate:
        lines.append(f"  {gate_line(current.gate)}")
    if current.confirmation:
        lines.append(f"  {confirm_line(current.confirmation)}")
    verdict = VERDICT_WORDS.get(current.verdict, current.verdict or "not finished")
    lines.append(f"  verdict: {verdict}" + (f": {clean(current.note)}" if current.note else ""))
    return lines


def medal_change(view: CampaignView) -> list[str]:
    """Medals before and after, in one line each."""
    pair = before_after(view)
    if pair is None:
        return []
    suite = f"{view.info['suite']}, version {view.info['suite_version']}"
    lines = [f"offline medals ({suite}), val competitions, one script a sample"]
    for label, row in zip(("before", "after"), pair, strict=True):
        lines.append(
            f"  {label:6} {row.any_medal} of {row.scripts} scripts ({row.share:.0%}): "
            f"{row.gold} gold, {row.silver} silver, {row.bronze} bronze; "
            f"mean percentile {row.percentile:.1f}, valid {row.valid_share:.0%}"
        )
    return lines
