"""Run untrusted programs, isolated, with limits on everything: scripts in pools, and shells.

with make_pool("bubblewrap", workers=2) as pool:
    results = pool.run([ScriptJob(code=text, inputs=folder)])
with open_shell("bubblewrap") as shell:
    shell.run("ls")
"""

from agent_tools.sandbox.isolation import missing_protections, require_full
from agent_tools.sandbox.pool import WarmPool, make_pool
from agent_tools.sandbox.shell import Shell, open_shell
from agent_tools.sandbox.snapshot import check_snapshot
from agent_tools.sandbox.types import (
    POOL_KINDS,
    CommandResult,
    Limits,
    PoolKind,
    SandboxError,
    ScriptJob,
    ScriptPool,
    ScriptResult,
    Status,
    View,
)

__all__ = [
    "POOL_KINDS",
    "CommandResult",
    "Limits",
    "PoolKind",
    "SandboxError",
    "ScriptJob",
    "ScriptPool",
    "ScriptResult",
    "Shell",
    "Status",
    "View",
    "WarmPool",
    "check_snapshot",
    "make_pool",
    "missing_protections",
    "open_shell",
    "require_full",
]
