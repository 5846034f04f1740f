"""Landlock: a process gives up, for good, every file that its rules do not name (Linux 5.13).

Newer kernels also keep it from TCP (6.7) and from signalling or reaching by abstract sockets what
is outside (6.12). Numbers and structures: Linux `include/uapi/linux/landlock.h`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct

from agent_tools.sandbox.guest.kernel import LIBC, check

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every processor
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_WRITE_FILE, _REFER, _TRUNCATE, _IOCTL_DEV = 1 << 1, 1 << 13, 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_VERSION_1 = (1 << 13) - 1
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract sockets, signals
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def version() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    return max(0, int(LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def make_ruleset(readable: list[str], writable: list[str]) -> int | None:
    """Rules as a descriptor: read and execute below `readable`, anything below `writable`.

    None where the kernel has no Landlock. Paths that do not exist are passed over.
    """
    have = version()
    if have == 0:
        return None
    files = _VERSION_1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        if have >= since:
            files |= right
    parts = [files]
    parts += [_TCP] if have >= 4 else []
    parts += [_SCOPES] if have >= 6 else []
    attributes = ctypes.create_string_buffer(struct.pack(f"={len(parts)}Q", *parts))
    ruleset = check(
        LIBC.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(8 * len(parts)), 0),
        "landlock ruleset",
    )
    for path in readable:
        _allow(ruleset, path, _READ)
    for path in writable:
        _allow(ruleset, path, files)
    for path in _DEVICES:
        _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & files)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= _OF_FILES
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
            check(LIBC.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0), f"landlock {path}")
        finally:
            os.close(fd)


def restrict(ruleset: int) -> None:
    """Put this process and its descendants under the rules, for good."""
    check(LIBC.syscall(_RESTRICT_SELF, ruleset, 0), "landlock")
