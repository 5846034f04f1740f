"""Workers without namespaces, for hosts that refuse them: another user (as root), rlimits, seccomp.

Weaker than bubblewrap: a script can read what its user can read, and sees other processes.
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
from agent_tools.sandbox.cgroups import find_hierarchies, make_cgroup, sweep_stale
from agent_tools.sandbox.instance import NOBODY, Instance, launch, maps_user, worker_archive

_PREFIX = "selfevo-sandbox"
# Numbers that no account has, one a worker, so that RLIMIT_NPROC and kill reach only its script.
_FIRST_UID, _UIDS = 30_000, 30_000


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
        self._hierarchies = find_hierarchies() if isolated else ()
        self._root = os.geteuid() == 0 and maps_user(NOBODY)
        self._own_uids = self._root and maps_user(_FIRST_UID + _UIDS)
        _sweep_folders()
        sweep_stale(self._hierarchies)

    @property
    def missing(self) -> tuple[str, ...]:
        """What this kind never gives, and what the host refuses."""
        parts = ["no namespaces: scripts see the host's files and processes"]
        if not self._root:
            parts.append("no other user: scripts run as this user")
        if not self._isolated:
            parts.append("no limits at all")
        elif not seccomp.supported():
            parts.append(f"no seccomp filter for the processor {os.uname().machine}")
        return tuple(parts)

    def start(self, slot: int) -> Instance:
        """Start one worker with a folder of its own under the system's temporary folder."""
        cgroup = make_cgroup(slot, self._hierarchies)
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
            "fd": theirs.fileno(),
            "root": str(folder / "work"),
            "scratch": [str(folder / "tmp")],
            "uid": uid,
            "user_processes": self._own_uids,
            "limited": self._isolated,
            "filter": base64.b64encode(program).decode() if filtered else None,
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
