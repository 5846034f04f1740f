"""What a campaign needs on this machine, looked at before anything is made."""

from __future__ import annotations

from agent_tools.paths import script_python


def check_machine(suite_name: str) -> None:
    """Every competition of the suite is prepared and has its field; policy scripts have a Python.

    Raises `UserError` with the command that repairs the first thing that is missing.
    """
    from agent_tools.mle_bench.registry import load_competition, load_suite

    script_python()
    suite = load_suite(suite_name)
    for ref in suite.competitions:
        competition = load_competition(ref.id, suite=suite)
        competition.field("private" if ref.split == "val" else "dev")


def suite_version(suite_name: str) -> int:
    """Version of a suite; `UserError` for an unknown name."""
    from agent_tools.mle_bench.registry import load_suite

    return load_suite(suite_name).version
