"""mini-swe-agent as its package releases it, unmodified: only its own options are set.

`make setup-agents` installs it into an environment of its own. The whole program runs in the
sandbox, so the commands that its model thinks of do too; its only way out is the model.
"""

from __future__ import annotations

from pathlib import Path

from rl.agents.command import CommandAgent, Place
from rl.agents.graders import Grader

VARIABLES = {
    "MSWEA_CONFIGURED": "true",
    "MSWEA_SILENT_STARTUP": "1",
    "MSWEA_GLOBAL_CONFIG_DIR": "/home/logs/config",
    "MSWEA_COST_TRACKING": "ignore_errors",  # a model of ours has no price
    "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "2",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the network for prices
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "200",
}


def mini_swe_agent(
    python: Path,
    grader: Grader,
    *,
    model: str,
    config: tuple[str, ...] = ("mini.yaml",),
    steps: int = 50,
    place: Place | None = None,
) -> CommandAgent:
    """The agent for `rl.agents.registry`; `python` is the interpreter that has the package."""
    where = place or Place()
    command = [str(python), "-m", "minisweagent.run.mini", "-m", "openai/{model}"]
    command += ["-t", "{prompt}", "--yolo", "--exit-immediately", "-l", "0"]
    for item in (*config, f"agent.step_limit={steps}"):
        command += ["-c", item]
    command += ["-o", "/home/logs/trajectory.json"]
    return CommandAgent(
        tuple(command),
        grader,
        model=model,
        place=Place(
            "bubblewrap", python, where.memory_mb, where.processes, where.disk_mb, where.keep
        ),
        env=VARIABLES,
    )
