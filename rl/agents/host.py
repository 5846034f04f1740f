"""A command as a process group of its own, under a deadline. No isolation."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rl.errors import ConfigError

KEPT_BYTES = 1 << 20
_PASSED = ("PATH", "LANG", "LC_ALL", "TZ")
_GRACE_S = 2.0
# The kernel ends the command with the thread that started it: the first process only.
_TETHER = (
    "import ctypes,os,signal,sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True)
class Done:
    """How a command ended: `exit_code` is negative after a signal, None after the deadline."""

    exit_code: int | None
    stdout: str
    stderr: str

    @property
    def timed_out(self) -> bool:
        return self.exit_code is None


def run_group(
    command: Sequence[str], folder: Path, env: Mapping[str, str], deadline_s: float
) -> Done:
    """Run `command` in `folder`; whatever it started is ended with it, or at the deadline.

    It sees PATH and the language of this process, HOME = `folder`, and `env`; no other variable.
    ConfigError where the program does not exist.
    """
    variables = {name: os.environ[name] for name in _PASSED if name in os.environ}
    variables |= {"HOME": str(folder), **env}
    program = _program(command[0], variables.get("PATH", os.defpath), folder)
    argv = [sys.executable, "-IS", "-c", _TETHER, str(os.getpid()), program, *command[1:]]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        return Done(code, _text(out.fileno()), _text(err.fileno()))


def _program(name: str, path: str, folder: Path) -> str:
    found = shutil.which(name, path=path) if "/" not in name else str(folder / name)
    if found is None or not os.access(found, os.X_OK):
        raise ConfigError(f"agent command {name!r}: no such program; give its path")
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group and its descendants to end, then kill them."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()


def _text(descriptor: int) -> str:
    """The end of a file, as text."""
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, KEPT_BYTES, max(0, size - KEPT_BYTES))
    return data.decode("utf-8", "replace")
