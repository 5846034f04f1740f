"""The one reducer: events → `CampaignView`. Terminal, report, replay and the loop itself use it.

`reduce` is a pure function of the events; `apply` folds one more event into a view that the caller
owns, so a long campaign is not reduced again at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from selfevo.events import Event
from selfevo.gate import SeedScore

Data = Mapping[str, Any]


@dataclass
class JobView:
    """A training or evaluation job; `run` is the cache key of what it computes."""

    id: str
    key: str
    run: str
    kind: str  # train | eval
    role: str  # control | candidate
    arm: str
    parent: str
    seed: int
    index: int
    round: int
    folder: str  # relative to the campaign folder
    session: int = 1
    curves: str | None = None  # blob
    state: str = "submitted"  # submitted | done | diverged | failed
    reason: str = ""
    exit_code: int | None = None
    started: float = 0.0
    ended: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScoreView:
    """A measured train seed of an arm."""

    run: str
    arm: str
    parent: str
    job: str
    index: int
    score: SeedScore
    competitions: dict[str, dict[str, float]]
    medals: dict[str, int]
    valid_share: float
    diverged: bool = False


@dataclass
class TurnView:
    """One model call and what followed: blob names, the tool call, its result."""

    request: str
    reply: str = ""
    call: dict[str, Any] | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class PrView:
    """A proposal. States: open, changes_requested, approved, rejected, merged, closed."""

    number: int
    round: int
    branch: str
    base: str
    commit: str
    arm: str
    title: str
    diff: str  # blob
    proposal: dict[str, Any]
    state: str = "open"
    commits: list[str] = field(default_factory=list)
    reviews: list[dict[str, Any]] = field(default_factory=list)
    revisions: int = 0
    gate: dict[str, Any] | None = None
    control_arm: str = ""
    merge_commit: str | None = None
    merged_into: list[str] = field(default_factory=list)

    @property
    def answered(self) -> str | None:
        """The last review's answer, if it is about the present commit."""
        if self.reviews and self.reviews[-1]["commit"] == self.commit:
            return str(self.reviews[-1]["answer"])
        return None


@dataclass
class RoundView:
    number: int
    started: float
    control_arm: str = ""
    ended: float = 0.0
    digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    turns: list[TurnView] = field(default_factory=list)  # of the present conversation
    all_turns: list[TurnView] = field(default_factory=list)
    calls: int = 0
    strikes: int = 0
    strike_reasons: list[str] = field(default_factory=list)
    decision: dict[str, Any] | None = None
    proposal: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    pr: int | None = None
    revise: bool = False
    gate: dict[str, Any] | None = None
    integrity: list[str] = field(default_factory=list)
    verdict: str = ""
    note: str = ""


@dataclass
class CampaignView:
    """Everything that is known of a campaign."""

    name: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    head: int = 0
    first_ts: float = 0.0
    last_ts: float = 0.0
    phase: str = "launch"
    round: int = 0
    thread: str = ""
    sessions: int = 0
    state: str = "new"  # new | running | waiting | stopped | done
    stop_reason: str = ""
    control_arm: str = ""
    control_commit: str = ""
    control_parent: str = ""
    incumbent_head: str = ""
    rounds: dict[int, RoundView] = field(default_factory=dict)
    prs: dict[int, PrView] = field(default_factory=dict)
    jobs: dict[str, JobView] = field(default_factory=dict)  # by key
    scores: dict[str, ScoreView] = field(default_factory=dict)  # by run
    memory: list[dict[str, Any]] = field(default_factory=list)
    intents: dict[str, dict[str, Any]] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    node_seconds: dict[str, float] = field(default_factory=dict)
    model_seconds: float = 0.0
    human_acts: int = 0
    mark: float = 0.0

    @property
    def now(self) -> RoundView:
        return self.rounds[self.round]

    @property
    def rounds_planned(self) -> int:
        return int(self.info["rounds"])

    def arm_scores(self, arm: str, parent: str | None = None) -> list[ScoreView]:
        """Measured seeds of an arm (trained from `parent`, if given), by seed index."""
        found = [s for s in self.scores.values() if s.arm == arm and parent in (None, s.parent)]
        return sorted(found, key=lambda s: s.index)

    def arm_jobs(self, arm: str, kind: str = "train") -> list[JobView]:
        """The last job of each seed of an arm, by seed index."""
        last: dict[int, JobView] = {}
        for job in self.jobs.values():
            if job.arm == arm and job.kind == kind:
                last[job.index] = job
        return [last[index] for index in sorted(last)]

    def job_of(self, run: str) -> JobView | None:
        """The last attempt at a run."""
        found = [job for job in self.jobs.values() if job.run == run]
        return found[-1] if found else None

    @property
    def active_seconds(self) -> float:
        """Working time: sessions only, gaps between them left out."""
        return sum(self.node_seconds.values())

    def pending_review(self) -> PrView | None:
        """The PR that waits for a person, if any."""
        if self.phase != "review" or self.state == "done":
            return None
        number = self.now.pr
        pr = self.prs[number] if number is not None else None
        return pr if pr is not None and pr.answered is None and pr.state == "open" else None


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
    _spend(view, view.phase, event.ts)
    if view.state != "done":
        view.state = "waiting" if data["reason"] == "review" else "stopped"
    view.stop_reason = data["reason"]


def _campaign_end(view: CampaignView, data: Data, event: Event) -> None:
    view.state = "done"
    view.stop_reason = data["reason"]
    view.phase = "end"


def _phase(view: CampaignView, data: Data, event: Event) -> None:
    _spend(view, data["from"], event.ts)
    view.phase = data["to"]


def _spend(view: CampaignView, node: str, ts: float) -> None:
    if view.mark:
        spent = max(0.0, ts - view.mark)
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
    view.rounds[event.round].digests[data["run"]] = dict(data)


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
    view.incumbent_head = data["commit"]
    view.control_commit = pr.commit
    view.control_arm = pr.arm
    view.control_parent = data["parent"]


def _pr_close(view: CampaignView, data: Data, event: Event) -> None:
    view.prs[data["number"]].state = data["state"]
    if data.get("verdict"):
        current = view.rounds[event.round]
        current.verdict, current.note = data["verdict"], data.get("why", "")


def _pr_merge_into(view: CampaignView, data: Data, event: Event) -> None:
    view.prs[data["number"]].merged_into.append(data["into"])


def _job_submit(view: CampaignView, data: Data, event: Event) -> None:
    view.jobs[data["key"]] = JobView(
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
    view.scores[data["run"]] = ScoreView(
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
    )


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
    "pr.close": _pr_close,
    "pr.merge_into": _pr_merge_into,
    "job.submit": _job_submit,
    "job.done": _job_done,
    "eval.scores": _eval_scores,
    "integrity": _integrity,
    "gate": _gate,
    "memory": _memory,
}
