"""Run untrusted scripts, isolated, with limits on everything.

with make_pool("bubblewrap", workers=2) as pool:
    results = pool.run([ScriptJob(code=text, inputs=folder)])
"""

from agent_tools.sandbox.isolation import missing_protections, require_full
from agent_tools.sandbox.pool import WarmPool, make_pool
from agent_tools.sandbox.types import (
    POOL_KINDS,
    Limits,
    PoolKind,
    SandboxError,
    ScriptJob,
    ScriptPool,
    ScriptResult,
    Status,
)

__all__ = [
    "POOL_KINDS",
    "Limits",
    "PoolKind",
    "SandboxError",
    "ScriptJob",
    "ScriptPool",
    "ScriptResult",
    "Status",
    "WarmPool",
    "make_pool",
    "missing_protections",
    "require_full",
]
