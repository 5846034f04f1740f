"""What the policy reads: a one-line task description, the scaffold's words, tool results.

A scaffold is a folder that the improvement loop may edit: `system.md` (the system message),
`turns.md` (optional: the words after each tool result) and `sampling.yaml` (optional:
`temperature`, `turns`). Without one the built-in default applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.policy_text import (
    DEFAULT_SYSTEM,
    describe,
    extract_script,
    one_line,
)
from rl.types import Message

__all__ = [
    "DEFAULT_SYSTEM",
    "DEFAULT_TURNS",
    "Scaffold",
    "describe",
    "extract_script",
    "load_scaffold",
    "one_line",
    "result_text",
    "task_messages",
    "turn_message",
]

DEFAULT_TURNS = "{result}"
_MAX_SYSTEM_CHARS = 4000
_MAX_TURNS = 16


@dataclass(frozen=True)
class Scaffold:
    """Prompt words and sampling rules around the policy.

    `turn_text` must hold `{result}`. `temperature` and `turns` are None where the scaffold leaves
    the choice to the run's configuration.
    """

    system: str = DEFAULT_SYSTEM
    turn_text: str = DEFAULT_TURNS
    temperature: float | None = None
    turns: int | None = None


def load_scaffold(folder: Path | None) -> Scaffold:
    """Read a scaffold folder; None gives the default. Raises `UserError` naming file and repair."""
    if folder is None:
        return Scaffold()
    if not folder.is_dir():
        raise UserError(f"scaffold folder {folder} does not exist: name one that holds system.md")
    system = _read(folder / "system.md")
    if not system:
        raise UserError(f"{folder / 'system.md'} is missing or empty: write the system message")
    if len(system) > _MAX_SYSTEM_CHARS:
        raise UserError(
            f"{folder / 'system.md'} has {len(system)} characters: "
            f"keep it below {_MAX_SYSTEM_CHARS}"
        )
    turn_text = _read(folder / "turns.md") or DEFAULT_TURNS
    if "{result}" not in turn_text:
        raise UserError(f"{folder / 'turns.md'} lacks {{result}}: say where the tool result goes")
    sampling = _sampling(folder / "sampling.yaml")
    return Scaffold(
        system=system,
        turn_text=turn_text,
        temperature=_number(sampling, "temperature", folder, 0.0, 2.0),
        turns=_whole(sampling, "turns", folder, _MAX_TURNS),
    )


def task_messages(facts: TaskFacts, scaffold: Scaffold | None = None) -> list[Message]:
    """The opening of an episode: system message, then the description as the user's."""
    system = (scaffold or Scaffold()).system
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": describe(facts)},
    ]


def result_text(score: float | None, percentile: float, message: str) -> str:
    """A tool result: `score 0.412 percentile 37`, or `error: ` and the last line of the fault."""
    if score is None:
        return f"error: {one_line(message) or 'no valid submission.csv'}"
    return f"score {score:.3f} percentile {percentile:.0f}"


def turn_message(scaffold: Scaffold, result: str) -> Message:
    """The user message that carries a tool result into the next turn."""
    return {"role": "user", "content": scaffold.turn_text.replace("{result}", result)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; make it a UTF-8 text file") from error


def _sampling(path: Path) -> Mapping[str, object]:
    text = _read(path)
    if not text:
        return {}
    try:
        values = YAML(typ="safe").load(text)
    except YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        raise UserError(f"{path}{line}: not YAML; mend the syntax") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is not a mapping: write `temperature: 1.0`")
    unknown = sorted(set(values) - {"temperature", "turns"})
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}; known are temperature and turns")
    return values


def _number(
    values: Mapping[str, object], key: str, folder: Path, low: float, high: float
) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(
            f"{folder / 'sampling.yaml'}: {key} is {value!r}; give a number from {low} to {high}"
        )
    return float(value)


def _whole(values: Mapping[str, object], key: str, folder: Path, high: int) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise UserError(
            f"{folder / 'sampling.yaml'}: {key} is {value!r}; give a whole number, 1 to {high}"
        )
    return value
