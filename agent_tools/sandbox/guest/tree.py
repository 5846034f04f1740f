"""Pack a folder into a tar archive and unpack one, without following anything.

The owner checks archives itself, before it keeps or sends one (`agent_tools.sandbox.snapshot`).
"""

from __future__ import annotations

import io
import os
import posixpath
import shutil
import stat
import tarfile
from pathlib import Path


class TreeError(Exception):
    """The folder cannot be packed, or the archive not unpacked."""


def pack(root: str, most_bytes: int, most_entries: int) -> tuple[int, list[str]]:
    """The folder as an anonymous file, and the names of what was left out.

    Ordinary files, folders and links that stay inside are taken; devices, pipes, sockets, links
    to elsewhere and unreadable files are not. Raises TreeError past a bound.
    """
    fd = os.memfd_create("snapshot", os.MFD_CLOEXEC)
    skipped: list[str] = []
    total = entries = 0
    try:
        with (
            os.fdopen(os.dup(fd), "wb") as stream,
            tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for base, folders, files, base_fd in os.fwalk(root, follow_symlinks=False):
                for name in sorted((*folders, *files)):
                    path = posixpath.normpath(posixpath.join(os.path.relpath(base, root), name))
                    entries += 1
                    total += _add(archive, path, name, base_fd, skipped, most_bytes - total)
                    if entries > most_entries:
                        raise TreeError(f"the folder holds over {most_entries} entries")
        os.lseek(fd, 0, os.SEEK_SET)
    except (OSError, RecursionError, UnicodeError, tarfile.TarError) as error:
        os.close(fd)
        raise TreeError(f"the folder cannot be packed: {error}") from error
    except TreeError:
        os.close(fd)
        raise
    return fd, skipped


def _add(
    archive: tarfile.TarFile, path: str, name: str, base_fd: int, skipped: list[str], room: int
) -> int:
    """Add one entry; returns its bytes."""
    seen = os.stat(name, dir_fd=base_fd, follow_symlinks=False)
    entry = tarfile.TarInfo(path)
    entry.mtime = int(seen.st_mtime)
    entry.mode = stat.S_IMODE(seen.st_mode) & 0o777
    if stat.S_ISDIR(seen.st_mode):
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    elif stat.S_ISLNK(seen.st_mode):
        target = os.readlink(name, dir_fd=base_fd)
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if target.startswith("/") or inside == ".." or inside.startswith("../"):
            skipped.append(path)
            return 0
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        archive.addfile(entry)
    elif stat.S_ISREG(seen.st_mode):
        try:
            file_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=base_fd)
        except OSError:
            skipped.append(path)
            return 0
        with os.fdopen(file_fd, "rb") as source:
            found = os.fstat(file_fd)
            if not stat.S_ISREG(found.st_mode) or found.st_size > room:
                raise TreeError(f"{path} of {found.st_size} bytes makes the snapshot too big")
            entry.size = found.st_size
            archive.addfile(entry, source)
        return entry.size
    else:
        skipped.append(path)
    return 0


def unpack(root: str, fd: int) -> None:
    """Empty the folder and fill it from an archive that the owner has checked."""
    empty(root)
    links: list[tarfile.TarInfo] = []
    try:
        with os.fdopen(os.dup(fd), "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            modes: list[tuple[str, int]] = []
            for entry in tar:
                path = f"{root}/{entry.name}"
                if entry.isdir():
                    Path(path).mkdir(0o700)
                    modes.append((path, entry.mode))
                elif entry.issym():
                    links.append(entry)  # last, so that no file is written through one
                else:
                    source = tar.extractfile(entry) or io.BytesIO()
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                    with os.fdopen(os.open(path, flags, 0o600), "wb") as target:
                        shutil.copyfileobj(source, target)
                        os.fchmod(target.fileno(), entry.mode & 0o777)
            for entry in links:
                Path(f"{root}/{entry.name}").symlink_to(entry.linkname)
            for path, mode in reversed(modes):
                Path(path).chmod(mode & 0o777)
    except (OSError, tarfile.TarError) as error:
        raise TreeError(f"the snapshot cannot be unpacked: {error}") from error


def empty(root: str) -> None:
    """Remove everything below a folder, also where a program took its own rights away."""
    try:
        for base, folders, _files, base_fd in os.fwalk(root, follow_symlinks=False):
            del base
            for name in folders:
                if not stat.S_ISLNK(os.stat(name, dir_fd=base_fd, follow_symlinks=False).st_mode):
                    os.chmod(name, 0o700, dir_fd=base_fd)
        for entry in os.scandir(root):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()
    except (OSError, RecursionError) as error:
        raise TreeError(f"the work folder cannot be emptied: {error}") from error
