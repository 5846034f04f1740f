"""The campaign's store: an append-only event log and content-addressed blobs.

`Campaign.once` is the only way in which the loop acts on the world: intent event (fsync) with an
idempotency key, then the act, then the outcome event (fsync).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agent_tools.errors import InfraError, UserError
from selfevo.events import DERIVED, KINDS, Actor, Event, parse_line, to_event

Listener = Callable[[Event], None]
LOG = "events.jsonl"


class LogError(UserError):
    """events.jsonl is damaged before its last line."""


@dataclass(frozen=True)
class Extent:
    """The whole events at a log's beginning: how many, in how many bytes, and the bytes' hash."""

    events: int
    end: int
    digest: hashlib.blake2b


NOTHING = Extent(0, 0, hashlib.blake2b())


def read_log(path: Path) -> bytes:
    """The bytes of a log; `LogError` where there is none."""
    if not path.is_file():
        raise LogError(f"{path}: no event log here; give a campaign folder (LAB/runs/NAME)")
    return path.read_bytes()


def read_events(path: Path) -> tuple[list[Event], int]:
    """All whole events of a log, and the offset where they end."""
    events, extent = parse_events(read_log(path), path)
    return events, extent.end


def parse_events(raw: bytes, path: Path, before: Extent = NOTHING) -> tuple[list[Event], Extent]:
    """The whole events in `raw` after those of `before`, and what all of them take.

    A torn last line (the writer was killed) is left out; a bad line before it is a `LogError`,
    which names the log as `path`.
    """
    lines = raw[before.end :].split(b"\n")
    torn = lines.pop()
    end = len(raw) - len(torn)
    events = _parse_together(lines, before.events)
    if events is None:
        events = _parse_each(lines, path, before.events)
        end = before.end + sum(len(line) + 1 for line in lines[: len(events)])
    digest = before.digest.copy()
    digest.update(memoryview(raw)[before.end : end])
    return events, Extent(before.events + len(events), end, digest)


def _parse_each(lines: list[bytes], path: Path, before: int) -> list[Event]:
    events: list[Event] = []
    for number, line in enumerate(lines, start=before + 1):
        try:
            event = parse_line(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            if number == before + len(lines):  # a torn write can still end in a line feed
                break
            raise LogError(
                f"{path} line {number}: not an event ({error}); restore the file from a backup"
            ) from error
        if event.seq != number:
            raise LogError(
                f"{path} line {number}: event {event.seq} where {number} was due; "
                "restore the file from a backup"
            )
        events.append(event)
    return events


def _parse_together(lines: list[bytes], before: int) -> list[Event] | None:
    """The events of a log without a fault, at twice the speed of line by line; None for others."""
    try:
        with no_collection():
            records = json.loads(b"[" + b",".join(lines) + b"]")
            events = [to_event(record) for record in records]
    except (ValueError, KeyError, TypeError):
        return None
    in_order = all(event.seq == i for i, event in enumerate(events, start=before + 1))
    return events if len(events) == len(lines) and in_order else None


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """While very many objects are made: the collector would walk them all, and find nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_blob(folder: Path, digest: str) -> bytes:
    """The bytes of a blob; `LogError` if it is missing."""
    path = folder / "blobs" / digest
    if not path.is_file():
        raise LogError(f"{path}: this blob is missing; restore the campaign folder from a backup")
    return path.read_bytes()


class Store:
    """Writer of one campaign's log. The caller holds the campaign's lock.

    `extent` is what is in the log, where the caller has read it.
    """

    def __init__(self, folder: Path, campaign: str, extent: Extent | None = None) -> None:
        self.folder = folder
        self.campaign = campaign
        self.listeners: list[Listener] = []
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        path = folder / LOG
        if extent is None:
            extent = parse_events(read_log(path), path)[1] if path.exists() else NOTHING
        self._file: IO[bytes] = path.open("ab")
        self._end = extent.end
        self._seq = extent.events
        self._digest = extent.digest.copy()
        self._torn = path.stat().st_size != extent.end
        _sync_folder(folder)

    @property
    def extent(self) -> Extent:
        """What is in the log now, as it was read and written here."""
        return Extent(self._seq, self._end, self._digest.copy())

    def append(
        self,
        kind: str,
        data: Mapping[str, Any] | None = None,
        *,
        round_: int = 0,
        actor: Actor = "system",
        cause: int | None = None,
    ) -> Event:
        """Write one event and tell the listeners; fsynced unless its kind is derived."""
        if kind not in KINDS:
            raise ValueError(f"unknown event kind {kind!r}")
        now = round(time.time(), 3)  # as it is read again
        event = Event(self._seq + 1, now, self.campaign, round_, kind, actor, cause, data or {})
        line = event.line().encode("utf-8") + b"\n"
        try:
            if self._torn:  # a half-written line of a killed or interrupted writer
                self._file.truncate(self._end)
            self._torn = True
            self._file.write(line)
            self._file.flush()
            if kind not in DERIVED:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise InfraError(
                f"cannot write {self.folder / LOG}: {error.strerror}; "
                "free some space, then `selfevo resume`"
            ) from error
        self._torn = False
        self._end += len(line)
        self._seq += 1
        self._digest.update(line)
        for listener in self.listeners:
            listener(event)
        return event

    def blob(self, content: bytes | str) -> str:
        """Store bytes once; returns their sha256."""
        raw = content.encode("utf-8") if isinstance(content, str) else content
        digest = hashlib.sha256(raw).hexdigest()
        path = self.folder / "blobs" / digest
        if not path.exists():
            part = path.with_suffix(".part")
            try:
                with part.open("wb") as file:
                    file.write(raw)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except OSError as error:
                raise InfraError(
                    f"cannot write {path}: {error.strerror}; free some space, then `selfevo resume`"
                ) from error
        return digest

    def json_blob(self, value: Any) -> str:
        """Store a JSON value in canonical form; equal values give equal names."""
        return self.blob(canonical(value))

    def read(self, digest: str) -> bytes:
        return read_blob(self.folder, digest)

    def close(self) -> None:
        self._file.close()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the text whose hash names a request."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def sha256(content: bytes | str) -> str:
    raw = content.encode("utf-8") if isinstance(content, str) else content
    return hashlib.sha256(raw).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
