"""The graph's state: ids and small numbers only; bodies live in the event log and its blobs."""

from __future__ import annotations

from typing import TypedDict

#: Upper bound of a serialised state in bytes (the SQLite saver stores it whole at every step).
MAX_STATE_BYTES = 16_000


class GraphState(TypedDict):
    """Where the round stands. The event log says the same; this is what LangGraph keeps of it."""

    campaign: str
    round: int
    phase: str  # the next node
    seq: int  # the last event when the node ended
    pr: int
    verdict: str
