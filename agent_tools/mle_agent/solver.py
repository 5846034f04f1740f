"""Who writes the scripts: a chat model that reads prose, or the bundled one that reads one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from agent_tools.mle_agent.journal import Node, Stage
from agent_tools.mle_agent.model_client import Answer, ChatModel
from agent_tools.mle_agent.settings import Settings
from agent_tools.mle_bench.policy_text import DEFAULT_SYSTEM, describe, extract_script
from agent_tools.mle_bench.registry import Competition

Look = Callable[[str], str]
"""Runs a shell command where the data is, returns what it printed."""

_BASH = re.compile(r"```[ \t]*(?:bash|sh)[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_PYTHON = re.compile(r"```[ \t]*(?:python|py)[ \t]*\n", re.IGNORECASE)
_LOOK_CHARS = 4_000
_ERROR_CHARS = 4_000


@dataclass(frozen=True)
class Ask:
    """What a solver is told for one step. `memory` is the memory file, newest part last."""

    stage: Stage
    view: Competition
    settings: Settings
    parent: Node | None
    output: str
    memory: str
    seed: int
    look: Look | None = None


@dataclass(frozen=True)
class Proposal:
    """A reply, split into the plan and the script."""

    text: str
    plan: str
    code: str
    tokens: int


class Solver(Protocol):
    """Writes scripts, and criticises what came of them."""

    def propose(self, ask: Ask) -> Proposal: ...

    def reflect(self, ask: Ask, node: Node) -> tuple[str, int]:
        """Self-criticism of one step and what to try next; and the tokens it took."""


class NanoSolver:
    """The bundled model's own format: a fixed system line and one line of facts about the task.

    It was never trained on a second turn: shown its script and a result, or an error, it wrote 0
    valid scripts of 62 distinct ones. So a repair or an improvement is a new draft too, with
    another seed.
    """

    def __init__(self, model: ChatModel) -> None:
        self._model = model

    def propose(self, ask: Ask) -> Proposal:
        messages = [
            {"role": "system", "content": DEFAULT_SYSTEM},
            {"role": "user", "content": describe(ask.view.facts)},
        ]
        answer = self._model.chat(
            messages,
            temperature=ask.settings.temperature,
            max_tokens=ask.settings.max_tokens,
            seed=ask.seed,
        )
        return Proposal(answer.text, "", extract_script(answer.text), answer.tokens)

    def reflect(self, ask: Ask, node: Node) -> tuple[str, int]:
        return "", 0


class ChatSolver:
    """Any capable model: the whole task, the memory with its chain of criticism, one step."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model

    def propose(self, ask: Ask) -> Proposal:
        messages = [
            {"role": "system", "content": _rules(ask.view, ask.settings, ask.look is not None)},
            {"role": "user", "content": _request(ask)},
        ]
        tokens = 0
        for left in range(ask.settings.looks if ask.look else 0, -1, -1):
            answer = self._chat(messages, ask)
            tokens += answer.tokens
            commands = _BASH.findall(answer.text)
            if not commands or _PYTHON.search(answer.text) or not left or ask.look is None:
                break
            seen = ask.look(commands[0])[-_LOOK_CHARS:]
            messages.append({"role": "assistant", "content": answer.text})
            note = f"Output:\n```\n{seen}\n```\n{left - 1} commands are left before the script."
            messages.append({"role": "user", "content": note})
        code = extract_script(answer.text) if _PYTHON.search(answer.text) else ""
        plan = answer.text.partition("```")[0].strip()
        return Proposal(answer.text, plan, code, tokens)

    def reflect(self, ask: Ask, node: Node) -> tuple[str, int]:
        messages = [
            {"role": "system", "content": _rules(ask.view, ask.settings, False)},
            {"role": "user", "content": _criticise(ask, node)},
        ]
        answer = self._chat(messages, ask)
        return answer.text.strip()[:2_000], answer.tokens

    def _chat(self, messages: list[dict[str, str]], ask: Ask) -> Answer:
        return self._model.chat(
            messages,
            temperature=ask.settings.temperature,
            max_tokens=ask.settings.max_tokens,
            seed=ask.seed,
        )


def _rules(view: Competition, settings: Settings, looks: bool) -> str:
    better = "lower" if view.lower_is_better else "higher"
    lines = [
        "You solve a machine-learning competition by writing Python scripts.",
        "Each script is complete: it trains a model on the training data and predicts the test set."
        " No hand labelling, no outside data, no network.",
    ]
    if settings.container:
        lines.append(
            "Data lies read-only in /home/data. "
            "Write predictions to /home/submission/submission.csv."
        )
    else:
        lines.append("Data lies in the working folder; write submission.csv there.")
    if settings.folds:
        lines.append(
            "Your script is also run on folds of the training rows, under the same paths, with "
            "fewer rows: never rely on row numbers or sizes. The mean over the folds selects."
        )
    else:
        lines.append(
            "Cross-validate on the training data and print one last line "
            "`cross-validation score: X`: it selects the script."
        )
    lines.append(f"The metric is {view.metric or 'named in the task'}; {better} is better.")
    if looks:
        lines.append(
            f"Before the script you may look around with up to {settings.looks} shell commands: "
            "answer with one ```bash block and nothing else; its output comes back."
        )
    lines.append("Answer with a short plan in prose, then one ```python block with the script.")
    return "\n".join(lines)


def _request(ask: Ask) -> str:
    parts = [f"# Task\n{ask.view.description}"]
    if ask.memory:
        parts.append(f"# Memory of earlier steps\n{ask.memory}")
    if ask.parent is not None:
        parts.append(f"# Script of step {ask.parent.id}\n```python\n{ask.parent.code}\n```")
    if ask.stage == "draft":
        parts.append("Write a first script: simple, sound, unlike those in the memory.")
    elif ask.stage == "debug":
        parts.append(f"# It failed\n```\n{ask.output[-_ERROR_CHARS:]}\n```\nRepair it.")
    else:
        parts.append(
            "It is the best so far. Follow the directions in the memory: make one change that "
            "should improve the cross-validation score, and say in the plan which."
        )
    return "\n\n".join(parts)


def _criticise(ask: Ask, node: Node) -> str:
    outcome = f"cross-validation score {node.cv:.5f}" if node.cv is not None else node.error
    return "\n\n".join(
        (
            f"# Task\n{ask.view.description}",
            f"# Memory of earlier steps\n{ask.memory}",
            f"# Step {node.id} ({node.stage})\n{node.plan}\n```python\n{node.code}\n```",
            f"Outcome: {outcome}",
            "Criticise this step: what worked, what did not, what it teaches. Then name the one "
            "most promising direction for the next step. At most 120 words, no code.",
        )
    )
