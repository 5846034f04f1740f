"""Reader of W&B's ``.wandb`` files: a LevelDB-style log of protobuf records.

A file is a 7-byte header (``:W&B``, magic 0xBEE1, version 0) and blocks of 32 KiB. A record is one
fragment (type 1) or several (2 first, 3 middle, 4 last); each fragment has a 7-byte head
(CRC-32 of type and data, length, type) and never crosses a block's end.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from agent_tools.errors import UserError
from agent_tools.wandb_logs.rows import RowCollector, flatten

if TYPE_CHECKING:
    from typing import Any

    Record = Any  # wandb.proto.wandb_internal_pb2.Record, which ships without usable types

HEADER = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
BLOCK = 32 * 1024
HEAD = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
MAX_RECORD = 64 * 1024 * 1024


@dataclass
class WandbFile:
    """What a ``.wandb`` file holds beside its rows (those go to the collector)."""

    config: dict[str, object] = field(default_factory=dict)
    exit_code: int | None = None  # None: the run never reported its end


def read_wandb(path: Path, rows: RowCollector) -> WandbFile:
    """Read a ``.wandb`` file; its history rows go to `rows`, in the order they were logged.

    A damaged or cut-off part loses its own records only and adds a warning.
    Raises `UserError` if the file is missing or is no ``.wandb`` file.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2  # lazy: imports all of wandb

    result = WandbFile()
    unknown = 0
    last_step = -1
    for payload in iter_payloads(path, rows):
        record: Record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(payload)
        except DecodeError:
            unknown += 1
            continue
        kind = record.WhichOneof("record_type")
        if kind is None:
            unknown += 1
        elif kind == "run":
            _update_config(result.config, record.run.config)
        elif kind == "config":
            _update_config(result.config, record.config)
        elif kind == "exit":
            result.exit_code = int(record.exit.exit_code)
        elif kind == "history":
            last_step = _add_history(record, last_step, rows)
    if unknown:
        rows.warn(f"{unknown} records of an unknown kind in {path.name} were skipped")
    return result


def iter_payloads(path: Path, rows: RowCollector) -> Iterator[bytes]:
    """The bytes of each record of a ``.wandb`` file; holds one record in memory at a time."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the run directory") from error
    with file:
        header = file.read(len(HEADER))
        if header != HEADER:
            if HEADER.startswith(header):
                rows.warn(f"{path.name} is empty: the run ended before its first flush")
                return
            if header.startswith(HEADER[:-1]):
                raise UserError(
                    f"{path} has format version {header[-1]}, this reader knows version 0: "
                    "read the run's metrics.jsonl, or install the wandb version that wrote it"
                )
            raise UserError(f"{path} is not a .wandb file: give the run-*.wandb file of a run")
        yield from _fragments_joined(file, path.name, rows)


def _fragments_joined(file: BinaryIO, name: str, rows: RowCollector) -> Iterator[bytes]:
    pending: list[bytes] | None = None  # fragments of a record that is not complete yet
    size = 0
    for kind, data in _fragments(file, name, rows):
        if kind == FULL:
            if pending is not None:
                rows.warn(f"{name} has an incomplete record: it was skipped")
            pending = None
            yield data
        elif kind == FIRST:
            pending, size = [data], len(data)
        elif pending is None:
            continue  # the rest of a record whose start was lost; already warned
        else:
            pending.append(data)
            size += len(data)
            if size > MAX_RECORD:
                rows.warn(f"{name} has a record above {MAX_RECORD} bytes: it was skipped")
                pending = None
            elif kind == LAST:
                yield b"".join(pending)
                pending = None
    if pending is not None:
        rows.warn(f"{name} ends inside a record: the rows before it were kept")


def _fragments(file: BinaryIO, name: str, rows: RowCollector) -> Iterator[tuple[int, bytes]]:
    block = HEADER + file.read(BLOCK - len(HEADER))
    pos = len(HEADER)
    while len(block) > pos:
        while len(block) - pos >= HEAD.size:
            crc, length, kind = HEAD.unpack_from(block, pos)
            if (crc, length, kind) == (0, 0, 0):
                break  # zero padding up to the end of the block
            end = pos + HEAD.size + length
            data = block[pos + HEAD.size : end]
            if end > len(block) and len(block) < BLOCK:
                rows.warn(f"{name} ends inside a record: the rows before it were kept")
                return
            if not FULL <= kind <= LAST or zlib.crc32(data, zlib.crc32(bytes([kind]))) != crc:
                rows.warn(f"{name} has a damaged block: its records were skipped")
                break  # LevelDB's rule: go on at the next block
            yield kind, data
            pos = end
        else:
            # Fewer bytes than a head are left: padding in a full block, a cut in the last one.
            if len(block) < BLOCK and len(block) > pos:
                rows.warn(f"{name} ends inside a record: the rows before it were kept")
        block, pos = file.read(BLOCK), 0


def _add_history(record: Record, last_step: int, rows: RowCollector) -> int:
    metrics: dict[str, object] = {}
    for item in record.history.item:
        key = item.key or ".".join(item.nested_key)
        value = _json(item.value_json)
        metrics.update(flatten(value, key))
    step = metrics.get("_step")
    if not isinstance(step, int):
        has_step = record.history.HasField("step")
        step = int(record.history.step.num) if has_step else last_step + 1
    rows.add(step, metrics)
    return step


def _update_config(config: dict[str, object], record: Record) -> None:
    for item in record.update:
        key = item.key or ".".join(item.nested_key)
        if not key.startswith("_"):
            config.update(flatten(_json(item.value_json), key))
    for item in record.remove:
        config.pop(item.key or ".".join(item.nested_key), None)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
