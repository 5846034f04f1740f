"""Workers inside bubblewrap: own user, process, network, IPC and host-name namespaces.

The view of files is /usr, the interpreter, the script environment and four small writable
tmpfs; nothing of the repository, the data or anybody's home. As root, root is dropped first:
a `bwrap` run by root stays uid 0 outside, whatever --uid says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agent_tools.errors import InfraError
from agent_tools.sandbox import seccomp
from agent_tools.sandbox.cgroups import find_hierarchies, make_cgroup, sweep_stale
from agent_tools.sandbox.instance import (
    ENVIRONMENT,
    NOBODY,
    Instance,
    launch,
    maps_user,
    memory_file,
    worker_archive,
)
from agent_tools.sandbox.launch import STAGE

WORK_BYTES = 512 << 20
_SCRATCH_BYTES = 128 << 20
_WORK = "/sandbox/work"
_ASK = """
import json, os, sys, sysconfig
print(json.dumps({
    "prefix": sys.prefix, "base_prefix": sys.base_prefix,
    "base_site": sysconfig.get_path("purelib", vars={"base": sys.base_prefix}),
}))
"""
# Parts of /usr that hold packages or papers but nothing a script needs.
_HIDDEN = ("/usr/local", "/usr/share", "/usr/src", "/usr/include", "/usr/lib/python3")


@dataclass(frozen=True)
class Interpreter:
    """Folders that a Python needs, folders inside them to hide, and links on the way to it."""

    executable: Path
    folders: tuple[Path, ...]
    hidden: tuple[Path, ...]
    links: tuple[tuple[str, str], ...]


def inspect_python(python: Path) -> Interpreter:
    """Ask a Python where it lives. Raises InfraError if it does not run."""
    try:
        answer = subprocess.run(
            [str(python), "-I", "-c", _ASK], capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InfraError(f"script Python {python} does not run ({error}): run `make setup`") from (
            error
        )
    facts = json.loads(answer.stdout)
    prefix, base = Path(facts["prefix"]), Path(facts["base_prefix"])
    folders = [folder for folder in dict.fromkeys((base, base.resolve(), prefix)) if folder]
    folders = [folder for folder in folders if not folder.is_relative_to("/usr/bin")]
    outside_usr = [f for f in folders if f != Path("/usr") and f != Path("/")]
    hidden = []
    if prefix != base:  # a virtual environment: the base's own packages stay out
        hidden.append(Path(facts["base_site"]))
    links: list[tuple[str, str]] = []
    step = python
    while step.is_symlink() and len(links) < 20:
        target = str(step.readlink())
        if not any(step.is_relative_to(folder) for folder in (*outside_usr, Path("/usr"))):
            links.append((target, str(step)))
        step = step.parent / target
    return Interpreter(python, tuple(outside_usr), tuple(hidden), tuple(links))


class BubblewrapSandbox:
    """Starts workers in bubblewrap. Raises InfraError where the host refuses."""

    def __init__(self, python: Path) -> None:
        self._bwrap, self._version = _find_bwrap()
        if not seccomp.supported():
            raise InfraError(
                f"no seccomp filter for the processor {os.uname().machine}: "
                "use `sandbox: process` on a machine that you trust"
            )
        self._python = inspect_python(python)
        self._hierarchies = find_hierarchies()
        sweep_stale(self._hierarchies)
        # Folders that lead to a Python below /tmp would stay writable there from script to script.
        below_tmp = any(folder.is_relative_to("/tmp") for folder in self._python.folders)
        self._temp = "/sandbox/tmp" if below_tmp else "/tmp"
        self._missing: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """What this host does not give; known once a worker has started."""
        return self._missing

    def start(self, slot: int) -> Instance:
        """Start one worker; it answers on its socket once it has imported everything."""
        root = os.geteuid() == 0 and maps_user(NOBODY)
        cgroup = make_cgroup(slot, self._hierarchies)
        if cgroup is None:
            self._missing = (
                "no control group: memory, processes and CPU are limited by rlimits and polling "
                "(run as root, or delegate a cgroup to this user)",
            )
        folders = self._python.folders
        staged = {}
        if root and not all(_open_to_all(folder) for folder in folders):
            staged = {str(number): str(folder) for number, folder in enumerate(folders)}
        ours, theirs = socket.socketpair()
        code_fd = memory_file("worker", worker_archive())
        filter_fd = memory_file("filter", seccomp.build_filter())
        settings = {
            "fd": theirs.fileno(),
            "root": _WORK,
            "scratch": [self._temp, "/dev/shm"],
            "uid": None,
            "user_processes": _counts_users_by_namespace(),
            "limited": True,
            "filter": None,
        }
        argv = [
            self._bwrap,
            *self._isolation(),
            *self._files(staged),
            *["--file", str(code_fd), "/worker.pyz"],
            *["--remount-ro", "/"],
            *["--seccomp", str(filter_fd)],
            *["--chdir", _WORK, "--clearenv"],
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

    def _isolation(self) -> list[str]:
        flags = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
        flags += ["--unshare-uts", "--die-with-parent", "--new-session", "--as-pid-1"]
        flags += ["--cap-drop", "ALL", "--hostname", "sandbox"]
        if Path("/proc/self/ns/cgroup").exists():
            flags.append("--unshare-cgroup")
        if self._version >= (0, 8):
            flags.append("--disable-userns")
        return flags

    def _files(self, staged: dict[str, str]) -> list[str]:
        flags = ["--ro-bind", "/usr", "/usr"]
        for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
            if Path(name).is_symlink():
                flags += ["--symlink", str(Path(name).readlink()), name]
            elif Path(name).is_dir():
                flags += ["--ro-bind", name, name]
        flags += ["--ro-bind-try", "/nix/store", "/nix/store"]
        flags += ["--proc", "/proc", "--dev", "/dev"]
        flags += [*self._tmpfs("/dev/shm", _SCRATCH_BYTES), "--remount-ro", "/dev"]
        flags += self._tmpfs(self._temp, _SCRATCH_BYTES)
        flags += self._tmpfs(_WORK, WORK_BYTES)
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
        return flags

    def _tmpfs(self, path: str, size: int) -> list[str]:
        sized = ["--size", str(size)] if self._version >= (0, 7) else []
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
