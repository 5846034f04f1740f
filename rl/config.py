"""Run files: YAML → typed, frozen configuration. No torch here, so a dry run is fast.

A run file holds any part of `RunConfig`; `-c FILE` files merge over it left to right, then
`a.b=value` overrides. Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from agent_tools.config_text import parse_yaml
from rl.agents.options import AgentSection, MleAgent
from rl.errors import ConfigError
from rl.strict import Strict as Strict

ObjectiveName = Literal["cispo", "grpo", "ppo_clip", "reinforce", "expert_iteration"]


class ModelSection(Strict):
    checkpoint: str = "nano"
    """`nano` = the bundled model, or a checkpoint folder."""


class BudgetSection(Strict):
    """What a run may spend: imposed by the harness, never edited by an agent."""

    steps: int = Field(default=5, ge=1)
    scripts_per_step: int = Field(default=24, ge=2)
    tokens_per_script: int = Field(default=256, ge=1)
    cpu_seconds_per_script: float = Field(default=3.0, gt=0)


class DynamicSamplingSection(Strict):
    """DAPO's dynamic sampling (MiniMax-M1 §3.1): groups without spread are left out of the update
    and replaced by further groups, at most `refills` times a step. Every script counts against the
    run's `steps` × `scripts_per_step`, so a run that refills has fewer steps."""

    refills: int = Field(default=0, ge=0)


class TruncationSection(Strict):
    """What becomes of a reply cut at the token limit (finish reason `length` or `repetition`).

    `train`: nothing; its verifier judges it (the M2 report names no rule). `mask`: its tokens are
    neither in the loss nor in the denominator. `penalise`: DAPO's soft penalty, as in M1: a call of
    n tokens earns clip((max_new_tokens − buffer − n) / buffer, −1, 0) × `penalty`, cut or not.
    """

    rule: Literal["train", "mask", "penalise"] = "train"
    buffer: int = Field(default=32, ge=1)
    penalty: float = Field(default=1.0, gt=0)


class RepetitionSection(Strict):
    """M1 §5: a reply ends after `tokens` tokens in a row, each likelier than `probability`."""

    tokens: int = Field(default=3000, ge=1)
    probability: float = Field(default=0.99, gt=0, lt=1)


class RolloutSection(Strict):
    group_size: int = Field(default=8, ge=2)
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=256, ge=1)
    turns: int = Field(default=1, ge=1)
    dynamic_sampling: DynamicSamplingSection = DynamicSamplingSection()
    truncation: TruncationSection = TruncationSection()
    repetition_stop: RepetitionSection = RepetitionSection()


class RewardSection(Strict):
    """r_t = `process` · process_t + `speed` · h(T / T_baseline) + outcome (M2 report §6.1.5), and
    G_t = Σ γ^(τ−t) r_τ. The report gives no values; see `rl.rewards` for ours."""

    process: float = 0.0
    speed: float = Field(default=0.0, ge=0)
    speed_clip: float = Field(default=0.5, gt=0)
    speed_clock: Literal["wall", "work"] = "wall"
    """T: seconds of the whole attempt, or of its calls and tools alone."""
    gamma: float = Field(default=1.0, gt=0, le=1)


class OptimSection(Strict):
    """AdamW as in MiniMax-M1 §3.2: gradients span 1e-18 … 1e-5, hence eps 1e-15."""

    lr: float = Field(default=3.0e-4, gt=0)
    warmup_steps: int = Field(default=5, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1.0e-15, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimiser updates a step. The batch is shuffled and cut into `updates_per_batch` / `passes`
    minibatches, and gone through `passes` times."""
    passes: int = Field(default=1, ge=1)
    micro_batch: int = Field(default=24, ge=1)
    """Rows a backward pass of imitation; any value gives the same gradient."""
    pack_tokens: int = Field(default=16_384, ge=1)
    """Tokens with graph a backward pass of policy gradients, prefixes merged where that pays
    (`rl.tree_update`); any value gives the same gradient."""


class CispoSection(Strict):
    is_weight_max: float = Field(default=5.0, gt=0)
    """The ceiling of the importance weight itself (not 1 + epsilon); there is no floor."""
    mask_low: float | None = Field(default=None, ge=0)
    """M1's mask: no gradient where A < 0 and ratio < 1 − mask_low; off by default."""
    mask_high: float | None = Field(default=None, ge=0)
    """The same where A > 0 and ratio > 1 + mask_high."""


class ClipSection(Strict):
    """The ratio is clipped to [1 − `low`, 1 + `high`]."""

    low: float = Field(default=0.2, gt=0, le=1)
    high: float = Field(default=0.2, gt=0)


class ExpertIterationSection(Strict):
    """Rejection fine-tuning: every `round_steps` steps, imitate the best scripts seen so far."""

    round_steps: int = Field(default=10, ge=1)
    keep_per_competition: int = Field(default=8, ge=1)
    updates: int = Field(default=32, ge=1)
    batch: int = Field(default=36, ge=1)
    lr: float = Field(default=2.0e-4, gt=0)


class EnvSection(Strict):
    cpu_seconds: float = Field(default=3.0, gt=0)


class SandboxSection(Strict):
    kind: Literal["bubblewrap", "docker", "process"] = "bubblewrap"
    workers: int = Field(default=2, ge=1)
    require_full_isolation: bool = False


class StopSection(Strict):
    """`drift`: end with exit 6 when the gradient norm is over `grad_norm_factor` times its 10-step
    median while the valid share fell by `valid_drop` from its 10-step median."""

    rule: Literal["none", "drift"] = "none"
    grad_norm_factor: float = Field(default=2.0, gt=1)
    valid_drop: float = Field(default=0.10, gt=0)


class WandbSection(Strict):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "selfevo"
    group: str | None = None
    name: str | None = None
    job_type: str = "train"


class ForgeSection(Strict):
    """`async`: workers, engine, gateway and trainer as processes, generation beside training."""

    mode: Literal["sync", "async"] = "sync"
    parts: str = Field(default="rl.agents.parts:agent_parts", pattern=r"^[\w.]+:\w+$")
    """`module:function` from the run file to what is trained against (`rl.parts`)."""
    workers: int = Field(default=2, ge=1)
    """Rollout processes."""
    episodes_per_worker: int = Field(default=16, ge=1)
    """Threads of one of them."""
    steps_ahead: int = Field(default=1, ge=0)
    """S: (S + 1) × groups a step are in flight."""
    order: Literal["fifo", "windowed", "greedy"] = "windowed"
    window_share: float = Field(default=0.3, gt=0, le=1)
    """W / N of order `windowed`."""
    zero_variance: Literal["drop", "keep"] = "drop"
    """`drop`: a group of equal returns is consumed and released at once, not trained on. It counts
    against the run's `steps` × `scripts_per_step`, so a run that drops has fewer steps."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Wall-clock limit of an episode; what is not done then is a timeout, and earns 0."""
    episode_calls: int = Field(default=256, ge=1)
    episode_tokens: int = Field(default=1_000_000, ge=1)
    repeat: Literal["join", "sample"] = "join"
    """A request equal to an earlier one of its episode: its answer again, or a call of its own."""
    attempts: int = Field(default=5, ge=1)
    """Runs of one episode that die of their own; then it is an `env_error`."""
    restarts: int = Field(default=10, ge=0)
    """Deaths in a row of one process, without a step between them; then the run ends."""
    start_timeout_s: float = Field(default=900.0, gt=0)
    step_timeout_s: float = Field(default=3600.0, gt=0)
    sync_timeout_s: float = Field(default=300.0, gt=0)
    engine: Literal["own", "vllm"] = "own"
    engine_options: tuple[str, ...] = ()
    """Further options of `model.serve`."""
    sync: Literal["file", "ipc"] = "file"
    """How weights reach the engine; `ipc` through the memory of the card that both share."""
    probe_calls: int = Field(default=16, ge=0)
    """Calls a step that are scored before the update: trainer against engine."""


class RunConfig(Strict):
    """One training run (`python -m rl.train`)."""

    seed: int = Field(default=0, ge=0)
    model: ModelSection = ModelSection()
    suite: str = "offline-small-v0"
    competitions: tuple[str, ...] = ()
    """Ids of the train split; empty = all of them."""
    objective: ObjectiveName = "cispo"
    budget: BudgetSection = BudgetSection()
    rollout: RolloutSection = RolloutSection()
    optim: OptimSection = OptimSection()
    cispo: CispoSection = CispoSection()
    grpo: ClipSection = ClipSection()
    ppo_clip: ClipSection = ClipSection()
    reward: RewardSection = RewardSection()
    expert_iteration: ExpertIterationSection = ExpertIterationSection()
    env: EnvSection = EnvSection()
    agent: AgentSection = MleAgent()
    """Who attempts the tasks of an asynchronous run."""
    sandbox: SandboxSection = SandboxSection()
    forge: ForgeSection = ForgeSection()
    scaffold: str | None = None
    pool: str | None = None
    """Where calls and rewards are kept: a file (relative to the run directory) or a PostgreSQL
    URL; `--from-pool` computes the run's updates again from it. An asynchronous run always has
    one: `pool.sqlite` if nothing else is named."""
    checkpoint_every: int = Field(default=1, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    stop: StopSection = StopSection()
    wandb: WandbSection = WandbSection()
    device: str = "auto"

    @model_validator(mode="after")
    def _within_budget(self) -> RunConfig:
        if self.rollout.max_new_tokens > self.budget.tokens_per_script:
            raise ValueError(
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} is above "
                f"budget.tokens_per_script {self.budget.tokens_per_script}; lower the first"
            )
        if self.env.cpu_seconds > self.budget.cpu_seconds_per_script:
            raise ValueError(
                f"env.cpu_seconds {self.env.cpu_seconds} is above "
                f"budget.cpu_seconds_per_script {self.budget.cpu_seconds_per_script}; "
                "lower the first"
            )
        scripts, group = self.budget.scripts_per_step, self.rollout.group_size
        if scripts % group or scripts < group:
            raise ValueError(
                f"budget.scripts_per_step {scripts} is not a multiple of rollout.group_size "
                f"{group}; choose a divisor of {scripts}"
            )
        updates, passes = self.optim.updates_per_batch, self.optim.passes
        if updates % passes:
            raise ValueError(
                f"optim.updates_per_batch {updates} is not a multiple of optim.passes {passes}; "
                f"choose passes that divide {updates}"
            )
        truncation = self.rollout.truncation
        if truncation.rule == "penalise" and truncation.buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"rollout.truncation.buffer {truncation.buffer} is above rollout.max_new_tokens "
                f"{self.rollout.max_new_tokens}; lower it"
            )
        if self.objective == "expert_iteration" and self.rollout.dynamic_sampling.refills:
            raise ValueError(
                "rollout.dynamic_sampling.refills is for objectives with a group baseline, not "
                "for expert_iteration; set it to 0"
            )
        if self.forge.mode == "async" and self.rollout.dynamic_sampling.refills:
            raise ValueError(
                "rollout.dynamic_sampling.refills is the synchronous loop's; with forge.mode async "
                "set forge.zero_variance"
            )
        if self.forge.sync == "ipc" and self.forge.engine != "vllm":
            raise ValueError("forge.sync ipc needs forge.engine vllm; use sync file")
        if self.forge.mode == "async" and self.forge.engine == "vllm" and self.repetition:
            raise ValueError(
                f"rollout.repetition_stop: forge.engine vllm cannot end a reply after "
                f"{self.repetition[0]} tokens in a row; use engine own, or set its tokens to "
                f"rollout.max_new_tokens {self.rollout.max_new_tokens} or more, which turns it off"
            )
        return self

    @property
    def repetition(self) -> tuple[int, float] | None:
        """The repetition stop as requests have it; None where no reply is long enough for it."""
        stop = self.rollout.repetition_stop
        within = stop.tokens < self.rollout.max_new_tokens
        return (stop.tokens, stop.probability) if within else None

    @property
    def groups_per_step(self) -> int:
        return self.budget.scripts_per_step // self.rollout.group_size


# ------------------------------------------------------------------ loading

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError names the file and line of a syntax error."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give an existing YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}); mend it") from error
    return parse_yaml(text, str(path))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge key by key, everything else (lists too) is replaced."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            out[key] = merge(old, value)
        else:
            out[key] = value
    return out


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` → `{"a": {"b": value}}`; the value is YAML."""
    key, sign, raw = text.partition("=")
    if not sign or not key.strip() or any(not part for part in key.strip().split(".")):
        raise ConfigError(
            f"override {text!r} is not of the form a.b=value; write e.g. optim.lr=3e-4"
        )
    try:
        value: Any = YAML(typ="safe", pure=True).load(raw) if raw.strip() else None
    except YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from error
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def load_data(
    path: Path, merges: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """File, then `-c` files left to right, then overrides, as one plain mapping."""
    data = read_yaml(path)
    for extra in merges:
        data = merge(data, read_yaml(extra))
    for text in overrides:
        data = merge(data, parse_override(text))
    return data


def validate(kind: type[ConfigT], data: Mapping[str, Any], where: str) -> ConfigT:
    """Build `kind` from `data`; the first fault becomes a one-line ConfigError."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_fault(kind, error, data)}") from error


def load_config(
    path: Path, merges: Sequence[Path] = (), overrides: Sequence[str] = ()
) -> RunConfig:
    """The resolved `RunConfig` of a run file."""
    return validate(RunConfig, load_data(path, merges, overrides), str(path))


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, every value, in declaration order."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(config.model_dump(mode="json"), stream)
    return stream.getvalue()


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a configuration class, those of its sections and list items included."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        for inner in _models_in(field.annotation):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _written(loc: Iterable[str | int], data: Any) -> list[str]:
    """The key as its file has it: without the kind that pydantic names once inside a section."""
    key: list[str] = []
    named = True
    for part in loc:
        if not named and isinstance(data, Mapping) and part in (data.get("kind"), data.get("do")):
            named = True
            continue
        key.append(str(part))
        named = False
        try:
            data = data[part]
        except (TypeError, KeyError, IndexError):  # missing, or no section at all
            data = None
    return key


def _first_fault(kind: type[BaseModel], error: ValidationError, data: Any) -> str:
    faults = error.errors()
    # an unknown key is the likeliest cause of other faults, so it is reported first
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    key = ".".join(_written(fault["loc"], data))
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}; nearest known key is {nearest(key, known_keys(kind))!r}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {fault['input']!r})" if key else message


def nearest(word: str, known: Iterable[str]) -> str:
    """The known dotted key most like `word`, judged by whole key and by last part."""
    tail = word.rsplit(".", 1)[-1]

    def likeness(key: str) -> float:
        whole = difflib.SequenceMatcher(None, word, key).ratio()
        last = difflib.SequenceMatcher(None, tail, key.rsplit(".", 1)[-1]).ratio()
        return whole + last

    return max(known, key=likeness)
