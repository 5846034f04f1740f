"""How a search spends its budget: named presets, each value of which can be changed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace

from agent_tools.errors import UserError


@dataclass(frozen=True)
class Settings:
    """One search over scripts for one competition.

    steps           scripts in all
    drafts          of these, written from nothing before anything is improved
    width           scripts asked for at once
    debug_depth     attempts in a row at repairing one draft
    debug_share     how often a broken script is repaired instead of the best improved, 0 to 1
    temperature, max_tokens     of the model, a reply
    folds           folds of the public rows that every script is scored on; 0 trusts the number
                    that a script prints as `cross-validation score: X`
    finalists       scripts that are scored on all folds, the others on the first only; 0 is all
    time_limit_s    wall seconds of a run
    script_cpu_s, script_memory_mb     limits of a script; 0 takes the suite's
    feedback        whether the model criticises each step in a second call
    looks           shell commands that the model may run before each script
    memory_chars    of the memory file, shown in a prompt
    gpu             scripts in containers see the machine's GPUs, where it has any
    container       scripts find MLE-bench's paths (/home/data, …), not files beside them
    """

    name: str
    steps: int
    drafts: int
    width: int
    debug_depth: int
    debug_share: float
    temperature: float
    max_tokens: int
    folds: int
    finalists: int
    time_limit_s: float
    script_cpu_s: float
    script_memory_mb: int
    feedback: bool
    looks: int
    memory_chars: int
    gpu: bool
    container: bool

    def __post_init__(self) -> None:
        rules = {
            "steps": self.steps >= 1,
            "drafts": self.drafts >= 1,
            "width": 1 <= self.width <= 256,
            "debug_depth": self.debug_depth >= 0,
            "debug_share": 0 <= self.debug_share <= 1,
            "temperature": 0 <= self.temperature <= 2,
            "max_tokens": self.max_tokens >= 1,
            "folds": self.folds in (0, *range(2, 21)),
            "finalists": self.finalists >= 0,
            "time_limit_s": self.time_limit_s > 0,
            "script_cpu_s": self.script_cpu_s >= 0,
            "script_memory_mb": self.script_memory_mb >= 0,
            "looks": 0 <= self.looks <= 100,
            "memory_chars": self.memory_chars >= 200,
        }
        for key, holds in rules.items():
            if not holds:
                raise UserError(f"setting {key} = {getattr(self, key)}: out of range; see docs")


REAL = Settings(
    name="real",
    steps=500,
    drafts=5,
    width=1,
    debug_depth=3,
    debug_share=0.5,
    temperature=0.7,
    max_tokens=16_384,
    folds=0,
    finalists=0,
    time_limit_s=86_400.0,
    script_cpu_s=0.0,
    script_memory_mb=0,
    feedback=True,
    looks=5,
    memory_chars=24_000,
    gpu=True,
    container=True,
)
"""For a capable model: 24 hours, 500 steps, each followed by its own criticism."""

NANO = replace(
    REAL,
    name="nano",
    steps=40,
    drafts=40,
    width=40,
    debug_depth=0,
    debug_share=0.0,
    temperature=0.6,
    max_tokens=256,
    folds=3,
    finalists=8,
    time_limit_s=300.0,
    feedback=False,
    looks=0,
    memory_chars=2_000,
    gpu=False,
    container=False,
)
"""For the bundled model, which writes a short script from one line about the task, and no second
turn. Temperature and finalists are measured: see docs/mle_scaffold.md."""

PRESETS = {"real": REAL, "nano": NANO}


def make_settings(preset: str, changes: dict[str, str]) -> Settings:
    """A preset with changed values, given as text. Raises `UserError` naming the nearest key."""
    if preset not in PRESETS:
        raise UserError(f"--settings {preset!r}: choose {', '.join(PRESETS)}")
    base = PRESETS[preset]
    known = {field.name: type(getattr(base, field.name)) for field in fields(base)}
    values: dict[str, object] = {}
    for key, text in changes.items():
        if key not in known or key == "name":
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": {', '.join(known)}"
            raise UserError(f"--set {key}: no such setting{hint}")
        values[key] = _parsed(key, text, known[key])
    return replace(base, **values)  # type: ignore[arg-type]


def _parsed(key: str, text: str, kind: type) -> object:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--set {key}={text}: write true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--set {key}={text}: needs a number") from None
