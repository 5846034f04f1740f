"""Compiles the C files of this folder with the system's C compiler, once, and loads them.

The library lies in `$XDG_CACHE_HOME/selfevo/native` (`~/.cache` by default), named by a hash of
everything that it depends on: source, flags, compiler, processor. It ends with a hash of itself, so
a damaged file is known and made again; it is renamed into place, so that two processes may compile
at once. What cannot be had is a NativeUnavailableError of one line.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from model.errors import ModelError

SOURCES = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# The processor's own instructions; a compiler that does not know the first is asked for the next.
PROCESSOR_FLAGS = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 120
_DIGEST = 32

_lock = threading.Lock()
_found: dict[tuple[object, ...], ctypes.CDLL | str] = {}  # the library, or why there is none


class NativeUnavailableError(ModelError):
    """Why there is no native decode step here, in one line."""


def load_library(sources: Path = SOURCES) -> ctypes.CDLL:
    """The compiled C files, made if need be. Raises NativeUnavailableError, and again without
    another try as long as compiler and cache folder are the same."""
    wanted = (sources, os.environ.get("CC"), os.environ.get("PATH"), cache_folder())
    with _lock:
        if wanted not in _found:
            try:
                _found[wanted] = _find(sources)
            except NativeUnavailableError as error:
                _found[wanted] = str(error)
        found = _found[wanted]
    if isinstance(found, str):
        raise NativeUnavailableError(found)
    return found


def cache_folder() -> Path:
    """Where libraries are kept."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise NativeUnavailableError("no home folder; set XDG_CACHE_HOME") from None
    return Path(base) / "selfevo" / "native"


def _compiler() -> list[str]:
    try:
        words = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as error:
        raise NativeUnavailableError(f"CC: {error}") from None
    if shutil.which(words[0]) is None:
        raise NativeUnavailableError(f"no C compiler ({words[0]} not found)")
    return words


def _key(sources: Path, compiler: list[str]) -> str:
    version = _run([*compiler, "--version"]).stdout
    told = [path.read_bytes() for path in sorted(sources.glob("*.[ch]"))]
    told += [repr((FLAGS, PROCESSOR_FLAGS, compiler)).encode(), version, _processor().encode()]
    return hashlib.sha256(b"\0".join(told)).hexdigest()[:24]


def _processor() -> str:
    """What `-march=native` looks at: model and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return " ".join(platform.uname())
    names = ("flags", "Features", "model name", "CPU part", "CPU implementer")
    return platform.machine() + "\n".join(sorted({x for x in lines if x.startswith(names)}))


def _find(sources: Path) -> ctypes.CDLL:
    compiler = _compiler()
    path = cache_folder() / f"decode-step-{_key(sources, compiler)}.so"
    try:
        if not _whole(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _compile(sources, compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailableError(f"{path}: {error.strerror or error}") from None


def _whole(path: Path) -> bool:
    """True for a file of ours that is as it was written."""
    try:
        data, owner = path.read_bytes(), path.stat().st_uid
    except FileNotFoundError:
        return False
    same = hashlib.sha256(data[:-_DIGEST]).digest() == data[-_DIGEST:]
    return same and owner == os.getuid()


def _compile(sources: Path, compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        files = [str(file) for file in sorted(sources.glob("*.c"))]
        for flags in PROCESSOR_FLAGS:
            done = _run([*compiler, *FLAGS, *flags, "-o", str(made), *files, "-lm"])
            if done.returncode == 0:
                break
        else:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            why = next((x for x in lines if "error" in x), lines[0] if lines else "no message")
            raise NativeUnavailableError(f"{Path(compiler[0]).name} failed: {why}")
        data = made.read_bytes()
        made.write_bytes(data + hashlib.sha256(data).digest())
        made.replace(path)


def _run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            command, capture_output=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{Path(command[0]).name} failed: {error}") from None
