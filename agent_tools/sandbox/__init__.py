"""Run untrusted Python scripts: warm workers, isolated, with limits on everything.

with make_pool("bubblewrap", workers=2) as pool:
    results = pool.run([ScriptJob(code=text, inputs=folder)])
"""

from agent_tools.sandbox.pool import WarmPool, make_pool
from agent_tools.sandbox.types import (
    Limits,
    PoolKind,
    SandboxError,
    ScriptJob,
    ScriptPool,
    ScriptResult,
    Status,
)

__all__ = [
    "Limits",
    "PoolKind",
    "SandboxError",
    "ScriptJob",
    "ScriptPool",
    "ScriptResult",
    "Status",
    "WarmPool",
    "make_pool",
]
