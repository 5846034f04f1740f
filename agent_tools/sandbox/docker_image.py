"""The image of the Docker engine, made from this host's own files; no registry is ever asked.

It holds the interpreter, the script environment, the shared libraries that these need and a few
programs of the system, at the paths that they have here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from agent_tools.errors import InfraError
from agent_tools.sandbox.instance import NOBODY, WORK
from agent_tools.sandbox.interpreter import Interpreter

_PROGRAMS = (
    "bash", "sh", "ls", "cat", "cp", "mv", "rm", "mkdir", "rmdir", "ln", "chmod", "touch", "head",
    "tail", "wc", "sort", "uniq", "cut", "tr", "grep", "sed", "find", "tar", "gzip", "env", "id",
    "echo", "printf", "sleep", "timeout", "true", "false", "test", "date", "dirname", "basename",
    "mktemp", "mkfifo", "readlink", "seq", "tee", "xargs", "diff", "ps", "awk", "mawk",
    "stat", "od", "comm", "join", "paste", "nl", "split", "expr", "uname", "df", "du", "cmp",
    "md5sum", "sha256sum", "realpath", "truncate", "whoami", "which", "nproc", "setsid", "kill",
)  # fmt: skip
_LEFT_OUT = ("test", "tests", "idlelib", "ensurepip", "turtledemo", "lib2to3")
_LDD_S = 120


def image_key(python: Interpreter) -> str:
    """Names what the image would hold: it changes with the interpreter and the packages."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    marks = [recipe, str(python.executable), str(python.stdlib)]
    marks += [*map(str, python.folders), *_PROGRAMS]
    for folder in python.folders:
        for site in sorted(folder.glob("lib/python3*/site-packages")):
            marks += sorted(path.name for path in site.glob("*.dist-info"))
    real = python.executable.resolve()
    marks.append(f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}")
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]


def write_image(python: Interpreter, target: Path) -> None:
    """Write the image's files as a tar archive. Raises InfraError where a program is missing."""
    files = _Files()
    for folder in python.folders:
        for path in _walk(folder, {str(path) for path in python.hidden}):
            files.add(path)
    if not any(python.stdlib.is_relative_to(folder) for folder in python.folders):
        for path in _walk(python.stdlib, set()):  # the system's own Python
            files.add(path)
    files.add(python.executable)
    for target_name, link in python.links:
        files.link(link, target_name)
    for name in ("/bin", "/sbin", "/lib", "/lib64"):
        if Path(name).is_symlink():
            files.link(name, str(Path(name).readlink()))
    for name in _PROGRAMS:
        found = shutil.which(name, path="/usr/bin:/bin")
        if found is not None:
            files.add(Path(found))
    for name in ("bash", "sh"):
        if not files.has(f"/bin/{name}"):
            raise InfraError(f"/bin/{name} is not on this host: install {name}")
    for path in sorted(_libraries(files.binaries())):
        files.add(path)
    for name in ("/etc/ld.so.cache", "/etc/localtime"):
        if Path(name).exists():
            files.add(Path(name))
    files.write(target)


class _Files:
    """The image's entries by path; the way that links lead is added with them."""

    def __init__(self) -> None:
        self._sources: dict[str, Path | str] = {}

    def has(self, name: str) -> bool:
        """Whether the name, or what a linked parent makes of it, is in."""
        return name in self._sources or str(Path(name).parent.resolve() / Path(name).name) in (
            self._sources
        )

    def link(self, name: str, target: str) -> None:
        self._sources[name] = target

    def add(self, path: Path) -> None:
        """Add a file at its own path, with every link on the way to it."""
        for parent in reversed(path.parents):
            if parent.is_symlink():
                self.link(str(parent), str(parent.readlink()))
                self.add(parent.resolve() / path.relative_to(parent))
                return
        if path.is_symlink():
            self.link(str(path), str(path.readlink()))
            following = Path(os.path.normpath(path.parent / path.readlink()))
            if str(following) not in self._sources and following.exists():
                self.add(following)
        elif path.is_file():
            self._sources[str(path)] = path

    def binaries(self) -> list[Path]:
        """Files that the dynamic linker would load or read."""
        found = []
        for source in self._sources.values():
            if isinstance(source, Path):
                with source.open("rb") as file:
                    if file.read(4) == b"\x7fELF":
                        found.append(source)
        return found

    def write(self, target: Path) -> None:
        made: set[str] = set()
        with tarfile.open(target, "w") as archive:

            def folder(name: str, *, owner: int = 0, mode: int = 0o755) -> None:
                # Each parent by itself: an engine gives missing ones a mode nobody can enter.
                for part in [*reversed(Path(name).parents), Path(name)]:
                    text = str(part).lstrip("/")
                    if text and text not in made and str(part) not in self._sources:
                        made.add(text)
                        entry = tarfile.TarInfo(text)
                        last = str(part) == name
                        entry.type, entry.mode = tarfile.DIRTYPE, mode if last else 0o755
                        entry.uid = entry.gid = owner if last else 0
                        archive.addfile(entry)

            for name in ("/proc", "/sys", "/dev", "/etc"):
                folder(name)
            folder("/tmp", mode=0o1777)
            folder(WORK, owner=NOBODY, mode=0o700)
            for name, source in sorted(self._sources.items()):
                folder(str(Path(name).parent))
                entry = tarfile.TarInfo(name.lstrip("/"))
                if isinstance(source, str):
                    entry.type, entry.linkname = tarfile.SYMTYPE, source
                    archive.addfile(entry)
                    continue
                seen = source.stat()
                entry.size, entry.mtime = seen.st_size, int(seen.st_mtime)
                entry.mode = 0o755 if seen.st_mode & 0o111 else 0o644  # and no set-user-id bit
                with source.open("rb") as file:
                    archive.addfile(entry, file)


def _walk(folder: Path, hidden: set[str]) -> Iterator[Path]:
    for base, folders, files in os.walk(folder):
        kept = [n for n in folders if f"{base}/{n}" not in hidden and not _left_out(base, n)]
        folders[:] = kept
        for name in (*files, *(n for n in kept if Path(base, n).is_symlink())):
            yield Path(base, name)


def _left_out(base: str, name: str) -> bool:
    """Parts of the standard library that no script needs; packages stay whole."""
    return name in _LEFT_OUT and "site-packages" not in Path(base).parts


def _libraries(binaries: list[Path]) -> set[Path]:
    """Shared libraries of the system that the binaries load, by the linker's own account."""
    found: set[Path] = set()
    for first in range(0, len(binaries), 200):
        chunk = binaries[first : first + 200]
        try:
            done = subprocess.run(
                ["ldd", *map(str, chunk)], capture_output=True, timeout=_LDD_S, text=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise InfraError(f"ldd does not run ({error}): install libc-bin") from error
        for match in re.finditer(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE):
            found.add(Path(os.path.normpath(match.group(1))))
    return found
