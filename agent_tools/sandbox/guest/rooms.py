"""Rooms: one script's own user, process, mount, IPC, network, host-name and cgroup namespaces.

Three processes take part. The *template* has the packages loaded; a fork of it becomes the script.
The *porter*, forked before anything was loaded and therefore cheap to fork, makes rooms. The
*keeper*, a fork of the porter, is process 1 of a room: it mounts the room's own /proc, work folder
and scratch folders, lays out the inputs, gives up its capabilities, and from then on only reaps.
When the keeper is killed the kernel ends everything in its room and the mounts go with it.

A script shares nothing writable with the template: it enters the room, joins the script's control
group, and puts itself into a user namespace below the room's, where it has no rights over any of
the others. The template keeps one descriptor of the work folder to read the outputs from.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

from agent_tools.sandbox.guest import kernel
from agent_tools.sandbox.guest.layout import lay_out
from agent_tools.sandbox.guest.processes import NotBegunError, WorkerFault
from agent_tools.sandbox.guest.wire import SocketLine

_ANSWER_S = 20.0
_MOUNT_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV
_INODES = 65_536
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_INNER_USER = 65_534  # what a script sees as its own number, and as every other
# In the order in which a script enters them; the process namespace is entered by forking.
_NAMESPACES = {
    "ipc": kernel.CLONE_NEWIPC,
    "net": kernel.CLONE_NEWNET,
    "uts": kernel.CLONE_NEWUTS,
    "cgroup": kernel.CLONE_NEWCGROUP,
    "mnt": kernel.CLONE_NEWNS,
}


@dataclass(frozen=True)
class Room:
    """A prepared room: the script's folder, descriptors of it and of the namespaces."""

    folder: str
    folder_fd: int
    process_namespace: int
    namespaces: tuple[tuple[int, int], ...]
    groups: tuple[int, ...]
    keeper_cpu_s: float


class Rooms:
    """Makes rooms, one at a time. Make it early: its porter is a fork of this process."""

    def __init__(self, root: str, scratch: tuple[str, ...], scratch_mb: int) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        self.porter = os.fork()
        if self.porter == 0:
            code = 1
            try:
                ours.close()
                kernel.die_with_parent()
                gc.freeze()  # a collection in a keeper would copy every page that holds an object
                gc.disable()
                _Porter(SocketLine(theirs), root, scratch, scratch_mb, self._own).serve()
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        ours.settimeout(_ANSWER_S)
        self._line = SocketLine(ours)
        self._names = [n for n in _NAMESPACES if os.path.exists(f"/proc/self/ns/{n}")]  # noqa: PTH110

    def open(self, request: dict[str, Any], memory: int, groups: list[int]) -> Room:
        """A room with the job's files in it. Raises NotBegunError where the kernel refuses."""
        job = {key: request[key] for key in ("folders", "files", "code", "limits")}
        answer, fds = self._ask({"open": job, "names": self._names}, [memory, *groups])
        if "error" in answer:
            raise NotBegunError(f"no room for a script: {answer['error']}")
        flags = [_NAMESPACES[name] for name in self._names]
        spaces = tuple(zip(fds[2:], flags, strict=True))
        return Room(answer["folder"], fds[0], fds[1], spaces, tuple(groups), answer["cpu_s"])

    def fork(self, room: Room) -> int:
        """Fork into the room; as os.fork. The child must call `enter`."""
        kernel.setns(room.process_namespace, kernel.CLONE_NEWPID)
        try:
            pid = os.fork()
        except OSError:
            kernel.setns(self._own, kernel.CLONE_NEWPID)
            raise
        if pid:
            kernel.setns(self._own, kernel.CLONE_NEWPID)
        return pid

    def enter(self, room: Room) -> None:
        """The child's way in: control group, namespaces, and last its own user namespace."""
        for fd in room.groups:
            os.write(fd, b"0")
        for fd, flag in room.namespaces:
            kernel.setns(fd, flag)
        kernel.set_dumpable(True)
        kernel.own_user_namespace(_INNER_USER)
        kernel.drop_capabilities()

    def end(self, room: Room, script: int, *, reaped: bool) -> float:
        """Kill everything in the room; CPU-seconds of what the script's process did not reap."""
        try:
            self._line.send({"end": True}, [])
            if not reaped:  # the keeper cannot go before we have taken notice of the script's end
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(script, 0)
            answer, _ = self._receive()
        except OSError as error:
            raise WorkerFault(f"the porter does not answer: {error}") from error
        return max(0.0, float(answer["cpu_s"]) - room.keeper_cpu_s)

    def close(self, room: Room) -> None:
        """Let go of the room's descriptors; its files vanish with the last of them."""
        os.close(room.folder_fd)
        os.close(room.process_namespace)
        for fd, _flag in room.namespaces:
            os.close(fd)

    def _ask(self, message: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        try:
            self._line.send(message, fds)
            return self._receive()
        except OSError as error:
            raise WorkerFault(f"the porter does not answer: {error}") from error

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        received = self._line.receive()
        if received is None:
            raise WorkerFault("the porter is gone")
        return received


class _Porter:
    """Forks keepers into new process namespaces and ends them."""

    def __init__(
        self, line: SocketLine, root: str, scratch: tuple[str, ...], scratch_mb: int, own: int
    ) -> None:
        self._line = line
        self._root = root
        self._scratch = scratch
        self._scratch_mb = scratch_mb
        self._own = own

    def serve(self) -> None:
        keeper = 0
        while (received := self._line.receive()) is not None:
            message, fds = received
            if "open" in message:
                try:
                    keeper = self._fork_keeper(message["open"], message["names"], fds)
                except OSError as error:
                    self._line.send({"error": str(error)}, [])
                for fd in fds:
                    os.close(fd)
            else:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                os.kill(keeper, signal.SIGKILL)
                os.waitpid(keeper, 0)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                self._line.send({"cpu_s": used}, [])

    def _fork_keeper(self, job: dict[str, Any], names: list[str], fds: list[int]) -> int:
        kernel.unshare(kernel.CLONE_NEWPID, "process")
        try:
            keeper = os.fork()
            if keeper == 0:
                self._keep(job, names, fds)
        finally:
            kernel.setns(self._own, kernel.CLONE_NEWPID)
        return keeper

    def _keep(self, job: dict[str, Any], names: list[str], fds: list[int]) -> None:
        """Process 1 of a room; never returns."""
        try:
            kernel.die_with_parent()
            memory, *groups = fds
            for fd in groups:
                os.write(fd, b"0")
            self._furnish(job["limits"], names)
            lay_out(self._root, job, memory)
            folder_fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            spaces = [
                os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                for name in ("pid", *names)
            ]
            kernel.drop_capabilities()
            usage = resource.getrusage(resource.RUSAGE_SELF)
            answer = {"folder": self._root, "cpu_s": usage.ru_utime + usage.ru_stime}
            self._line.send(answer, [folder_fd, *spaces])
        except OSError as error:
            self._line.send({"error": str(error)}, [])
            signal.pause()  # until the porter ends this room as every other
        os.closerange(0, 1024)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        while True:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            signal.sigtimedwait({signal.SIGCHLD}, 60.0)

    def _furnish(self, limits: dict[str, Any], names: list[str]) -> None:
        flags = 0
        for name in names:
            flags |= _NAMESPACES[name]
        kernel.unshare(flags, " ".join(names))
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
        kernel.mount("proc", "/proc", "proc", _MOUNT_FLAGS | kernel.MS_NOEXEC)
        sizes = {self._root: int(limits["disk_mb"])}
        sizes |= dict.fromkeys(self._scratch, self._scratch_mb)
        for place, megabytes in sizes.items():
            options = f"size={megabytes}m,nr_inodes={_INODES},mode=0755"
            kernel.mount("tmpfs", place, "tmpfs", _MOUNT_FLAGS, options)


def _seal_devices() -> None:
    """Make the devices' mounts read-only: a time set on one would outlive its script.

    Programs still read and write the devices themselves.
    """
    for name in _DEVICES:
        flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID
        kernel.mount("none", f"/dev/{name}", None, flags)


def try_room(rooms: Rooms) -> str | None:
    """Why this host lets us make no rooms, or None after one was made and ended."""
    empty = {
        "folders": [], "files": [], "code": "", "limits": {"disk_mb": 1}
    }  # fmt: skip
    memory = os.memfd_create("nothing", os.MFD_CLOEXEC)
    try:
        _seal_devices()
        room = rooms.open(empty, memory, [])
        try:
            pid = rooms.fork(room)
            if pid == 0:
                code = 1
                try:
                    rooms.enter(room)
                    code = 0
                except OSError as error:
                    code = error.errno or 1
                finally:
                    os._exit(code)
            give_up = time.monotonic() + _ANSWER_S
            ended = 0
            while not ended and time.monotonic() < give_up:
                ended, status = os.waitpid(pid, os.WNOHANG)
                time.sleep(0.001)
            rooms.end(room, pid, reaped=bool(ended))
            if not ended or os.waitstatus_to_exitcode(status) != 0:
                code = os.waitstatus_to_exitcode(status) if ended else 110
                return f"a script cannot enter its namespaces ({os.strerror(abs(code))})"
        finally:
            rooms.close(room)
    except (OSError, WorkerFault) as error:
        return str(error)
    finally:
        os.close(memory)
    return None
