"""Snapshots of a work folder: tar archives that are checked before anybody keeps or unpacks one."""

from __future__ import annotations

import io
import posixpath
import tarfile

from agent_tools.sandbox.types import SandboxError

MOST_BYTES = 256 << 20
MOST_ENTRIES = 20_000


def check_snapshot(
    data: bytes, most_bytes: int = MOST_BYTES, most_entries: int = MOST_ENTRIES
) -> tuple[str, ...]:
    """The names in a snapshot, in order. Raises SandboxError for one that must not be unpacked.

    Allowed are folders, ordinary files and relative links that stay inside, each once, below
    folders that the archive itself made before, of at most `most_bytes` in all.
    """
    names: dict[str, bool] = {}
    total = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                if len(names) >= most_entries:
                    raise SandboxError(f"the snapshot has over {most_entries} entries")
                _check_name(entry.name, names)
                if entry.issym():
                    _check_link(entry.name, entry.linkname)
                elif not entry.isreg() and not entry.isdir():
                    raise SandboxError(f"snapshot entry {entry.name!r} is a device, pipe or link")
                total += entry.size
                if total > most_bytes or entry.issparse():
                    raise SandboxError(f"the snapshot unpacks to more than {most_bytes >> 20} MiB")
                names[entry.name] = entry.isdir()
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise SandboxError(f"the snapshot is no tar archive ({error}): take a new one") from error
    return tuple(names)


def _check_name(name: str, before: dict[str, bool]) -> None:
    clean = posixpath.normpath(name)
    if name != clean or name in ("", ".") or clean.startswith(("/", "../")) or clean == "..":
        raise SandboxError(f"snapshot entry {name!r} leads out of the work folder")
    if name in before:
        raise SandboxError(f"snapshot entry {name!r} is there twice")
    parent = posixpath.dirname(name)
    if parent and not before.get(parent, False):
        raise SandboxError(f"snapshot entry {name!r} lies in no folder of the snapshot")


def _check_link(name: str, target: str) -> None:
    inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    if not target or target.startswith("/") or inside == ".." or inside.startswith("../"):
        raise SandboxError(f"snapshot link {name!r} leads to {target!r}, out of the work folder")
