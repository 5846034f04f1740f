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
        "pr.close",
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
        "memory.intent",
        "memory",
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
    record = json.loads(line)
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
