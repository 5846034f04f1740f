"""Run jobs that outlive the caller: one Job protocol, one back end a module."""

from agent_tools.launcher.local import LocalLauncher
from agent_tools.launcher.protocol import Job, JobSpec, JobStatus, Launcher

__all__ = ["Job", "JobSpec", "JobStatus", "Launcher", "LocalLauncher"]
