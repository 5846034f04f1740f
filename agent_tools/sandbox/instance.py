"""A started worker, as the pool sees it, and what both kinds need to start one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from agent_tools.sandbox.cgroups import Cgroup, Hierarchy
from agent_tools.sandbox.link import Link, SocketLink
from agent_tools.sandbox.types import Limits, Purpose

_HERE = Path(__file__).parent
NOBODY = 65534
WORK, SCRATCH_BYTES = "/sandbox/work", 128 << 20
_STOP_S = 5.0
# One thread a script: BLAS and OpenMP pools are sized when their libraries load.
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONNOUSERSITE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "LOKY_MAX_CPU_COUNT": "1",
}


class Instance(Protocol):
    """A started worker: its line, its control group if it has one, and its end."""

    @property
    def link(self) -> Link: ...

    @property
    def cgroup(self) -> Cgroup | None: ...

    def log_text(self) -> str:
        """What the worker and its launcher printed."""

    def stop(self) -> None:
        """End the worker and everything below it, and remove what was made for it."""

    def gone(self, timeout_s: float) -> None:
        """Wait until the worker has ended by itself, at most so long."""


@dataclass
class ProcessInstance:
    """A worker below this process, and what must be removed after it."""

    process: subprocess.Popen[bytes]
    link: SocketLink
    log: IO[bytes]
    cgroup: Cgroup | None
    folder: Path | None

    def log_text(self) -> str:
        self.log.seek(0)
        return self.log.read(20_000).decode("utf-8", "replace").strip()

    def gone(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)

    def stop(self) -> None:
        self.link.close()
        if self.cgroup is None:
            # The worker sees the closed line and kills its script before it goes; killed at
            # once, a worker without a process namespace would leave the script behind.
            self.gone(_STOP_S)
        self.process.kill()
        self.gone(_STOP_S)
        if self.cgroup is not None:
            self.cgroup.remove()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.log.close()


class Sandbox(Protocol):
    """Starts workers of one kind."""

    @property
    def once(self) -> bool:
        """Whether a worker serves one script only."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Protections that this host does not give, with the repair, one line each."""

    @property
    def hierarchies(self) -> tuple[Hierarchy, ...]:
        """Where control groups can be made for scripts."""

    def start(self, slot: int, limits: Limits, purpose: Purpose = "scripts") -> Instance:
        """Start a worker; it says on its line when it is ready."""

    def explain(self, log: str) -> str:
        """A one-line message with the next step, from what a worker printed when it failed."""


def launch(
    plan: dict[str, Any],
    *,
    ours: socket.socket,
    pass_fds: tuple[int, ...],
    cgroup: Cgroup | None,
    folder: Path | None,
) -> ProcessInstance:
    """Run `launch.py` with a plan. Call it from a thread that lives as long as the worker does:
    the kernel ends the worker when that thread ends."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ProcessInstance.stop
    plan = {"cgroups": cgroup.procs_files if cgroup is not None else [], **plan}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_HERE / "launch.py"), json.dumps(plan)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        pass_fds=pass_fds,
        env=ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    return ProcessInstance(process, SocketLink(ours), log, cgroup, folder)


def worker_archive() -> bytes:
    """The code of `guest/` as a runnable zip: none of ours is mounted in a sandbox."""
    buffer = io.BytesIO()
    name = "agent_tools/sandbox/guest"
    with zipfile.ZipFile(buffer, "w") as archive:
        for package in ("agent_tools", "agent_tools/sandbox"):
            archive.writestr(f"{package}/__init__.py", "")
        for path in sorted((_HERE / "guest").glob("*.py")):
            archive.writestr(f"{name}/{path.name}", path.read_bytes())
        start = "import sys\nfrom agent_tools.sandbox.guest.worker import main\n"
        archive.writestr("__main__.py", start + "sys.exit(main(sys.argv[1]))\n")
    return buffer.getvalue()


def maps_user(uid: int) -> bool:
    """Whether this user namespace knows the number: "root" of a container may know only itself."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _outside, count = map(int, line.split())
        if first <= uid < first + count:
            return True
    return False


def memory_file(name: str, data: bytes) -> int:
    """A descriptor of an anonymous file that holds `data`, at its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
