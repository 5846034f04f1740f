"""The campaign's store: an append-only event log and content-addressed blobs.

`Campaign.once` is the only way in which the loop acts on the world: intent event (fsync) with an
idempotency key, then the act, then the outcome event (fsync).
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from agent_tools.errors import InfraError, UserError
from selfevo.events import DERIVED, KINDS, Actor, Event, parse_line, to_event

Listener = Callable[[Event], None]


class LogError(UserError):
    """events.jsonl is damaged before its last line."""


def read_events(path: Path) -> tuple[list[Event], int]:
    """All whole events of a log, and the offset where they end.

    A torn last line (the writer was killed) is left out; a bad line before it is a `LogError`.
    """
    if not path.is_file():
        raise LogError(f"{path}: no event log here; give a campaign folder (LAB/runs/NAME)")
    raw = path.read_bytes()
    events: list[Event] = []
    offset = 0
    lines = raw.split(b"\n")
    whole = _parse_together(lines[:-1])
    if whole is not None:
        return whole, len(raw) - len(lines[-1])
    for number, line in enumerate(lines[:-1], start=1):
        try:
            event = parse_line(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:  # a torn write can still end in a line feed
                break
            raise LogError(
                f"{path} line {number}: not an event ({error}); restore the file from a backup"
            ) from error
        if event.seq != len(events) + 1:
            raise LogError(
                f"{path} line {number}: event {event.seq} where {len(events) + 1} was due; "
                "restore the file from a backup"
            )
        events.append(event)
        offset += len(line) + 1
    return events, offset


def _parse_together(lines: list[bytes]) -> list[Event] | None:
    """The events of a log without a fault, at twice the speed of line by line; None for others."""
    collecting = gc.isenabled()
    gc.disable()  # it would walk all these new objects again and again, and find nothing
    try:
        records = json.loads(b"[" + b",".join(lines) + b"]")
        events = [to_event(record) for record in records]
    except (ValueError, KeyError, TypeError):
        return None
    finally:
        if collecting:
            gc.enable()
    in_order = all(event.seq == i for i, event in enumerate(events, start=1))
    return events if len(events) == len(lines) and in_order else None


def read_blob(folder: Path, digest: str) -> bytes:
    """The bytes of a blob; `LogError` if it is missing."""
    path = folder / "blobs" / digest
    if not path.is_file():
        raise LogError(f"{path}: this blob is missing; restore the campaign folder from a backup")
    return path.read_bytes()


class Store:
    """Writer of one campaign's log. The caller holds the campaign's lock."""

    def __init__(self, folder: Path, campaign: str) -> None:
        self.folder = folder
        self.campaign = campaign
        self.listeners: list[Listener] = []
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        path = folder / "events.jsonl"
        events: list[Event] = []
        end = 0
        if path.exists():
            events, end = read_events(path)
        self._file: IO[bytes] = path.open("ab")
        self._end = end
        self._seq = len(events)
        self._torn = path.stat().st_size != end
        self.events = events
        _sync_folder(folder)

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
        event = Event(
            self._seq + 1, time.time(), self.campaign, round_, kind, actor, cause, data or {}
        )
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
                f"cannot write {self.folder / 'events.jsonl'}: {error.strerror}; "
                "free some space, then `selfevo resume`"
            ) from error
        self._torn = False
        self._end += len(line)
        self._seq += 1
        self.events.append(event)
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
