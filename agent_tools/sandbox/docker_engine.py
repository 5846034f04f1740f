"""Workers in containers of a Docker engine: one container for each script or shell.

The engine is the one that DOCKER_HOST names, or the local one. Its image is made here (see
`docker_image.py`); nothing is ever pulled. The worker's line is the container's standard input and
output, so the engine may see none of this host's files.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from agent_tools.errors import InfraError
from agent_tools.sandbox import seccomp
from agent_tools.sandbox.cgroups import Cgroup, Hierarchy
from agent_tools.sandbox.docker_image import image_key, write_image
from agent_tools.sandbox.instance import ENVIRONMENT, NOBODY, SCRATCH_BYTES, WORK, worker_archive
from agent_tools.sandbox.interpreter import inspect_python
from agent_tools.sandbox.link import AttachedLink, WorkerGoneError
from agent_tools.sandbox.types import Limits, Purpose

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

REPOSITORY = "selfevo-sandbox"
_LABEL = "selfevo.sandbox.owner"
_CALL_S = 120
_GONE_S = 20.0
_CPUS = 1.25  # one busy thread of the script, plus the worker that reads its output
_WORKER_MB = 352  # the worker, and the packages that it loads for its script
_TASK_SLACK = 4
_INODES = 65_536
# The worker's code comes first on standard input; it is loaded and removed before any script runs.
_BOOT = """
import os, struct, sys
def read(size):
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece: sys.exit("the owner is gone")
        data += piece
    return data
code = sys.argv[2] + "/worker.pyz"
with open(code, "wb") as file:
    file.write(read(struct.unpack("=I", read(4))[0]))
sys.path.insert(0, code)
from agent_tools.sandbox.guest.worker import main
del sys.path[0]
os.unlink(code)
sys.exit(main(sys.argv[1]))
"""


@dataclass
class ContainerInstance:
    """A started container with its attached streams."""

    container: Container
    link: AttachedLink
    log: IO[bytes]
    cgroup: Cgroup | None = None

    def log_text(self) -> str:
        self.log.seek(0)
        return self.log.read(20_000).decode("utf-8", "replace").strip()

    def gone(self, timeout_s: float) -> None:
        give_up = time.monotonic() + timeout_s
        while _exists(self.container) and time.monotonic() < give_up:
            time.sleep(0.05)

    def stop(self) -> None:
        self.link.close()
        _remove(self.container)
        self.gone(_GONE_S)
        self.log.close()


class DockerSandbox:
    """Starts workers in containers. Raises InfraError where no engine answers."""

    once = True
    hierarchies: tuple[Hierarchy, ...] = ()  # the engine makes the groups

    def __init__(self, python: Path) -> None:
        self._python = inspect_python(python)
        self._temp = self._python.temp
        self._client = connect()
        self.missing = _missing(self._client)
        _sweep(self._client)
        self._image = ensure_image(self._client, python)

    def start(self, slot: int, limits: Limits, purpose: Purpose = "scripts") -> ContainerInstance:
        """Create, attach and start one container; its worker speaks once it is ready."""
        del slot
        from docker.errors import DockerException, ImageNotFound

        settings = {
            "line": None,
            "root": WORK,
            "scratch": [self._temp, "/dev/shm"],
            "once": purpose != "shell",
            "purpose": purpose,
        }
        python = str(self._python.executable)
        try:
            container = self._client.containers.create(
                self._image,
                [python, "-s", "-P", "-c", _BOOT, json.dumps(settings), self._temp],
                **_confinement(limits, self._temp),
            )
        except ImageNotFound as error:
            raise InfraError(f"the image {self._image} is gone: start again") from error
        except (DockerException, OSError) as error:
            raise InfraError(f"the Docker engine makes no container: {error}") from error
        try:
            channel = _attach(container)
            container.start()
            log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ContainerInstance.stop
            link = AttachedLink(channel, log)
            code = worker_archive()
            link.send_bytes(struct.pack("=I", len(code)) + code)
        except (DockerException, OSError, WorkerGoneError) as error:
            _remove(container)  # one that never started does not remove itself
            raise InfraError(f"the Docker engine starts no container: {error}") from error
        return ContainerInstance(container, link, log)

    def explain(self, log: str) -> str:
        """Why a container's worker did not start."""
        last = log.splitlines()[-1] if log else "it printed nothing"
        return f"the container's worker did not start ({last}): see the engine's log"


def connect() -> DockerClient:
    """The engine's client. Raises InfraError with the repair."""
    try:
        import docker
        from docker.errors import DockerException
    except ModuleNotFoundError as error:
        raise InfraError("the Docker SDK is missing: run `pip install 'selfevo[docker]'`") from (
            error
        )
    try:
        client = docker.from_env(timeout=_CALL_S)
        client.ping()
    except (DockerException, OSError) as error:
        where = os.environ.get("DOCKER_HOST", "the default socket")
        raise InfraError(
            f"no Docker engine answers at {where}: start one, or set DOCKER_HOST"
        ) from error
    return client


def ensure_image(client: DockerClient, python: Path) -> str:
    """The name of the image for this Python; it is made if the engine does not have it."""
    from docker.errors import ImageNotFound

    interpreter = inspect_python(python)
    name = f"{REPOSITORY}:{image_key(interpreter)}"
    try:
        client.images.get(name)
    except ImageNotFound:
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            write_image(interpreter, Path(file.name))
            client.api.import_image_from_file(
                file.name, repository=REPOSITORY, tag=name.partition(":")[2]
            )
    return name


def _confinement(limits: Limits, temp: str) -> dict[str, Any]:
    """Every limit and every lock of a container."""
    memory = f"{limits.memory_mb + _WORKER_MB}m"
    owned = f"uid={NOBODY},gid={NOBODY},nr_inodes={_INODES}"
    work = f"rw,nosuid,nodev,exec,size={limits.disk_mb}m,mode=0700,{owned}"
    scratch = f"rw,nosuid,nodev,exec,size={SCRATCH_BYTES},mode=0755,{owned}"
    options = ["no-new-privileges"]
    if seccomp.supported():
        options.append(f"seccomp={seccomp.engine_profile()}")
    return {
        "user": f"{NOBODY}:{NOBODY}",
        "network_mode": "none",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": options,
        "mem_limit": memory,
        "memswap_limit": memory,
        "pids_limit": limits.processes + _TASK_SLACK,
        "nano_cpus": int(_CPUS * 1e9),
        "tmpfs": {WORK: work, temp: scratch, "/dev/shm": scratch},
        "ulimits": _ulimits(),
        "ipc_mode": "private",
        "environment": ENVIRONMENT,
        "hostname": "sandbox",
        "working_dir": WORK,
        "log_config": {"Type": "none", "Config": {}},
        "labels": {_LABEL: f"{_home()}/{os.getpid()}"},
        "stdin_open": True,  # it closes with its one client, so the worker sees its owner go
        "auto_remove": True,
        "init": False,
    }


def _ulimits() -> list[Any]:
    from docker.types import Ulimit

    return [
        Ulimit(name="core", soft=0, hard=0),
        Ulimit(name="nofile", soft=1024, hard=1024),
        Ulimit(name="msgqueue", soft=0, hard=0),
    ]


def _attach(container: Container) -> socket.socket:
    """The container's streams as a socket of our own."""
    raw = container.attach_socket(
        params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1, "logs": 0}
    )
    try:
        return socket.socket(fileno=os.dup(raw.fileno()))
    finally:
        raw.close()


def _remove(container: Container) -> None:
    from docker.errors import APIError

    with contextlib.suppress(APIError, OSError):  # it may be going by itself
        container.remove(force=True, v=True)


def _exists(container: Container) -> bool:
    from docker.errors import APIError, NotFound

    try:
        container.reload()
    except NotFound:
        return False
    except (APIError, OSError):
        return True
    return True


def _missing(client: DockerClient) -> tuple[str, ...]:
    """What the engine says that it cannot do."""
    facts = client.info()
    wanted = {
        "MemoryLimit": "memory limits",
        "SwapLimit": "limits on swap",
        "PidsLimit": "process limits",
        "CpuCfsQuota": "CPU limits",
    }
    parts = [
        f"the engine gives no {what}: give its kernel that controller of control groups"
        for key, what in wanted.items()
        if not facts.get(key)
    ]
    if not any("seccomp" in option for option in facts.get("SecurityOptions") or ()):
        parts.append("the engine gives no seccomp filter: run one that is built with seccomp")
    elif not seccomp.supported():
        machine = os.uname().machine
        parts.append(f"only the engine's own seccomp filter on {machine}: use x86-64 or ARM64")
    return tuple(parts)


def _sweep(client: DockerClient) -> None:
    """Remove containers whose owner, a process that we would see, was killed."""
    ours = {"label": _LABEL}
    for container in client.containers.list(all=True, filters=ours, ignore_removed=True):
        home, _, pid = container.labels[_LABEL].rpartition("/")
        if home == _home() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            _remove(container)


def _home() -> str:
    """Names this start of the machine and this process namespace: pids mean nothing elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
