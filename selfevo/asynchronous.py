"""Labs whose training jobs run in the asynchronous mode: the section of configs/train.yaml, and
what else has to know of it.

`forge` is the trainer's own section (`docs/forge.md`). It is no key of the search space, so no
proposal moves it, and both arms of a comparison have the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent_tools.errors import InfraError, UserError

Engine = Literal["own", "vllm"]
ENGINES: tuple[Engine, ...] = ("own", "vllm")
IMPORT_LIMIT_S = 420

_HEAD = """
# Jobs as processes that generate while they train (docs/forge.md); the agent cannot change it.
forge:
  mode: async
"""
_BODY: Mapping[Engine, str] = {
    "own": """\
  engine: own
  sync: file                      # how new weights reach the engine
  workers: 2
  episodes_per_worker: 16
""",
    "vllm": """\
  engine: vllm
  sync: ipc                       # through the card's memory; file for a vLLM on the processor
  engine_options: [--dtype, bfloat16, --max-batch, "256", --cache-tokens, "400000", --eager]
  workers: 2
  episodes_per_worker: 32
""",
}


def section(engine: Engine) -> str:
    """The text that `selfevo init --async ENGINE` adds to configs/train.yaml."""
    return _HEAD + _BODY[engine]


@dataclass(frozen=True)
class Rollouts:
    """How a lab's jobs sample. `engine`: None where they take turns with the training."""

    engine: Engine | None = None
    sync: str = "file"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return "synchronous" if self.engine is None else f"asynchronous (engine {self.engine})"


def rollouts_of(train: Mapping[str, Any]) -> Rollouts:
    """What configs/train.yaml says; the trainer's dry run judges whether it is right."""
    forge = train.get("forge")
    if not isinstance(forge, Mapping) or forge.get("mode") != "async":
        return Rollouts()
    options = forge.get("engine_options")
    return Rollouts(
        "vllm" if forge.get("engine") == "vllm" else "own",
        str(forge.get("sync", "file")),
        tuple(map(str, options)) if isinstance(options, Sequence) else (),
    )


def check_engine(train: Mapping[str, Any], python: str = sys.executable) -> str:
    """What the jobs' engine is here, in words. A vLLM is imported by its interpreter; `python` is
    the one that the jobs run under.

    Raises `UserError` for a vLLM that is missing or built for another device, `InfraError` for one
    that does not import.
    """
    found = rollouts_of(train)
    if found.engine != "vllm":
        return "the project's own" + (", in a process of its own" if found.engine else "")
    device = train.get("device")
    command = [python, "-m", "model.vllm_check"]
    command += ["--device", str(device)] if device in ("cpu", "cuda") else []
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=IMPORT_LIMIT_S,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"vLLM cannot be tried: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        message = lines[-1].removeprefix("error: ")
        raise UserError(message) if done.returncode == 2 else InfraError(message)
    vllm = json.loads(done.stdout.strip().splitlines()[-1])
    if found.sync == "ipc" and vllm["device"] != "cuda":
        raise UserError(
            f"forge.sync is ipc, and the vLLM of {vllm['python']} is built for the processor: "
            "set forge.sync to file"
        )
    return (
        f"vLLM {vllm['version']} for {vllm['device']} with torch {vllm['torch']}, "
        f"weights by {found.sync}"
    )
