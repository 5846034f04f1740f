"""The one reducer: events → `CampaignView`. Terminal, report, replay and the loop itself use it.

`reduce` is a pure function of the events; `apply` folds one more event into a view that the caller
owns, so a long campaign is not reduced again at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from selfevo.events import Event
from selfevo.gate import SeedScore
from selfevo.records import CampaignView, JobView, PrView, RoundView, ScoreView, TurnView

__all__ = [
    "CampaignView",
    "JobView",
    "PrView",
    "RoundView",
    "ScoreView",
    "TurnView",
    "apply",
    "reduce",
]

Data = Mapping[str, Any]


def reduce(events: Iterable[Event]) -> CampaignView:
    """The view after `events`."""
    view = CampaignView()
    for event in events:
        apply(view, event)
    return view


def apply(view: CampaignView, event: Event) -> CampaignView:
    """Fold one event into `view` and return it. Unknown kinds change only head and time."""
    if not view.first_ts:
        view.first_ts = event.ts
    view.head = event.seq
    view.last_ts = event.ts
    if event.actor == "human":
        view.human_acts += 1
    key = event.data.get("key")
    if isinstance(key, str):
        book = view.intents if event.kind.endswith(".intent") else view.outcomes
        book[key] = dict(event.data)
    handler = _HANDLERS.get(event.kind)
    if handler is not None:
        handler(view, event.data, event)
    return view


# ------------------------------------------------------------------ one function a kind


def _campaign_start(view: CampaignView, data: Data, event: Event) -> None:
    view.name = event.campaign
    view.info = dict(data)
    view.control_commit = view.incumbent_head = data["commit"]
    view.control_arm = data["arm"]
    view.control_parent = data["parent"]
    view.rounds[0] = RoundView(0, event.ts, control_arm=data["arm"])
    view.state = "running"


def _session_start(view: CampaignView, data: Data, event: Event) -> None:
    view.sessions += 1
    view.thread = data["thread"]
    startup = float(data.get("startup_s", 0.0))
    view.node_seconds["start"] = view.node_seconds.get("start", 0.0) + startup
    view.mark = event.ts
    if view.state != "done":
        view.state = "running"


def _session_end(view: CampaignView, data: Data, event: Event) -> None:
    _spend(view, view.phase, event.ts, data.get("seconds"))
    if view.state != "done":
        view.state = "waiting" if data["reason"] == "review" else "stopped"
        view.stop_reason = data["reason"]


def _campaign_pause(view: CampaignView, data: Data, event: Event) -> None:
    view.stop_reason = "paused"


def _campaign_stop(view: CampaignView, data: Data, event: Event) -> None:
    view.state, view.stop_reason = "stopped", "requested"


def _campaign_end(view: CampaignView, data: Data, event: Event) -> None:
    view.state = "done"
    view.stop_reason = data["reason"]
    view.phase = "end"


def _phase(view: CampaignView, data: Data, event: Event) -> None:
    _spend(view, data["from"], event.ts, data.get("seconds"))
    view.phase = data["to"]


def _spend(view: CampaignView, node: str, ts: float, seconds: float | None) -> None:
    """Count time for a node: as measured, or by the events' times in logs that did not measure."""
    if view.mark:
        spent = max(0.0, ts - view.mark) if seconds is None else seconds
        view.node_seconds[node] = view.node_seconds.get(node, 0.0) + spent
    view.mark = ts


def _round_start(view: CampaignView, data: Data, event: Event) -> None:
    view.round = event.round
    view.rounds[event.round] = RoundView(event.round, event.ts, control_arm=view.control_arm)


def _round_end(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    current.ended = event.ts
    current.verdict = data["verdict"]


def _digest(view: CampaignView, data: Data, event: Event) -> None:
    # a run that has ended keeps its digest: later rounds only name the one where it was made
    made = data.get("as_in_round")
    source = data if made is None else view.rounds[made].digests[data["run"]]
    view.rounds[event.round].digests[data["run"]] = dict(source)


def _agent_request(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    turn = TurnView(data["blob"])
    if current.turns and not current.turns[-1].reply:  # asked again after a kill
        current.turns[-1] = turn
        current.all_turns[-1] = turn
    else:
        current.turns.append(turn)
        current.all_turns.append(turn)
        current.calls += 1


def _agent_reply(view: CampaignView, data: Data, event: Event) -> None:
    turn = view.rounds[event.round].turns[-1]
    turn.reply = data["blob"]
    turn.seconds = data["seconds"]
    view.model_seconds += data["seconds"]


def _tool_call(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    if current.turns:
        current.turns[-1].call = dict(data)
    if data["name"] in ("propose_edit", "abstain"):
        current.decision = dict(data)


def _tool_result(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    if current.turns:
        current.turns[-1].results.append(dict(data))


def _strike(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    current.strikes += 1
    current.strike_reasons.append(data["reason"])
    current.decision = None
    current.proposal = None
    if current.turns and data.get("answer"):
        current.turns[-1].results.append({"call_id": data["call_id"], "text": data["answer"]})


def _proposal(view: CampaignView, data: Data, event: Event) -> None:
    view.rounds[event.round].proposal = dict(data)


def _no_proposal(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    current.verdict = "no_proposal"
    current.note = data["why"]


def _guard(view: CampaignView, data: Data, event: Event) -> None:
    view.rounds[event.round].guard = dict(data)


def _pr_open(view: CampaignView, data: Data, event: Event) -> None:
    number = data["number"]
    current = view.rounds[event.round]
    current.pr = number
    pr = view.prs.get(number)
    if pr is None:
        pr = view.prs[number] = PrView(
            number,
            event.round,
            data["branch"],
            data["base"],
            data["commit"],
            data["arm"],
            data["title"],
            data["diff"],
            dict(data["proposal"]),
            control_arm=view.control_arm,
        )
    else:  # a new commit after request_changes
        pr.commit, pr.arm, pr.title = data["commit"], data["arm"], data["title"]
        pr.diff, pr.proposal, pr.state = data["diff"], dict(data["proposal"]), "open"
    pr.commits.append(data["commit"])
    current.revise = False


def _review_answer(view: CampaignView, data: Data, event: Event) -> None:
    pr = view.prs[data["number"]]
    answer = data["answer"]
    pr.reviews.append(dict(data))
    if data["commit"] != pr.commit:  # a person added commits to the branch
        pr.commit, pr.arm, pr.diff = data["commit"], data["arm"], data["diff"]
        pr.commits.append(data["commit"])
    if answer == "approve":
        pr.state = "approved"
    elif answer == "reject":
        pr.state = "rejected"
    else:
        pr.state = "changes_requested"
        pr.revisions += 1
        current = view.rounds[pr.round]
        current.revise = True
        current.turns = []
        current.decision = current.proposal = current.guard = None
        current.calls = 0
        current.strikes = 0


def _pr_merge(view: CampaignView, data: Data, event: Event) -> None:
    pr = view.prs[data["number"]]
    pr.state = "merged"
    pr.merge_commit = data["commit"]
    pr.replaced = (view.control_commit, view.control_parent)
    view.incumbent_head = data["commit"]
    view.control_commit = pr.commit
    view.control_arm = pr.arm
    view.control_parent = data["parent"]


def _confirm_start(view: CampaignView, data: Data, event: Event) -> None:
    view.rounds[event.round].confirm_index = data["index"]


def _confirm(view: CampaignView, data: Data, event: Event) -> None:
    view.rounds[event.round].confirmation = dict(data)
    view.prs[data["number"]].confirmation = dict(data)


def _pr_revert(view: CampaignView, data: Data, event: Event) -> None:
    pr = view.prs[data["number"]]
    pr.state = "reverted"
    pr.revert_commit = view.incumbent_head = data["commit"]
    view.control_commit, view.control_parent = pr.replaced
    view.control_arm = pr.control_arm
    view.rounds[event.round].verdict = "reverted"


def _pr_comment(view: CampaignView, data: Data, event: Event) -> None:
    view.prs[data["number"]].remarks.append({**data, "answer": "comment", "ts": event.ts})


def _pr_edit(view: CampaignView, data: Data, event: Event) -> None:
    pr = view.prs[data["number"]]
    pr.remarks.append({**data, "answer": "edit", "ts": event.ts})
    pr.title, pr.proposal = data["title"], dict(data["proposal"])
    if data["commit"] != pr.commit:
        pr.commit, pr.arm, pr.diff = data["commit"], data["arm"], data["diff"]
        pr.commits.append(data["commit"])


def _pr_close(view: CampaignView, data: Data, event: Event) -> None:
    pr = view.prs[data["number"]]
    pr.state = data["state"]
    if event.actor == "human":
        words = {"answer": "close", "body": data["why"], "commit": pr.commit, "ts": event.ts}
        pr.remarks.append(words)
    if data.get("verdict"):
        current = view.rounds[event.round]
        current.verdict, current.note = data["verdict"], data.get("why", "")


def _pr_merge_into(view: CampaignView, data: Data, event: Event) -> None:
    view.prs[data["number"]].merged_into.append(data["into"])


def _job_submit(view: CampaignView, data: Data, event: Event) -> None:
    job = JobView(
        id=data["job"],
        key=data["key"],
        run=data["run"],
        kind=data["kind"],
        role=data["role"],
        arm=data["arm"],
        parent=data["parent"],
        seed=data["seed"],
        index=data["index"],
        round=event.round,
        folder=data["folder"],
        started=event.ts,
        session=view.sessions,
    )
    view.jobs[job.key] = job
    view.jobs_of_run.setdefault(job.run, []).append(job)
    view.jobs_of_arm.setdefault((job.arm, job.kind), []).append(job)


def _job_done(view: CampaignView, data: Data, event: Event) -> None:
    job = view.jobs[data["job_key"]]
    job.state, job.reason, job.exit_code = data["state"], data["reason"], data["exit_code"]
    job.ended = event.ts
    job.result = dict(data["result"])
    job.curves = data["curves"]


def _eval_scores(view: CampaignView, data: Data, event: Event) -> None:
    score = SeedScore(
        data["seed"], data["score"], data["sampling_var"], data["samples"], data["infra"]
    )
    found = ScoreView(
        data["run"],
        data["arm"],
        data["parent"],
        data["job"],
        data["index"],
        score,
        {name: dict(row) for name, row in data["competitions"].items()},
        dict(data["medals"]),
        data["valid_share"],
        data["diverged"],
        data.get("evaluator", ""),
    )
    view.scores[found.run] = found
    view.scores_of_arm.setdefault(found.arm, []).append(found)


def _integrity(view: CampaignView, data: Data, event: Event) -> None:
    view.rounds[event.round].integrity += list(data["problems"])


def _gate(view: CampaignView, data: Data, event: Event) -> None:
    current = view.rounds[event.round]
    current.gate = dict(data)
    current.verdict = data["verdict"]
    if current.pr is not None:
        view.prs[current.pr].gate = dict(data)


def _memory(view: CampaignView, data: Data, event: Event) -> None:
    view.memory.append({**data, "round": event.round})
    view.incumbent_head = data["commit"]


_HANDLERS: dict[str, Callable[[CampaignView, Data, Event], None]] = {
    "campaign.start": _campaign_start,
    "session.start": _session_start,
    "session.end": _session_end,
    "campaign.pause": _campaign_pause,
    "campaign.stop": _campaign_stop,
    "campaign.end": _campaign_end,
    "phase": _phase,
    "round.start": _round_start,
    "round.end": _round_end,
    "digest": _digest,
    "agent.request": _agent_request,
    "agent.reply": _agent_reply,
    "tool.call": _tool_call,
    "tool.result": _tool_result,
    "agent.strike": _strike,
    "proposal": _proposal,
    "no_proposal": _no_proposal,
    "guard": _guard,
    "pr.open": _pr_open,
    "review.answer": _review_answer,
    "pr.merge": _pr_merge,
    "confirm.start": _confirm_start,
    "confirm": _confirm,
    "pr.revert": _pr_revert,
    "pr.comment": _pr_comment,
    "pr.edit": _pr_edit,
    "pr.close": _pr_close,
    "pr.merge_into": _pr_merge_into,
    "job.submit": _job_submit,
    "job.done": _job_done,
    "eval.scores": _eval_scores,
    "integrity": _integrity,
    "gate": _gate,
    "memory": _memory,
}
