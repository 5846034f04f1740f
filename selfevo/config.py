"""The lab's configuration: selfevo.yaml, search_space.yaml, configs/eval.yaml, as frozen models.

Unknown keys are errors that name the nearest known key; a YAML fault names its line. Everything
here is a pure function of text.
"""

from __future__ import annotations

import difflib
import io
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML

from agent_tools.config_text import ConfigError, parse_yaml

#: Files that only a person may change; hashed at the start of a campaign.
PROTECTED = ("selfevo.yaml", "search_space.yaml", "configs/eval.yaml")
TRAIN_CONFIG = "configs/train.yaml"
NOTES = "memory/NOTES.md"


class Strict(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ------------------------------------------------------------------ selfevo.yaml


class AgentSection(Strict):
    """Who proposes, and where the model is reached."""

    kind: Literal["model", "rules", "random"] = "model"
    base_url: str = "auto"
    """`auto` serves the bundled checkpoint on a free loopback port for the run's duration."""
    model: str = "nano"
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never stored."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    max_tokens: int = Field(default=256, ge=16)
    max_calls: int = Field(default=8, ge=1, le=64)
    """Model calls a round; together with three failed calls this bounds the tool loop."""
    timeout_s: float = Field(default=120.0, gt=0)

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if url != "auto" and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise ValueError("must be auto, or an address such as http://127.0.0.1:8000/v1")
        return url


class BudgetSection(Strict):
    """What one training job may spend; imposed on both arms by the harness."""

    steps: int = Field(default=5, ge=1)
    scripts_per_step: int = Field(default=24, ge=2)
    tokens_per_script: int = Field(default=256, ge=16)
    cpu_seconds_per_script: float = Field(default=3.0, gt=0)
    job_wall_s: float = Field(default=900.0, gt=0)
    """Wall limit of one training or evaluation job."""
    campaign_hours: float = Field(default=0.0, ge=0)
    """No new round starts after this many hours of work; 0 = no limit."""


class GateSection(Strict):
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """One-sided error rate of the whole campaign; a round gets alpha / planned rounds."""
    parent: Literal["base", "incumbent"] = "base"
    max_budget_ratio: float = Field(default=1.1, ge=1)
    max_infra_share: float = Field(default=0.1, ge=0, lt=1)
    confirm_seeds: int = Field(default=0, ge=0)
    """Fresh train seeds an arm that measure a kept change again; 0 = kept changes stay as they are.

    A change that is not better on them at `confirm_alpha` is taken back by a revert commit.
    """
    confirm_alpha: float = Field(default=0.1, gt=0, lt=0.5)

    @field_validator("confirm_seeds")
    @classmethod
    def _has_a_variance(cls, seeds: int) -> int:
        if seeds == 1:
            raise ValueError("must be 0 (off) or at least 2; one seed has no variance")
        return seeds


class LauncherSection(Strict):
    kind: Literal["local"] = "local"
    parallel: int = Field(default=1, ge=1)
    """Jobs at the same time."""
    threads: int = Field(default=0, ge=0)
    """Threads a job (OMP_NUM_THREADS); 0 = the library's choice."""


class LabConfig(Strict):
    """selfevo.yaml."""

    rounds: int = Field(default=2, ge=1)
    review: Literal["auto", "always"] = "auto"
    suite: str = "offline-small-v0"
    agent: AgentSection = AgentSection()
    budget: BudgetSection = BudgetSection()
    gate: GateSection = GateSection()
    launcher: LauncherSection = LauncherSection()


class EvalConfig(Strict):
    """configs/eval.yaml: how an arm is measured."""

    suite: str | None = None
    """Suite whose val competitions the gate measures; None is the lab's own."""
    split: Literal["val"] = "val"
    train_seeds: int = Field(default=2, ge=2)
    """Training runs an arm; the unit of the gate's test."""
    samples: int = Field(default=16, ge=2)
    """Scripts a competition and train seed."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    seed: int = Field(default=0, ge=0)


# ------------------------------------------------------------------ search_space.yaml


class KeySpec(Strict):
    """One editable key of configs/train.yaml.

    `scale: log` makes `step` a factor, `linear` an addend; a choice moves by one place.
    """

    type: Literal["float", "int", "choice"]
    min: float | None = None
    max: float | None = None
    values: tuple[float, ...] = ()
    scale: Literal["log", "linear"] = "linear"
    step: float = 1.0
    from_zero: float | None = None
    """Value that an increase from 0 goes to, where `scale` is log."""
    compute: Literal["train", "rollout", "none"] = "train"
    note: str = ""

    @model_validator(mode="after")
    def _complete(self) -> KeySpec:
        if self.type == "choice":
            if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
                raise ValueError("a choice needs at least two different values in rising order")
            return self
        if self.min is None or self.max is None or not self.min < self.max:
            raise ValueError("needs min and max with min < max")
        if self.scale == "log" and (self.step <= 1 or self.max <= 0):
            raise ValueError("scale log needs step > 1 (a factor) and max > 0")
        if self.scale == "linear" and self.step <= 0:
            raise ValueError("scale linear needs step > 0 (an addend)")
        return self


class SearchSpace(Strict):
    """search_space.yaml: what the agent may change, and by how much at once."""

    max_keys: int = Field(default=1, ge=1)
    """Keys that one PR may change."""
    keys: dict[str, KeySpec]


def one_step(spec: KeySpec, value: float, direction: str) -> float | int:
    """`value` moved by one largest step in `direction`, kept inside the range.

    Returns the same value where no further step exists; ints stay ints. Log steps are rounded to
    three significant digits, so configs stay legible.
    """
    up = direction == "increase"
    if spec.type == "choice":
        values = spec.values
        if up:
            later = [v for v in values if v > value]
            return _plain(later[0]) if later else _plain(value)
        earlier = [v for v in values if v < value]
        return _plain(earlier[-1]) if earlier else _plain(value)
    assert spec.min is not None and spec.max is not None
    if spec.scale == "log":
        if value == 0:
            moved = (spec.from_zero or spec.min) if up else 0.0
        else:
            moved = float(f"{value * spec.step if up else value / spec.step:.3g}")
    else:
        moved = value + spec.step if up else value - spec.step
        moved = float(f"{moved:.12g}")
    moved = min(max(moved, spec.min), spec.max)
    if spec.type == "int":  # rounded towards `value`, so that the step stays inside the limit
        return math.floor(moved) if up else math.ceil(moved)
    return moved


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def edit_fault(spec: KeySpec, before: Any, after: Any) -> str | None:
    """Why `after` is not an allowed value for a key that holds `before`; None if it is."""
    if isinstance(after, bool) or not isinstance(after, (int, float)):
        return f"needs a number, got {after!r}"
    if not math.isfinite(after):
        return f"needs a finite number, got {after!r}"
    if spec.type == "int" and not isinstance(after, int):
        return f"needs a whole number, got {after!r}"
    if spec.type == "choice":
        if after not in spec.values:
            return f"must be one of {', '.join(f'{v:g}' for v in spec.values)}, got {after:g}"
        if before not in spec.values or isinstance(before, bool):
            return None
        if type(after) is not type(before):
            return f"needs a value written like {before!r}, got {after!r}"
        places = abs(spec.values.index(after) - spec.values.index(before))
        return f"moves by {places} places, the largest step is one" if places > 1 else None
    assert spec.min is not None and spec.max is not None
    if not spec.min <= after <= spec.max:
        return f"must lie in [{spec.min:g}, {spec.max:g}], got {after:g}"
    if isinstance(before, (int, float)) and not isinstance(before, bool):
        return _step_fault(spec, float(before), float(after))
    return None


def _step_fault(spec: KeySpec, before: float, after: float) -> str | None:
    slack = 1 + 1e-9
    if spec.scale == "linear":
        if abs(after - before) > spec.step * slack:
            return f"moves by {abs(after - before):g}, the largest step is {spec.step:g}"
        return None
    if before <= 0 or after <= 0:
        if before == 0 and after > (spec.from_zero or spec.min or 0) * slack:
            return f"from 0 the largest step goes to {spec.from_zero or spec.min:g}"
        return None
    ratio = max(after / before, before / after)
    # one_step rounds to three digits, which may pass the bare factor by half a digit
    if ratio > spec.step * 1.005:
        return f"moves by a factor of {ratio:.3g}, the largest step is {spec.step:g}"
    return None


# ------------------------------------------------------------------ reading

ModelT = TypeVar("ModelT", bound=BaseModel)


def validate(kind: type[ModelT], data: Mapping[str, Any], where: str) -> ModelT:
    """Build `kind` from `data`; the likeliest fault becomes a one-line `ConfigError`."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_fault(kind, error)}") from error


def load_lab_config(text: str, overrides: Mapping[str, Any] | None = None) -> LabConfig:
    """selfevo.yaml with dotted `overrides` (`{"agent.kind": "rules"}`) on top."""
    data = parse_yaml(text, "selfevo.yaml")
    for key, value in (overrides or {}).items():
        node = data
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return validate(LabConfig, data, "selfevo.yaml")


def load_space(text: str) -> SearchSpace:
    """search_space.yaml."""
    return validate(SearchSpace, parse_yaml(text, "search_space.yaml"), "search_space.yaml")


def load_eval(text: str, train_seeds: int | None = None) -> EvalConfig:
    """configs/eval.yaml; `train_seeds` overrides the number of training runs an arm."""
    data = parse_yaml(text, "configs/eval.yaml")
    if train_seeds is not None:
        data["train_seeds"] = train_seeds
    return validate(EvalConfig, data, "configs/eval.yaml")


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists stay values."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{name}."))
        else:
            out[name] = value
    return out


def dump_yaml(data: Mapping[str, Any]) -> str:
    """`data` as block YAML, in the order given."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(dict(data), stream)
    return stream.getvalue()


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class."""
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def nearest(word: str, known: Iterable[str]) -> str:
    """The known dotted key most like `word`, by whole key and by last part."""
    tail = word.rsplit(".", 1)[-1]

    def likeness(key: str) -> float:
        whole = difflib.SequenceMatcher(None, word, key).ratio()
        return whole + difflib.SequenceMatcher(None, tail, key.rsplit(".", 1)[-1]).ratio()

    return max(known, key=likeness)


def _fault(kind: type[BaseModel], error: ValidationError) -> str:
    faults = error.errors()
    # an unknown key is the likeliest cause of the other faults, so it is told first
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = known_keys(kind)
        if kind is SearchSpace and key.startswith("keys."):
            prefix = key.rsplit(".", 1)[0]
            known = [f"{prefix}.{name}" for name in KeySpec.model_fields]
        return f"unknown key {key!r}; the nearest known key is {nearest(key, known)!r}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"key {key!r} is missing; add it"
    return f"{key}: {message} (got {fault['input']!r})" if key else message
