"""Workers without namespaces, for hosts that refuse them: another user (as root), rlimits, seccomp
and Landlock.

Weaker than bubblewrap: a script shares the host's view of files and processes. Landlock leaves it
its own folder, its Python and the system's libraries; what it may still see are names and sizes.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

from agent_tools.errors import InfraError
from agent_tools.sandbox import seccomp
from agent_tools.sandbox.cgroups import find_hierarchies, make_cgroup, missing_limits, sweep_stale
from agent_tools.sandbox.instance import (
    NOBODY,
    ProcessInstance,
    launch,
    maps_user,
    worker_archive,
)
from agent_tools.sandbox.types import Limits, Purpose

_PREFIX = "selfevo-sandbox"
# Numbers that no account has, one a worker, so that RLIMIT_NPROC and kill reach only its script.
_FIRST_UID, _UIDS = 30_000, 30_000
# What Landlock leaves readable besides the script's Python: the system's programs and libraries.
_READABLE = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/proc",
    "/sys", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives",
)  # fmt: skip


class ProcessSandbox:
    """Starts workers as plain processes.

    isolated=False also leaves out the user, the limits and the filter: the bare side of
    `benchmarks.sandbox_rate`, for scripts that you wrote yourself.
    """

    def __init__(self, python: Path, *, isolated: bool = True) -> None:
        if not Path(python).exists():
            raise InfraError(f"script Python {python} does not exist: run `make setup`")
        self._python = python
        self._isolated = isolated
        self.once = False
        self.hierarchies = find_hierarchies() if isolated else ()
        self._root = os.geteuid() == 0 and maps_user(NOBODY)
        self._of_groups: tuple[str, ...] = ()
        self._own_uids = self._root and maps_user(_FIRST_UID + _UIDS)
        _sweep_folders()
        sweep_stale(self.hierarchies)

    @property
    def missing(self) -> tuple[str, ...]:
        """What this kind never gives, and what the host refuses."""
        parts = [
            "no namespaces, so scripts see the host's processes, and no disk quota: "
            "use the kind bubblewrap or docker"
        ]
        if not self._root:
            parts.append("no other user, so scripts run as this one: run as root")
        if not self._isolated:
            parts.append("no limits at all: leave out isolated=False")
        elif not seccomp.supported():
            parts.append(
                f"no seccomp filter for the processor {os.uname().machine}: use x86-64 or ARM64"
            )
        return (*parts, *(self._of_groups if self._isolated else ()))

    def start(self, slot: int, limits: Limits, purpose: Purpose = "scripts") -> ProcessInstance:
        """Start one worker with a folder of its own under the system's temporary folder."""
        assert purpose != "shell", "open_shell offers no shell of this kind"
        cgroup = make_cgroup(slot, self.hierarchies)
        self._of_groups = missing_limits(cgroup)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-"))
        uid = None
        if self._root and self._isolated:
            uid = _FIRST_UID + (os.getpid() * 16 + slot) % _UIDS if self._own_uids else NOBODY
        folder.chmod(0o711)
        (folder / "work").mkdir(mode=0o711)  # as root, a script can make nothing in it
        (folder / "tmp").mkdir(mode=0o700)
        if uid is not None:
            os.chown(folder / "tmp", uid, uid)
        archive = folder / "worker.pyz"
        archive.write_bytes(worker_archive())
        ours, theirs = socket.socketpair()
        filtered = self._isolated and seccomp.supported()
        program = seccomp.build_filter(deny_kill_all=True) if filtered else b""
        settings = {
            "line": theirs.fileno(),
            "root": str(folder / "work"),
            "scratch": [str(folder / "tmp")],
            "uid": uid,
            "user_processes": self._own_uids,
            "limited": self._isolated,
            "filter": base64.b64encode(program).decode() if filtered else None,
            "purpose": purpose,
            "readable": _READABLE if self._isolated else None,
        }
        argv = [str(self._python), "-s", "-P", str(archive), json.dumps(settings)]
        try:
            return launch(
                {"stage": {}, "uid": None, "argv": argv},
                ours=ours,
                pass_fds=(theirs.fileno(),),
                cgroup=cgroup,
                folder=folder,
            )
        finally:
            theirs.close()

    def explain(self, log: str) -> str:
        """Why a worker did not start."""
        last = log.splitlines()[-1] if log else "it printed nothing"
        return f"the script worker did not start ({last}): run `make setup`, then try again"


def _sweep_folders() -> None:
    """Remove folders of owners that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}-*-*"):
        pid = path.name.removeprefix(f"{_PREFIX}-").split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(path, ignore_errors=True)
