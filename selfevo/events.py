"""Events: the append-only record that alone is the truth of a campaign."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VERSION = 1

Actor = Literal["agent", "human", "system"]

#: Every kind of event. `X.intent` is written before a side effect, `X` after it.
KINDS = frozenset(
    {
        "campaign.start",
        "session.start",
        "session.end",
        "campaign.pause",
        "campaign.stop",
        "campaign.end",
        "round.start",
        "round.end",
        "phase",
        "digest",
        "agent.request",
        "agent.reply",
        "tool.call",
        "tool.result",
        "agent.strike",
        "proposal",
        "abstain",
        "no_proposal",
        "guard",
        "pr.open.intent",
        "pr.open",
        "pr.merge.intent",
        "pr.merge",
        "confirm.start",
        "confirm",
        "pr.revert.intent",
        "pr.revert",
        "pr.close",
        "pr.comment",
        "pr.edit",
        "pr.merge_into.intent",
        "pr.merge_into",
        "review.request",
        "review.answer",
        "job.submit.intent",
        "job.submit",
        "job.done",
        "eval.scores",
        "integrity",
        "gate",
        "branch.restored",
        "memory.intent",
        "memory",
        # in the logs of runs/medals/, never in a campaign's
        "measure.start",
        "measure.scores",
        "measure.end",
        "sealed.open",
    }
)


#: Events that need no fsync of their own: what they say is computed from events and files that
#: stand, so one that is lost with the machine (never without the later ones) is made again.
DERIVED = frozenset(
    {
        "phase",
        "round.start",
        "round.end",
        "digest",
        "agent.request",
        "tool.call",
        "tool.result",
        "agent.strike",
        "proposal",
        "guard",
        "integrity",
    }
)


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl. `seq` counts from 1; `ts` is Unix seconds; `cause` is a `seq`."""

    seq: int
    ts: float
    campaign: str
    round: int
    kind: str
    actor: Actor
    cause: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    v: int = VERSION

    def line(self) -> str:
        """The event as one JSON line, without the line feed."""
        record = {
            "v": self.v,
            "seq": self.seq,
            "ts": round(self.ts, 3),
            "campaign": self.campaign,
            "round": self.round,
            "kind": self.kind,
            "actor": self.actor,
            "cause": self.cause,
            "data": dict(self.data),
        }
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def parse_line(line: str) -> Event:
    """The event in one JSON line; ValueError or KeyError if it is not one."""
    return to_event(json.loads(line))


def to_event(record: Any) -> Event:
    """The event in a parsed line; ValueError, KeyError or TypeError if it is not one."""
    if not isinstance(record, dict) or record.get("v") != VERSION:
        raise ValueError("not an event of version 1")
    return Event(
        seq=int(record["seq"]),
        ts=float(record["ts"]),
        campaign=str(record["campaign"]),
        round=int(record["round"]),
        kind=str(record["kind"]),
        actor=record["actor"],
        cause=record["cause"],
        data=record["data"],
        v=record["v"],
    )
