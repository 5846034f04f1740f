"""Run an agent in MLE-bench's format: a folder with config.yaml, a start script and whatever else.

`config.yaml` has one entry for each variant: `start` (relative to the folder's parent, as in
MLE-bench, or to the folder), `kwargs` with `kwargs_type` (argparse, omegaconf), `env_vars`. The
Dockerfile is not built: the agent finds one Python, and `conda activate` does nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_agent.bridge import Bridge
from agent_tools.mle_agent.container import PORT, Container, collect
from agent_tools.mle_bench.registry import Competition
from agent_tools.sandbox import CommandResult, Limits

_SECRET = re.compile(r"^\$\{\{\s*secrets\.([A-Za-z0-9_]+)\s*\}\}$")
_GRACE_S = 60.0
DEFAULT_TIME_S, DEFAULT_STEPS = 86_400, 500

INSTRUCTIONS = """# Instructions

You take part in a machine-learning competition. Its description follows below.

- The data lies in /home/data and is read-only. Train a model on it and predict the test set.
- Write your predictions to /home/submission/submission.csv, whatever the description says about
  submitting: only this file is graded. Keep your code in /home/code and logs in /home/logs.
- `/home/validate_submission.sh FILE.csv` says whether a file could be graded. It gives no score.
- Predictions come from a model that your code trains: no labelling by hand, no answers or
  solutions of others, no other data.
- You have {hours:g} hours and {steps} steps.

# Competition: {competition}

{description}
"""


@dataclass(frozen=True)
class Agent:
    """One variant of an agent folder."""

    id: str
    folder: Path
    start: Path
    arguments: tuple[str, ...]
    environment: dict[str, str]
    secrets: frozenset[str]

    def settings(self) -> dict[str, Any]:
        """What a group of runs says about its agent: no secret, no place on this machine."""
        shown = {k: "secret" if k in self.secrets else v for k, v in self.environment.items()}
        return {
            "start": str(self.start),
            "arguments": list(self.arguments),
            "environment": shown,
        }

    @property
    def time_limit_s(self) -> float:
        return float(self.environment.get("TIME_LIMIT_SECS", DEFAULT_TIME_S))

    @property
    def step_limit(self) -> int:
        return int(self.environment.get("STEP_LIMIT", DEFAULT_STEPS))


@dataclass(frozen=True)
class Ended:
    """What became of an agent's run. `status` as `CommandResult.status`."""

    status: str
    exit_code: int | None
    cpu_s: float
    wall_s: float
    calls: int
    tokens: int


def load_agent(spec: str) -> Agent:
    """`FOLDER` or `FOLDER:VARIANT`. Raises `UserError` naming file and repair."""
    text, _, variant = spec.partition(":")
    folder = Path(text).absolute()
    path = folder / "config.yaml"
    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name an agent's folder") from error
    except YAMLError as error:
        raise UserError(f"{path}: not YAML; mend the syntax") from error
    entries = {
        str(name): entry
        for name, entry in (data.items() if isinstance(data, dict) else ())
        if isinstance(entry, dict) and "start" in entry
    }
    if not entries:
        raise UserError(f"{path}: no entry has a `start` script; add one")
    name = variant or (folder.name if folder.name in entries else next(iter(entries)))
    if name not in entries:
        raise UserError(f"{path}: no variant {name!r}; choose one of {', '.join(entries)}")
    entry = entries[name]
    start = next(
        (place for base in (folder.parent, folder) if (place := base / entry["start"]).is_file()),
        None,
    )
    if start is None or not start.is_relative_to(folder):
        raise UserError(f"{path}: start script {entry['start']!r} is not in {folder}")
    if entry.get("privileged"):
        raise UserError(f"{path}: {name} asks for a privileged container, which there is not")
    return Agent(
        id=re.sub(r"[^A-Za-z0-9.-]+", "-", name),
        folder=folder,
        start=start.relative_to(folder),
        arguments=_arguments(entry, path),
        environment=_environment(entry.get("env_vars") or {}, path),
        secrets=frozenset(
            str(key)
            for key, value in (entry.get("env_vars") or {}).items()
            if _SECRET.match(str(value))
        ),
    )


def run_agent(
    agent: Agent,
    view: Competition,
    bridge: Bridge,
    target: Path,
    *,
    limits: Limits,
    python: Path | None,
    model: str,
    require_full_isolation: bool = False,
) -> Ended:
    """Run an agent on a competition; what it left is written below `target`.

    The limits are the container's; its wall limit is the agent's own time limit plus a minute, and
    MLE-bench's rule that the start script keeps the time is thereby enforced.
    """
    wall = agent.time_limit_s + _GRACE_S
    instructions = INSTRUCTIONS.format(
        hours=agent.time_limit_s / 3600,
        steps=agent.step_limit,
        competition=view.id,
        description=view.description,
    )
    container = Container(
        view.public_dir,
        replace(limits, wall_seconds=wall),
        files={"instructions.txt": instructions},
        folder=agent.folder,
        environment={
            "COMPETITION_ID": view.id,
            "TIME_LIMIT_SECS": f"{agent.time_limit_s:.0f}",
            "STEP_LIMIT": str(agent.step_limit),
            "OPENAI_BASE_URL": f"http://127.0.0.1:{PORT}/v1",
            "OPENAI_API_KEY": "none",  # the bridge adds the real one
            "MODEL": model,
            **agent.environment,
        },
        bridge=bridge.folder,
        gpu=True,
        python=python,
        require_full_isolation=require_full_isolation,
    )
    arguments = " ".join(shlex.quote(argument) for argument in agent.arguments)
    with container as opened:
        started = time.monotonic()
        try:
            done = opened.run(f"bash /home/agent/{shlex.quote(str(agent.start))} {arguments}")
            files = collect(opened)
        except InfraError as error:  # it opened, so this is the agent's doing
            seconds = time.monotonic() - started
            done = CommandResult("killed", None, "", str(error), 0.0, seconds, False)
            files = {}
    _keep(files, target)
    logs = target / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for name, text in (("agent.stdout.txt", done.stdout), ("agent.stderr.txt", done.stderr)):
        (logs / name).write_text(text, encoding="utf-8", errors="replace")
    return Ended(done.status, done.exit_code, done.cpu_s, done.wall_s, bridge.calls, bridge.tokens)


def _keep(files: dict[str, bytes], target: Path) -> None:
    """Write collected files; their paths were checked to stay inside when the archive was."""
    for name in ("submission", "code", "logs"):
        (target / name).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if "/" not in name:
            continue  # a file where a folder was: the agent's doing
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def _arguments(entry: dict[str, Any], path: Path) -> tuple[str, ...]:
    kwargs = entry.get("kwargs") or {}
    kind = entry.get("kwargs_type")
    if kwargs and kind not in ("argparse", "omegaconf"):
        raise UserError(f"{path}: kwargs_type {kind!r}: write argparse or omegaconf")
    if kind == "omegaconf":
        return tuple(f"{key}={value}" for key, value in kwargs.items())
    return tuple(part for key, value in kwargs.items() for part in (f"--{key}", str(value)))


def _environment(values: dict[str, Any], path: Path) -> dict[str, str]:
    """Variables of an entry; a secret comes from our environment, the model's key never does."""
    found = {}
    for key, value in values.items():
        if not re.match(r"^[A-Za-z_][A-Za-z0-9_]*$", str(key)):
            raise UserError(f"{path}: {key!r} is no name of a variable")
        secret = _SECRET.match(str(value))
        if secret is None:
            found[str(key)] = str(value)
        elif not secret.group(1).startswith("OPENAI"):
            if secret.group(1) not in os.environ:
                raise UserError(f"{path}: set the environment variable {secret.group(1)}")
            found[str(key)] = os.environ[secret.group(1)]
    for key in ("TIME_LIMIT_SECS", "STEP_LIMIT"):
        if key in found and not re.match(r"^[1-9]\d{0,8}$", found[key]):
            raise UserError(f"{path}: {key} = {found[key]!r}: give a whole number above 0")
    return found
