"""The `agent:` section of a run file: which agent, and its options. Unknown keys are errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rl.agents.context import INSTRUCTION, Action, Drop, Policy, Summarise, Truncate
from rl.strict import Strict

CALL_PATTERN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class DropResults(Strict):
    do: Literal["drop"] = "drop"
    keep: int = Field(default=1, ge=0)
    stub: str = "(old result left out)"
    roles: tuple[Literal["tool", "user"], ...] = ("tool",)

    def action(self) -> Action:
        return Drop(self.keep, self.stub, tuple(self.roles))


class SummariseWork(Strict):
    do: Literal["summarise"] = "summarise"
    keep: int = Field(default=1, ge=0)
    max_tokens: int = Field(default=128, ge=1)
    instruction: str = INSTRUCTION

    def action(self) -> Action:
        return Summarise(self.keep, self.max_tokens, self.instruction)


class TruncateHistory(Strict):
    do: Literal["truncate"] = "truncate"
    keep: int = Field(default=1, ge=0)

    def action(self) -> Action:
        return Truncate(self.keep)


ContextAction = Annotated[DropResults | SummariseWork | TruncateHistory, Field(discriminator="do")]


class ContextSection(Strict):
    """Keep the context of each call within `budget` prompt tokens (`rl.agents.context`)."""

    budget: int = Field(ge=1)
    target: float = Field(default=0.5, ge=0, le=1)
    actions: tuple[ContextAction, ...] = (DropResults(), TruncateHistory())
    keep: Literal["stored", "template"] = "stored"
    """As the gateway's option: what it says of earlier replies counts."""

    def policy(self) -> Policy:
        return Policy(self.budget, self.target, tuple(item.action() for item in self.actions))


class MleAgent(Strict):
    """Our own environment (`rl.envs.mle`), seen from the gateway like any other agent."""

    kind: Literal["mle"] = "mle"
    context: ContextSection | None = None
    tokenizer: str = "nano"
    """Checkpoint whose tokenizer counts the budget's tokens."""


class LangGraphOptions(Strict):
    """A LangGraph graph with the tools of script competitions."""

    kind: Literal["langgraph"] = "langgraph"
    model: str = "nano"
    """The name that requests give."""
    graph: str = Field(default="rl.agents.langgraph_mle:build", pattern=CALL_PATTERN)
    """`module:function` of the builder (`rl.agents.langgraph_env`)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the builder."""
    scripts: int = Field(default=8, ge=1)
    steps: int = Field(default=64, ge=1)
    is_async: bool = False
    """The graph's nodes are coroutines."""


class MleGrader(Strict):
    """The competition's own: percentile of the submission / 100."""

    kind: Literal["mle"] = "mle"


class CommandGrader(Strict):
    """A command in the folder that the agent left, in a fresh sandbox: its exit code 0 earns 1,
    others 0; with `number` the last line that it prints is the reward, from 0 to 1."""

    kind: Literal["command"] = "command"
    command: tuple[str, ...] = Field(min_length=1)
    number: bool = False
    seconds: float = Field(default=60.0, gt=0)


class PythonGrader(Strict):
    """`module:function`, called with the task and the folder that the agent left; returns the
    reward, from 0 to 1. It runs in this process and must not execute what it finds."""

    kind: Literal["python"] = "python"
    call: str = Field(pattern=CALL_PATTERN)


GraderSection = Annotated[MleGrader | CommandGrader | PythonGrader, Field(discriminator="kind")]


class CommandOptions(Strict):
    """Any program that reads its endpoint from the environment (`rl.agents.command`)."""

    kind: Literal["command"] = "command"
    model: str = "nano"
    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments. `{prompt}`, `{model}` and `{task}` are filled in."""
    grader: GraderSection = MleGrader()
    tasks: str | None = None
    """Folder of tasks of your own (`rl.agents.tasks`); None: the run's competitions."""
    isolation: Literal["bubblewrap", "none"] = "bubblewrap"
    """`none`: on this machine with your rights. Only for agents that you trust, with whatever
    their model may tell them to do."""
    python: str | None = None
    """Interpreter that the sandbox shows, with its packages; None: the script environment's."""
    env: dict[str, str] = Field(default_factory=dict)
    keep: str | None = None
    """Folder for what agents print, a folder an episode; None: it is thrown away."""
    memory_mb: int = Field(default=2048, ge=64)
    processes: int = Field(default=256, ge=1)
    disk_mb: int = Field(default=512, ge=1)


class MiniSweOptions(Strict):
    """mini-swe-agent as released (`make setup-agents`)."""

    kind: Literal["mini-swe-agent"] = "mini-swe-agent"
    model: str = "nano"
    config: tuple[str, ...] = ("mini.yaml",)
    """Its own `-c` options: names of its bundled files, files, `key.sub=value`."""
    steps: int = Field(default=50, ge=1)
    grader: GraderSection = MleGrader()
    tasks: str | None = None
    keep: str | None = None
    memory_mb: int = Field(default=2048, ge=64)
    processes: int = Field(default=256, ge=1)
    disk_mb: int = Field(default=512, ge=1)


AgentSection = Annotated[
    MleAgent | LangGraphOptions | CommandOptions | MiniSweOptions, Field(discriminator="kind")
]
