"""Input folders as sealed anonymous files: read once, shared by all workers of a pool."""

from __future__ import annotations

import fcntl
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_tools.sandbox.instance import memory_file
from agent_tools.sandbox.types import SandboxError

KEPT_FOLDERS = 16
MOST_INPUT_BYTES = 256 << 20
_ADD_SEALS, _ALL_SEALS = 1033, 0x1 | 0x2 | 0x4 | 0x8  # linux/fcntl.h: seal, shrink, grow, write


@dataclass(frozen=True)
class InputFolder:
    """An inputs folder as one sealed anonymous file: nobody can change it any more."""

    key: str
    fd: int
    folders: tuple[str, ...]
    files: tuple[tuple[str, int], ...]


class Inputs:
    """Reads each distinct inputs folder once; shared by the workers of a pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Any, ...], InputFolder] = OrderedDict()
        self._count = 0

    def get(self, path: Path) -> tuple[InputFolder, int]:
        """The folder as it is now, with a descriptor that the caller closes."""
        signature, folders, found = _list_files(path)
        with self._lock:
            kept = self._kept.get(signature)
            if kept is None:
                parts = [file.read_bytes() for _, file in found]
                self._count += 1
                fd = memory_file("inputs", b"".join(parts))
                fcntl.fcntl(fd, _ADD_SEALS, _ALL_SEALS)
                sizes = tuple((n, len(p)) for (n, _), p in zip(found, parts, strict=True))
                kept = self._kept[signature] = InputFolder(f"{self._count}", fd, folders, sizes)
            self._kept.move_to_end(signature)
            while len(self._kept) > KEPT_FOLDERS:
                os.close(self._kept.popitem(last=False)[1].fd)
            return kept, os.dup(kept.fd)

    def close(self) -> None:
        with self._lock:
            while self._kept:
                os.close(self._kept.popitem()[1].fd)


def _list_files(
    path: Path,
) -> tuple[tuple[Any, ...], tuple[str, ...], list[tuple[str, Path]]]:
    folders: list[str] = []
    files: list[tuple[str, Path]] = []
    marks: list[tuple[Any, ...]] = []
    total = 0
    waiting = [path]
    while waiting:
        here = waiting.pop()
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            raise SandboxError(
                f"inputs folder {here} cannot be read ({error.strerror}): "
                "prepare the competition data first"
            ) from error
        for entry in entries:
            name = str(Path(entry.path).relative_to(path))
            if entry.is_dir():
                folders.append(name)
                waiting.append(Path(entry.path))
            elif entry.is_file():
                seen = entry.stat()
                total += seen.st_size
                marks.append((name, seen.st_size, seen.st_mtime_ns, seen.st_ino))
                files.append((name, Path(entry.path)))
    if total > MOST_INPUT_BYTES:
        raise SandboxError(
            f"inputs folder {path} holds {total >> 20} MiB; "
            f"the sandbox takes {MOST_INPUT_BYTES >> 20}"
        )
    return (str(path), tuple(folders), *marks), tuple(folders), files
