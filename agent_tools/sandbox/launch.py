"""Between the owner and the sandbox: join cgroups, make folders reachable, drop root, exec.

Runs as its own short process so that the owner keeps its mounts and its user. As root it works
in a private mount namespace, where the Python of the scripts is bound to a place that the
unprivileged user can reach (it may live below /root); the mounts vanish with the process.

    python -I -S launch.py '{"cgroups": [...], "stage": {...}, "uid": 65534, "argv": [...]}'
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
STAGE = "/tmp"


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _stage(sources: dict[str, str]) -> None:
    """Bind each source on STAGE/<name>, in a mount namespace of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS), "unshare mounts")
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "make mounts private")
    # Opened before STAGE is covered: a source may lie below it.
    opened = {name: os.open(path, os.O_PATH) for name, path in sources.items()}
    options = b"mode=0755,size=1m"
    _check(libc.mount(b"tmpfs", STAGE.encode(), b"tmpfs", 0, options), f"mount on {STAGE}")
    for name, fd in opened.items():
        target = f"{STAGE}/{name}"
        Path(target).mkdir(mode=0o755)
        source = f"/proc/self/fd/{fd}".encode()
        _check(libc.mount(source, target.encode(), None, _MS_BIND | _MS_REC, None), f"bind {name}")
        os.close(fd)


def main(argument: str) -> None:
    """Replace this process by `argv`, inside the cgroups, as user and group `uid` if given."""
    plan: dict[str, Any] = json.loads(argument)
    for path in plan["cgroups"]:
        Path(path).write_text("0")
    if plan["stage"]:
        _stage(plan["stage"])
    uid = plan["uid"]
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    argv = plan["argv"]
    os.execv(argv[0], argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except OSError as error:
        sys.exit(f"sandbox launch: {error}")
