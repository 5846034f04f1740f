"""Workers inside bubblewrap: own user, process, network, IPC and host-name namespaces.

The view of files is /usr, the interpreter, the script environment and four small writable
tmpfs; nothing of the repository, the data or anybody's home. As root, root is dropped first:
a `bwrap` run by root stays uid 0 outside, whatever --uid says.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from agent_tools.errors import InfraError
from agent_tools.sandbox import seccomp
from agent_tools.sandbox.cgroups import (
    Cgroup,
    find_hierarchies,
    make_cgroup,
    missing_limits,
    sweep_stale,
)
from agent_tools.sandbox.instance import (
    ENVIRONMENT,
    NOBODY,
    SCRATCH_BYTES,
    WORK,
    ProcessInstance,
    launch,
    maps_user,
    memory_file,
    worker_archive,
)
from agent_tools.sandbox.interpreter import inspect_python
from agent_tools.sandbox.launch import STAGE
from agent_tools.sandbox.types import Limits, Purpose, View

# Parts of /usr that hold packages or papers but nothing a script needs.
_HIDDEN = ("/usr/local", "/usr/share", "/usr/src", "/usr/include", "/usr/lib/python3")

_SIZES = (0, 7)  # the first version that gives a tmpfs a size


class BubblewrapSandbox:
    """Starts workers in bubblewrap. Raises InfraError where the host refuses.

    cold     a worker serves one script and imports only what that needs
    view     what a shell shows beside its work folder
    """

    def __init__(self, python: Path, *, cold: bool = False, view: View | None = None) -> None:
        self._bwrap, self._version = _find_bwrap()
        if not seccomp.supported():
            raise InfraError(
                f"no seccomp filter for the processor {os.uname().machine}: "
                "use `sandbox: process` on a machine that you trust"
            )
        self._python = inspect_python(python)
        self.once = cold
        self._view = view or View()
        self.hierarchies = find_hierarchies()
        sweep_stale(self.hierarchies)
        self._temp = self._python.temp
        self.missing: tuple[str, ...] = ()

    def start(self, slot: int, limits: Limits, purpose: Purpose = "scripts") -> ProcessInstance:
        """Start one worker; it answers on its socket once it has imported everything."""
        root = os.geteuid() == 0 and maps_user(NOBODY)
        rooms = not self.once and purpose != "shell"
        cgroup = make_cgroup(slot, self.hierarchies)
        self.missing = self._lacks(cgroup, rooms)
        folders = self._python.folders
        staged = {}
        mounts = self._view.mounts
        # What is staged covers the stage itself: then everything goes there.
        if root and (mounts or not all(_open_to_all(folder) for folder in folders)):
            staged = {str(number): str(folder) for number, folder in enumerate(folders)}
            for number, (source, _) in enumerate(mounts):
                staged[f"view-{number}"] = str(source)
        ours, theirs = socket.socketpair()
        code_fd = memory_file("worker", worker_archive())
        allow = seccomp.TEMPLATE_CALLS if rooms else frozenset[str]()
        if self._view.sockets:
            allow |= seccomp.SOCKET_CALLS
        filter_fd = memory_file("filter", seccomp.build_filter(allow=allow))
        settings = {
            "line": theirs.fileno(),
            "root": WORK,
            "scratch": [self._temp, "/dev/shm"],
            "user_processes": _counts_users_by_namespace(),
            "filter": base64.b64encode(seccomp.build_filter()).decode() if rooms else None,
            "rooms": rooms,
            "once": self.once,
            "purpose": purpose,
        }
        argv = [
            self._bwrap,
            *self._isolation(rooms),
            *self._files(staged, limits.disk_mb << 20),
            *["--file", str(code_fd), "/worker.pyz"],
            *["--remount-ro", "/"],
            *["--seccomp", str(filter_fd)],
            *["--chdir", WORK, "--clearenv"],
            *[part for key, value in ENVIRONMENT.items() for part in ("--setenv", key, value)],
            *["--", str(self._python.executable), "-s", "-P", "/worker.pyz", json.dumps(settings)],
        ]
        plan = {"stage": staged, "uid": NOBODY if root else None, "argv": argv}
        try:
            return launch(
                plan,
                ours=ours,
                pass_fds=(theirs.fileno(), code_fd, filter_fd),
                cgroup=cgroup,
                folder=None,
            )
        finally:
            theirs.close()
            os.close(code_fd)
            os.close(filter_fd)

    def explain(self, log: str) -> str:
        """Turn bubblewrap's complaint into a message that names the repair."""
        last = log.splitlines()[-1] if log else "it printed nothing"
        if re.search(r"namespace|uid map|unshare|Creating new|setting up", log):
            return f"bubblewrap is refused namespaces ({last}): {_namespace_repair()}"
        if "Permission denied" in log:
            return (
                f"the sandbox cannot read its Python ({last}): "
                f"run `chmod -R a+rX {self._python.folders[-1]}`"
            )
        return f"the bubblewrap worker did not start ({last}): run `make setup`, then try again"

    def _lacks(self, cgroup: Cgroup | None, rooms: bool) -> tuple[str, ...]:
        missing = list(missing_limits(cgroup))
        if self._version < _SIZES and not rooms:
            missing.append("no disk quota: install bubblewrap 0.7 or later")
        return tuple(missing)

    def _isolation(self, rooms: bool) -> list[str]:
        flags = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
        flags += ["--unshare-uts", "--die-with-parent", "--new-session", "--as-pid-1"]
        flags += ["--cap-drop", "ALL", "--hostname", "sandbox"]
        if Path("/proc/self/ns/cgroup").exists():
            flags.append("--unshare-cgroup")
        if rooms:
            # Rights over the sandbox's own namespaces, none over the host's. As any other user
            # bwrap would put a second user namespace between the worker and those.
            flags += ["--uid", "0", "--gid", "0"]
            # To make and enter namespaces; the last, to map user 0 into a script's own.
            for name in ("CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SETFCAP"):
                flags += ["--cap-add", name]
        elif self._version >= (0, 8):
            flags.append("--disable-userns")
        return flags

    def _files(self, staged: dict[str, str], work_bytes: int) -> list[str]:
        flags = ["--ro-bind", "/usr", "/usr"]
        for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
            if Path(name).is_symlink():
                flags += ["--symlink", str(Path(name).readlink()), name]
            elif Path(name).is_dir():
                flags += ["--ro-bind", name, name]
        flags += ["--ro-bind-try", "/nix/store", "/nix/store"]
        flags += ["--proc", "/proc", "--dev", "/dev"]
        for device in self._view.devices:
            flags += ["--dev-bind", device, device]
        flags += [*self._tmpfs("/dev/shm", SCRATCH_BYTES), "--remount-ro", "/dev"]
        flags += ["--remount-ro", "/dev/pts"]  # a mount of its own
        flags += self._tmpfs(self._temp, SCRATCH_BYTES)
        flags += self._tmpfs(WORK, work_bytes)
        for name in ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "localtime"):
            flags += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        folders = self._python.folders
        used = [*folders, *(Path(target).parent for target, _ in self._python.links)]
        hidden = [
            Path(name)
            for name in _HIDDEN
            if Path(name).is_dir() and not any(f.is_relative_to(name) for f in used)
        ]
        flags += self._hide(hidden)
        for number, folder in enumerate(folders):
            source = f"{STAGE}/{number}" if staged else str(folder)
            flags += ["--ro-bind", source, str(folder)]
        flags += self._hide([path for path in self._python.hidden if path.is_dir()])
        for target, link in self._python.links:
            flags += ["--symlink", target, link]
        for number, (shown, place) in enumerate(self._view.mounts):
            source = f"{STAGE}/view-{number}" if staged else str(shown)
            flags += ["--ro-bind", source, place]
        for place, inside in self._view.links:
            flags += ["--symlink", f"{WORK}/{inside}", place]
        return flags

    def _tmpfs(self, path: str, size: int) -> list[str]:
        sized = ["--size", str(size)] if self._version >= _SIZES else []
        return [*sized, "--tmpfs", path]

    def _hide(self, paths: list[Path]) -> list[str]:
        return [part for p in paths for part in ("--tmpfs", str(p), "--remount-ro", str(p))]


def _find_bwrap() -> tuple[str, tuple[int, ...]]:
    found = shutil.which("bwrap", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
    if found is None:
        raise InfraError("bubblewrap is not installed: run `apt-get install bubblewrap`")
    answer = subprocess.run([found, "--version"], capture_output=True, timeout=10, text=True)
    numbers = re.findall(r"\d+", answer.stdout)
    version = tuple(int(n) for n in numbers[:3])
    if version < (0, 5):
        raise InfraError(f"bubblewrap {'.'.join(numbers)} is too old: install 0.5 or later")
    return found, version


def _open_to_all(folder: Path) -> bool:
    places = (folder, *folder.resolve().parents, *folder.parents)
    return all(place.stat().st_mode & 0o001 for place in places)


def _counts_users_by_namespace() -> bool:
    """Since Linux 5.14 RLIMIT_NPROC counts within the user namespace."""
    release = re.findall(r"\d+", os.uname().release)
    return (int(release[0]), int(release[1])) >= (5, 14)


def _namespace_repair() -> str:
    """The kernel settings to change, read from this host."""

    def value(name: str) -> str | None:
        try:
            return Path("/proc/sys", *name.split(".")).read_text().strip()
        except OSError:
            return None

    if value("kernel.unprivileged_userns_clone") == "0":
        return "run `sysctl -w kernel.unprivileged_userns_clone=1`"
    if value("user.max_user_namespaces") == "0":
        return "run `sysctl -w user.max_user_namespaces=15000`"
    if value("kernel.apparmor_restrict_unprivileged_userns") == "1":
        return "run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`"
    return (
        "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
        "user.max_user_namespaces>0, kernel.apparmor_restrict_unprivileged_userns=0; in a "
        "container also its seccomp profile) or use `sandbox: process` on a machine that you trust"
    )
