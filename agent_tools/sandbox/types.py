"""What a caller gives the sandbox and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, get_args

from agent_tools.errors import UserError

Status = Literal["ok", "error", "timeout", "memory", "killed", "infra"]
PoolKind = Literal["bubblewrap", "docker", "process"]
# What a worker is for: scripts, one shell, or showing what the host gives (it loads no packages).
Purpose = Literal["scripts", "shell", "probe"]
POOL_KINDS: tuple[PoolKind, ...] = get_args(PoolKind)


class SandboxError(UserError):
    """A job or a pool was asked for with values that cannot work."""


@dataclass(frozen=True)
class Limits:
    """What one script may use. All limits count the script with everything it starts.

    cpu_seconds    CPU-seconds (fractions work: 0.2)
    wall_seconds   wall-clock seconds; None is three times cpu_seconds
    memory_mb      MiB on top of what the warm worker already holds
    file_mb        MiB a written file may reach
    processes      processes and threads at once
    open_files     descriptors a process may hold
    disk_mb        MiB that the script's folder may hold
    output_bytes   bytes kept of stdout and of stderr, each; the rest is read and thrown away
    """

    cpu_seconds: float = 3.0
    wall_seconds: float | None = None
    memory_mb: int = 1536
    file_mb: int = 64
    processes: int = 32
    open_files: int = 256
    disk_mb: int = 512
    output_bytes: int = 20_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "wall_seconds" and not value > 0:
                raise SandboxError(f"sandbox limit {name} = {value}: must be above 0")
        if self.wall_seconds is not None and not self.wall_seconds > 0:
            raise SandboxError(f"sandbox limit wall_seconds = {self.wall_seconds}: must be above 0")

    @property
    def wall(self) -> float:
        """The wall-clock limit in seconds."""
        return 3 * self.cpu_seconds if self.wall_seconds is None else self.wall_seconds


@dataclass(frozen=True)
class View:
    """What a shell shows beside its work folder; bubblewrap only.

    mounts    (folder of the host, absolute place): shown read-only
    links     (absolute place, path in the work folder): a name of a writable place
    sockets   whether programs may open sockets; their network is a loopback of their own, so all
              that they reach is each other and sockets in `mounts`
    devices   of the host, below /dev, shown as they are: a program may then do to them whatever the
              driver lets an ordinary user do
    """

    mounts: tuple[tuple[Path, str], ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    sockets: bool = False
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for source, place in self.mounts:
            if not source.is_dir():
                raise SandboxError(f"sandbox mount {source}: is no folder; make it first")
            _check_place(place)
        for device in self.devices:
            if not device.startswith("/dev/nvidia") or not Path(device).is_char_device():
                raise SandboxError(f"sandbox device {device}: is none of a GPU on this host")
        for place, target in self.links:
            _check_place(place)
            if not target or target.startswith("/") or ".." in target.split("/"):
                raise SandboxError(f"sandbox link {place}: {target!r} leads out of the work folder")


def _check_place(place: str) -> None:
    taken = ("/usr", "/bin", "/lib", "/proc", "/dev", "/etc", "/sandbox", "/tmp")
    if not place.startswith("/") or ".." in place.split("/") or place.startswith(taken):
        raise SandboxError(f"sandbox place {place!r}: use an absolute path such as /home/data")


@dataclass(frozen=True)
class ScriptJob:
    """One Python script.

    code      the text; it runs as `__main__` in a fresh folder
    inputs    a folder; its files (with sub-folders) appear in the script's folder
    outputs   plain names of files that the script must write; a missing one is an error
    """

    code: str
    inputs: Path
    outputs: tuple[str, ...] = ("submission.csv",)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in self.outputs:
            if not name or "/" in name or "\0" in name or name in (".", ".."):
                raise SandboxError(f"sandbox output {name!r}: give a plain file name")


@dataclass(frozen=True)
class ScriptResult:
    """What became of a script.

    status      ok · error (exception, exit code above 0, missing or unusable output) ·
                timeout (CPU or wall) · memory · killed (a signal, too many processes) ·
                infra (the sandbox failed, not the script)
    files       the outputs, as bytes; empty unless status is ok
    cpu_s       CPU-seconds of the script and all it started
    wall_s      wall-clock seconds from fork to the last process gone
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    files: dict[str, bytes]
    cpu_s: float
    wall_s: float

    @property
    def last_line(self) -> str:
        """The last non-empty line of stderr: for a Python error, the exception."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


@dataclass(frozen=True)
class CommandResult:
    """What became of one command of a shell.

    status      ok · error (exit code above 0) · timeout · memory · killed · infra
    exit_code   None where a limit was broken
    state_kept  False where the shell itself ended: variables, the current folder and background
                processes are gone, the work folder stays
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float
    state_kept: bool


class ScriptPool(Protocol):
    """A fixed number of workers. Results come in the order of the jobs."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Protections that this host does not give, one sentence each."""

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]: ...

    def submit(self, job: ScriptJob) -> Future[ScriptResult]: ...

    def close(self) -> None: ...

    def __enter__(self) -> ScriptPool: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
