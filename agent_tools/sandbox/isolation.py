"""What a host does not give, found out without running a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from agent_tools.sandbox.engines import make_sandbox
from agent_tools.sandbox.types import Limits, PoolKind, SandboxError
from agent_tools.sandbox.workers import start_instance


class Opened(Protocol):
    """A running sandbox: a pool or a shell."""

    @property
    def missing(self) -> tuple[str, ...]: ...

    def close(self) -> None: ...


OpenedT = TypeVar("OpenedT", bound=Opened)


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


def full_or_closed(opened: OpenedT) -> OpenedT:
    """A sandbox with every protection; another is closed. Raises as `require_full`."""
    try:
        require_full(opened.missing)
    except SandboxError:
        opened.close()
        raise
    return opened
