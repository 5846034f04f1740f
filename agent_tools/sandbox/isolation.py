"""What a host does not give, found out without running a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agent_tools.sandbox.engines import make_sandbox
from agent_tools.sandbox.types import Limits, PoolKind, SandboxError
from agent_tools.sandbox.workers import start_instance


def missing_protections(kind: PoolKind, python: Path | None = None) -> tuple[str, ...]:
    """Protections that a sandbox of this kind lacks here, with the repair, one line each.

    Starts one worker without its packages and ends it. Raises as `make_pool`.
    """
    sandbox = make_sandbox(kind, python)
    instance, ready = start_instance(sandbox, 0, Limits(), "probe")
    instance.stop()
    return (*sandbox.missing, *ready["missing"])


def require_full(missing: Sequence[str]) -> None:
    """Raises SandboxError (exit code 2) where something is missing."""
    if missing:
        raise SandboxError(f"full isolation is required, but missing here: {'; '.join(missing)}")
