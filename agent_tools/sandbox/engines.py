"""The engines by name."""

from __future__ import annotations

from pathlib import Path

from agent_tools.paths import script_python
from agent_tools.sandbox.bubblewrap import BubblewrapSandbox
from agent_tools.sandbox.docker_engine import DockerSandbox
from agent_tools.sandbox.instance import Sandbox
from agent_tools.sandbox.process import ProcessSandbox
from agent_tools.sandbox.types import POOL_KINDS, PoolKind, SandboxError, View


def make_sandbox(
    kind: PoolKind, python: Path | None = None, *, cold: bool = False, view: View | None = None
) -> Sandbox:
    """The engine of a kind. Raises as `make_pool` does."""
    if kind not in POOL_KINDS:
        raise SandboxError(f"sandbox kind {kind!r}: use {', '.join(map(repr, POOL_KINDS))}")
    if cold and kind != "bubblewrap":
        raise SandboxError(f"sandbox kind {kind!r} has no cold form: leave out cold")
    if view is not None and kind != "bubblewrap":
        raise SandboxError(f"sandbox kind {kind!r} shows no folders of the host: use 'bubblewrap'")
    chosen = script_python() if python is None else Path(python).absolute()
    if kind == "bubblewrap":
        return BubblewrapSandbox(chosen, cold=cold, view=view)
    return DockerSandbox(chosen) if kind == "docker" else ProcessSandbox(chosen)
