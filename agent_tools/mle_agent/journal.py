"""The tree of scripts, kept in a file that survives a kill at any moment.

Every line is a fact that has happened: a reply of the model, a judged node, the end. A line that a
kill cut short is dropped, and the run goes on from the facts before it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from agent_tools.errors import UserError
from agent_tools.mle_agent.settings import Settings

Stage = Literal["draft", "debug", "improve"]


@dataclass(frozen=True)
class Measure:
    """A metric's value that knows its direction."""

    value: float
    lower_is_better: bool

    def better_than(self, other: Measure | None) -> bool:
        """Strictly better; anything is better than None. NaN never is.

        Raises ValueError where the two have different directions.
        """
        if other is None:
            return self.value == self.value
        if self.lower_is_better != other.lower_is_better:
            raise ValueError("measures of different directions cannot be compared")
        if self.lower_is_better:
            return self.value < other.value
        return self.value > other.value


@dataclass(frozen=True)
class Move:
    """What to do next: a draft has no parent, a debug or improve one has."""

    stage: Stage
    parent: int | None = None


@dataclass(frozen=True)
class Node:
    """One script and what became of it.

    status      ok · invalid (a bad submission) · repeat (the code of an earlier node) · else as
                `ScriptResult.status`
    cv          mean over the folds (or what the script printed); None unless ok
    folds       score a fold that was run
    cpu_s, wall_s, scripts      of all its executions
    submission  whether `candidates/<id>.csv` exists
    """

    id: int
    stage: Stage
    parent: int | None
    plan: str
    code: str
    status: str
    error: str
    cv: float | None
    folds: tuple[float, ...]
    submission: bool
    cpu_s: float
    wall_s: float
    scripts: int
    tokens: int
    feedback: str = ""

    @property
    def good(self) -> bool:
        return self.status == "ok" and self.cv is not None


@dataclass(frozen=True)
class Reply:
    """What the model said for a node that is not judged yet."""

    id: int
    stage: Stage
    parent: int | None
    text: str
    plan: str
    code: str
    tokens: int


class Journal:
    """The nodes of one search in order, appended durably to a file of JSON lines."""

    def __init__(self, path: Path, lower_is_better: bool) -> None:
        """Read what is there. Raises `UserError` for a file that is no journal."""
        self.path = path
        self.lower_is_better = lower_is_better
        self.nodes: dict[int, Node] = {}
        self.replies: dict[int, Reply] = {}
        self.criticised: set[int] = set()
        self.spent_s = 0.0
        self.ended: dict[str, Any] | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, record in enumerate(_read(path), start=1):
            try:
                self._take(record)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} line {number}: is no journal entry ({error}); remove the run's folder"
                ) from error

    def keep_replies(self, replies: Sequence[Reply]) -> None:
        """Keep replies before their scripts run: after a kill they are not asked for again."""
        self._append({"kind": "replies", "replies": [asdict(reply) for reply in replies]})

    def keep_nodes(self, nodes: Sequence[Node]) -> None:
        """Keep the judged nodes of one step, all or none."""
        self._append({"kind": "nodes", "nodes": [asdict(node) for node in nodes]})

    def keep_feedback(self, node: int, text: str, tokens: int) -> None:
        """Keep the criticism of a node; it becomes part of it."""
        self._append({"kind": "feedback", "node": node, "text": text, "tokens": tokens})

    def clock(self, spent_s: float) -> None:
        """Keep the wall seconds spent so far, over all starts."""
        self._append({"kind": "clock", "spent_s": round(spent_s, 3)})

    def end(self, selected: int | None, reason: str) -> None:
        """Keep the end: the selected node, or None where no script was valid."""
        self._append({"kind": "end", "selected": selected, "reason": reason})

    def measure(self, node: Node) -> Measure | None:
        """A node's cross-validation score with its direction."""
        return Measure(node.cv, self.lower_is_better) if node.good and node.cv is not None else None

    def best(self) -> Node | None:
        """The best node: those scored on most folds first, then by score, then the earliest."""
        return best_of(self.nodes.values(), self.lower_is_better)

    def _take(self, record: dict[str, Any]) -> None:
        kind = record.pop("kind")
        if kind == "replies":
            for reply in (Reply(**values) for values in record["replies"]):
                self.replies[reply.id] = reply
        elif kind == "nodes":
            for values in record["nodes"]:
                node = Node(**{**values, "folds": tuple(values["folds"])})
                self.nodes[node.id] = node
                self.replies.pop(node.id, None)
        elif kind == "feedback":
            node = self.nodes[record["node"]]
            tokens = node.tokens + int(record["tokens"])
            self.nodes[node.id] = replace(node, feedback=str(record["text"]), tokens=tokens)
            self.criticised.add(node.id)
        elif kind == "clock":
            self.spent_s = float(record["spent_s"])
        elif kind == "end":
            self.ended = {"selected": record["selected"], "reason": record["reason"]}
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with self.path.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._take(json.loads(text))


def best_of(nodes: Iterable[Node], lower_is_better: bool) -> Node | None:
    """As `Journal.best`, of any nodes."""
    found: Node | None = None
    for node in sorted(nodes, key=lambda item: (-len(item.folds), item.id)):
        if not node.good or node.cv is None:
            continue
        if found is not None and len(node.folds) < len(found.folds):
            break  # scores on fewer folds are not comparable
        best = Measure(found.cv, lower_is_better) if found and found.cv is not None else None
        if Measure(node.cv, lower_is_better).better_than(best):
            found = node
    return found


def next_move(
    nodes: Sequence[Node], settings: Settings, lower_is_better: bool, rng: random.Random
) -> Move:
    """Draft, debug or improve: pure, given the nodes so far.

    First all drafts. Then, with `debug_share`, a broken leaf whose line of repairs is short enough;
    else the best node is improved, and where none is good a new draft is written.
    """
    if sum(node.stage == "draft" for node in nodes) < settings.drafts:
        return Move("draft")
    best = best_of(nodes, lower_is_better)
    parents = {node.parent for node in nodes}
    by_id = {node.id: node for node in nodes}
    broken = [
        node
        for node in nodes
        if not node.good
        and node.status != "repeat"
        and node.id not in parents
        and _repairs(node, by_id) < settings.debug_depth
    ]
    if broken and (best is None or rng.random() < settings.debug_share):
        return Move("debug", rng.choice(broken).id)
    return Move("draft") if best is None else Move("improve", best.id)


def _repairs(node: Node, by_id: dict[int, Node]) -> int:
    """Debug steps in a row that end at this node."""
    count = 0
    while node.stage == "debug" and node.parent is not None:
        count, node = count + 1, by_id[node.parent]
    return count


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; what a kill left of a last one is cut off the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{path} line {number}: is no JSON; remove the run's folder to start again"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number}: is no JSON object; remove the run's folder")
        records.append(record)
    return records
