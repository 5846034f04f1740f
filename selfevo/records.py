"""What is known of a campaign: plain records, filled by the reducer in `selfevo.views`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from selfevo.gate import FRESH, SeedScore


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
    evaluator: str = ""
    """What decided the scores; empty in logs that did not write it and for diverged runs."""


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
    """A proposal.

    States: open, changes_requested, approved, rejected, merged, reverted, closed.
    """

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
    remarks: list[dict[str, Any]] = field(default_factory=list)
    """Words of people that answer nothing: comments, edits, the reason of a close."""
    revisions: int = 0
    gate: dict[str, Any] | None = None
    control_arm: str = ""
    merge_commit: str | None = None
    replaced: tuple[str, str] = ("", "")
    """(commit, parent checkpoint) of the control when this was merged."""
    confirmation: dict[str, Any] | None = None
    revert_commit: str | None = None
    merged_into: list[str] = field(default_factory=list)

    @property
    def said(self) -> list[dict[str, Any]]:
        """Reviews and remarks, oldest first."""
        return sorted([*self.reviews, *self.remarks], key=lambda words: float(words["ts"]))

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
    confirm_index: int | None = None
    """First seed index of the round's confirmation."""
    confirmation: dict[str, Any] | None = None
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
    jobs_of_run: dict[str, list[JobView]] = field(default_factory=dict)
    jobs_of_arm: dict[tuple[str, str], list[JobView]] = field(default_factory=dict)  # arm, kind
    scores: dict[str, ScoreView] = field(default_factory=dict)  # by run
    scores_of_arm: dict[str, list[ScoreView]] = field(default_factory=dict)
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

    def arm_scores(
        self, arm: str, parent: str | None = None, fresh: int | None = None
    ) -> list[ScoreView]:
        """Measured seeds of an arm (trained from `parent`, if given), by seed index.

        Seeds of confirmations are left out; with `fresh`, only those from that index on are given.
        """
        found = [
            s
            for s in self.scores_of_arm.get(arm, ())
            if parent in (None, s.parent) and _wanted(s.index, fresh)
        ]
        return sorted(found, key=lambda s: s.index)

    def arm_jobs(self, arm: str, kind: str = "train", fresh: int | None = None) -> list[JobView]:
        """The last job of each seed of an arm, by seed index; `fresh` as in `arm_scores`."""
        last: dict[int, JobView] = {}
        for job in self.jobs_of_arm.get((arm, kind), ()):
            if _wanted(job.index, fresh):
                last[job.index] = job
        return [last[index] for index in sorted(last)]

    def job_of(self, run: str) -> JobView | None:
        """The last attempt at a run."""
        found = self.jobs_of_run.get(run)
        return found[-1] if found else None

    @property
    def active_seconds(self) -> float:
        """Working time: sessions only, gaps between them left out."""
        return sum(self.node_seconds.values())

    def pending_review(self) -> PrView | None:
        """The PR that waits for a person, if any."""
        if self.phase != "review" or self.state == "done" or self.info["review"] == "auto":
            return None
        number = self.now.pr
        pr = self.prs[number] if number is not None else None
        return pr if pr is not None and pr.answered is None and pr.state == "open" else None


def _wanted(index: int, fresh: int | None) -> bool:
    return index < FRESH if fresh is None else index >= fresh
