"""System calls that Python 3.11 has no name for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER = 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND = 0x20, 0x1000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 36, 38, 2
_CAPABILITY_VERSION_3 = 0x20080522
LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """The result of a C call. Raises OSError with `what` where it is -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int, pointer: Any = 0) -> None:
    check(LIBC.prctl(option, ctypes.c_ulong(value), pointer, 0, 0), f"prctl {option}")


def unshare(flags: int, what: str) -> None:
    """Leave namespaces for new ones."""
    check(LIBC.unshare(flags), f"new {what} namespace")


def setns(fd: int, flag: int) -> None:
    """Enter the namespace of a descriptor."""
    check(LIBC.setns(fd, flag), f"enter namespace {flag:#x}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    check(
        LIBC.mount(
            source.encode(),
            target.encode(),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode(),
        ),
        f"mount {kind or 'flags'} on {target}",
    )


def install_filter(program: bytes) -> None:
    """Install a seccomp filter (array of struct sock_filter) on this process, for good."""
    buffer = ctypes.create_string_buffer(program, len(program))

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    header = _Program(len(program) // 8, ctypes.addressof(buffer))
    no_new_privileges()
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header))


def no_new_privileges() -> None:
    """Give up gaining rights by exec, for good."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_dumpable(on: bool) -> None:
    """Whether processes of the same user may open our memory and descriptors in /proc."""
    _prctl(_PR_SET_DUMPABLE, int(on))


def die_with_parent() -> None:
    """Get SIGKILL when the parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, as process 1 does by itself."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def drop_capabilities() -> None:
    """Give up every capability; without new privileges no exec can bring one back."""
    head = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    nothing = ctypes.create_string_buffer(24)
    check(LIBC.capset(head, nothing), "capset")


def _put(path: str, text: bytes) -> None:
    """Write a kernel file; plainer than pathlib, for a fork pays for every page it touches."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text)
    finally:
        os.close(fd)


def own_user_namespace(inner: int) -> None:
    """Enter a new user namespace that knows only this user and this group, both as number
    `inner`, and can make no more of its kind."""
    user, group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER, "user")
    set_dumpable(True)  # /proc/self belongs to nobody's root otherwise
    _put("/proc/self/uid_map", f"{inner} {user} 1".encode())
    _put("/proc/self/setgroups", b"deny")
    _put("/proc/self/gid_map", f"{inner} {group} 1".encode())
    with contextlib.suppress(OSError):  # a second guard; the filter refuses namespaces anyway
        _put("/proc/sys/user/max_user_namespaces", b"0")
