"""Run jobs that outlive the caller: one Job protocol, one back end a module."""

from agent_tools.launcher.local import Job, JobSpec, JobStatus, LocalLauncher

__all__ = ["Job", "JobSpec", "JobStatus", "LocalLauncher"]
