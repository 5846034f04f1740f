"""Control groups for workers and scripts: memory, processes, CPU. Version 1 and version 2.

Version 1 has a tree for each controller, version 2 one tree. Where the host lets us make no
group (an ordinary user without delegation, a read-only /sys), `make_cgroup` returns None and
rlimits with the worker's own polling remain.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from dataclasses import dataclass
from pathlib import Path

PREFIX = "selfevo"
_CONTROLLERS = ("memory", "pids", "cpu", "cpuacct")
_CPU_PERIOD_US = 100_000
# A worker's script may be one busy thread, plus the worker that reads its output.
_CPU_SHARE = 1.25
_HELD_OTHERWISE = "memory, processes and CPU are held by rlimits and polling only"


@dataclass(frozen=True)
class Hierarchy:
    """Where groups can be made: version and, for each controller, its folder."""

    version: int
    folders: dict[str, Path]


def find_hierarchies(
    mounts: str | None = None, membership: str | None = None
) -> tuple[Hierarchy, ...]:
    """Candidates in order of preference, from the texts of /proc/self/{mounts,cgroup}."""
    if mounts is None:
        mounts = Path("/proc/self/mounts").read_text()
    if membership is None:
        membership = Path("/proc/self/cgroup").read_text()
    own: dict[str, str] = {}
    for line in membership.splitlines():
        _number, names, path = line.split(":", 2)
        for name in names.split(","):
            own[name] = path
    version1: dict[str, Path] = {}
    version2: list[Path] = []
    for line in mounts.splitlines():
        _source, where, kind, options = line.split()[:4]
        if kind == "cgroup":
            for name in set(options.split(",")) & set(_CONTROLLERS):
                version1.setdefault(name, _inside(Path(where), own.get(name, "/")))
        elif kind == "cgroup2":
            home = _inside(Path(where), own.get("", "/"))
            # A group with processes gives its children no controllers, so its parent comes next.
            version2 += [home, *([home.parent] if home != Path(where) else [])]
    found: list[Hierarchy] = []
    if "memory" in version1 and "pids" in version1:
        found.append(Hierarchy(1, version1))
    found += [Hierarchy(2, dict.fromkeys(_CONTROLLERS, folder)) for folder in version2]
    return tuple(found)


def _inside(mount: Path, path: str) -> Path:
    """The own group's folder; the mount itself when the path belongs to an outer namespace."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


class Cgroup:
    """A made group. Raises OSError where the kernel refuses."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self.version = hierarchy.version
        self._paths = {key: folder / name for key, folder in hierarchy.folders.items()}
        self._written: dict[Path, str] = {}
        made: list[Path] = []
        try:
            for path in dict.fromkeys(self._paths.values()):
                if self.version == 2:
                    _enable_controllers(path.parent)
                path.mkdir()
                made.append(path)
            if not self._limit_file("memory").exists() or not self._limit_file("pids").exists():
                raise FileNotFoundError(f"{self._paths['memory']} has no memory or pids controller")
            self._limit_cpu()
        except OSError:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise

    @property
    def procs_files(self) -> list[str]:
        """Files into which a process writes "0" to join."""
        return [str(path / "cgroup.procs") for path in dict.fromkeys(self._paths.values())]

    def open_procs(self) -> list[int]:
        """Those files, opened for writing: a descriptor lets a process join that could not open
        the file itself (the kernel asks who opened it). The caller closes them."""
        return [os.open(name, os.O_WRONLY | os.O_CLOEXEC) for name in self.procs_files]

    def set_limits(self, *, memory_bytes: int, tasks: int) -> None:
        """Limit memory (tmpfs counts) and the number of processes and threads."""
        self._write(self._limit_file("pids"), str(tasks))
        memory = (self._limit_file("memory"), str(memory_bytes))
        # Swap is memory too; version 1 counts both together.
        swap = (self._swap_file, str(memory_bytes) if self.version == 1 else "0")
        steps = [memory, *([swap] if self.limits_swap else [])]
        try:
            for path, text in steps:
                self._write(path, text)
        except OSError:  # version 1 keeps memory below memory with swap: a rise goes the other way
            for path, text in reversed(steps):
                self._write(path, text)

    @property
    def limits_swap(self) -> bool:
        """Whether the kernel counts swap for the group."""
        return self._swap_file.exists()

    @property
    def _swap_file(self) -> Path:
        name = "memory.memsw.limit_in_bytes" if self.version == 1 else "memory.swap.max"
        return self._paths["memory"] / name

    def memory_bytes(self) -> int:
        """What the group holds now."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self._paths["memory"] / name).read_text())

    def oom_kills(self) -> int:
        """How many processes of the group the kernel killed for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        for line in (self._paths["memory"] / name).read_text().splitlines():
            key, value = line.split()
            if key == "oom_kill":
                return int(value)
        return 0

    def cpu_s(self) -> float | None:
        """CPU-seconds of the group since it was made; None where the host does not count."""
        with contextlib.suppress(OSError, KeyError):
            if self.version == 1:
                return int((self._paths["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
            for line in (self._paths["cpu"] / "cpu.stat").read_text().splitlines():
                if line.startswith("usage_usec "):
                    return int(line.split()[1]) / 1e6
        return None

    def remove(self) -> None:
        """Kill what is left in the group and remove it."""
        for path in dict.fromkeys(self._paths.values()):
            give_up = time.monotonic() + 2
            # Mostly it is empty already, and to ask for its processes costs more than to remove it.
            while not _removed(path) and time.monotonic() < give_up:
                with contextlib.suppress(OSError):
                    if (path / "cgroup.kill").exists():
                        (path / "cgroup.kill").write_text("1")
                    for pid in (path / "cgroup.procs").read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)
                if not _removed(path):
                    time.sleep(0.01)

    def _limit_file(self, controller: str) -> Path:
        name = "memory.limit_in_bytes" if (controller, self.version) == ("memory", 1) else None
        return self._paths[controller] / (name or f"{controller}.max")

    def _limit_cpu(self) -> None:
        quota = int(_CPU_PERIOD_US * _CPU_SHARE)
        # A host may offer no CPU controller: the worker still counts CPU-seconds.
        with contextlib.suppress(FileNotFoundError, PermissionError, KeyError):
            if self.version == 1:
                (self._paths["cpu"] / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD_US))
                (self._paths["cpu"] / "cpu.cfs_quota_us").write_text(str(quota))
            elif (self._paths["cpu"] / "cpu.max").exists():
                (self._paths["cpu"] / "cpu.max").write_text(f"{quota} {_CPU_PERIOD_US}")

    def _write(self, path: Path, text: str) -> None:
        if self._written.get(path) != text:
            path.write_text(text)
            self._written[path] = text


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:  # processes are in it
        return False
    return True


def _enable_controllers(folder: Path) -> None:
    """Give children of a version 2 group the controllers that the group itself has."""
    have = (folder / "cgroup.controllers").read_text().split()
    on = (folder / "cgroup.subtree_control").read_text().split()
    for name in ("memory", "pids", "cpu"):
        if name in have and name not in on:
            (folder / "cgroup.subtree_control").write_text(f"+{name}")


def make_cgroup(slot: int, hierarchies: tuple[Hierarchy, ...] | None = None) -> Cgroup | None:
    """A new group named after this process, or None if the host allows none."""
    for hierarchy in find_hierarchies() if hierarchies is None else hierarchies:
        name = f"{PREFIX}-{os.getpid()}-{slot}-{secrets.token_hex(3)}"
        with contextlib.suppress(OSError):
            return Cgroup(hierarchy, name)
    return None


def missing_limits(group: Cgroup | None) -> tuple[str, ...]:
    """What a worker in this group lacks, each with the repair for this user."""
    if group is None:
        repair = "run as root, or below `systemd-run --user --scope -p Delegate=yes`"
        if os.geteuid() == 0:
            repair = (
                "mount /sys/fs/cgroup writable (of a container: `--privileged --cgroupns=host`)"
            )
        return (f"no control group, so {_HELD_OTHERWISE}: {repair}",)
    swaps = Path("/proc/swaps")
    if group.limits_swap or not swaps.exists() or len(swaps.read_text().splitlines()) < 2:
        return ()
    return ("no limit on swap: run `swapoff -a`, or boot the kernel with `swapaccount=1`",)


def sweep_stale(hierarchies: tuple[Hierarchy, ...] | None = None) -> int:
    """Remove empty groups whose owner was killed; the number removed."""
    removed = 0
    for hierarchy in find_hierarchies() if hierarchies is None else hierarchies:
        for folder in set(hierarchy.folders.values()):
            for path in folder.glob(f"{PREFIX}-*-*-*"):
                pid = path.name.split("-")[1]
                if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                    with contextlib.suppress(OSError):
                        path.rmdir()
                        removed += 1
    return removed
