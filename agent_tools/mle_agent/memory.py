"""Short-term memory: a markdown file that grows by one part after every step (paper, section 8.3).

A part says what was tried, what came of it, and the criticism of it. The next step reads the whole
chain; where that is too long for a prompt, the oldest parts shrink to their heading first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent_tools.mle_agent.journal import Measure, Node

_PLAN_CHARS = 600


def part(node: Node, best_before: Measure | None, lower_is_better: bool) -> str:
    """The part of one step, in markdown."""
    parent = f" of step {node.parent}" if node.parent is not None else ""
    lines = [f"## Step {node.id}: {node.stage}{parent}: {_outcome(node)}"]
    if node.plan:
        lines.append(node.plan[:_PLAN_CHARS])
    lines.append(f"- {_compared(node, best_before, lower_is_better)}")
    if node.feedback:
        lines.append(f"- Criticism: {node.feedback}")
    return "\n".join(lines) + "\n"


def write(path: Path, nodes: Sequence[Node], lower_is_better: bool) -> None:
    """The whole file, made again from the nodes: a kill between two steps loses nothing."""
    part_file = path.with_suffix(".part")
    part_file.write_text(
        "# Memory\n\n" + "\n".join(parts(nodes, lower_is_better)), encoding="utf-8",
        errors="replace",
    )  # fmt: skip
    part_file.replace(path)


def parts(nodes: Sequence[Node], lower_is_better: bool) -> list[str]:
    """One part a node, in order."""
    best: Measure | None = None
    made = []
    for node in nodes:
        made.append(part(node, best, lower_is_better))
        if node.good and node.cv is not None:
            value = Measure(node.cv, lower_is_better)
            best = value if value.better_than(best) else best
    return made


def for_prompt(nodes: Sequence[Node], lower_is_better: bool, most_chars: int) -> str:
    """The chain in at most `most_chars` characters: old parts become headings, then go."""
    made = parts(nodes, lower_is_better)
    shown: list[str] = []
    room = most_chars
    for text in reversed(made):
        heading = text.partition("\n")[0] + "\n"
        chosen = text if len(text) <= room // 2 or not shown else heading
        if len(chosen) > room:
            shown.append("(earlier steps are left out)\n"[:room])
            break
        shown.append(chosen)
        room -= len(chosen) + 1
    return "\n".join(reversed(shown))


def _outcome(node: Node) -> str:
    if node.good and node.cv is not None:
        return f"cross-validation score {node.cv:.5f}"
    return f"failed ({node.status})"


def _compared(node: Node, best: Measure | None, lower_is_better: bool) -> str:
    if not node.good or node.cv is None:
        return f"Error: {node.error or node.status}"
    value = Measure(node.cv, lower_is_better)
    if best is None:
        return "The first valid script."
    if value.better_than(best):
        return f"Better than the best before ({best.value:.5f})."
    return f"Not better than the best so far ({best.value:.5f})."
