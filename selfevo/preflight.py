"""What a campaign needs on this machine, looked at before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_tools.paths import script_python
from selfevo.arms import FULL_ISOLATION


def check_machine(suite_name: str, measured: str | None = None) -> None:
    """What is trained on and what is measured is prepared and has its field; policy scripts have a
    Python. `measured` is the gate's suite, the same one unless named.

    Raises `UserError` with the command that repairs the first thing that is missing.
    """
    from agent_tools.mle_bench.registry import load_competition, load_suite

    script_python()
    trained, gated = load_suite(suite_name), load_suite(measured or suite_name)
    for competition_id in trained.ids("train"):
        load_competition(competition_id, suite=trained).field("dev")
    for competition_id in gated.ids("val"):
        load_competition(competition_id, suite=gated).field("private")


def check_sandbox(train: Mapping[str, Any]) -> tuple[str, ...]:
    """What this host does not give of the isolation of the lab's scripts, with the repairs.

    `train` is the content of configs/train.yaml. Raises `InfraError` where the sandbox does not
    start, and `UserError` where something is missing though the lab requires full isolation.
    """
    from agent_tools.sandbox import missing_protections, require_full

    chosen = train.get("sandbox")
    chosen = chosen if isinstance(chosen, dict) else {}
    missing = missing_protections(chosen.get("kind", "bubblewrap"))
    if chosen.get(FULL_ISOLATION) is True:
        require_full(missing)
    return missing


def suite_version(suite_name: str) -> int:
    """Version of a suite; `UserError` for an unknown name."""
    from agent_tools.mle_bench.registry import load_suite

    return load_suite(suite_name).version
