"""Tensors of a checkpoint folder as a stream: read shard by shard, written shard by shard.

Neither side holds more than one shard, whatever the model's size.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import CONFIG_NAME, FP8_SETTINGS, ModelConfig
from model.errors import CheckpointError
from model.fp8 import dequantise, quantise
from model.layout import INDEX_NAME, Stored, is_fp8_weight, open_shard, scale_name

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "fp8": torch.bfloat16,  # of what the format leaves unquantised
}
"""Names of the types that can be written."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def read_tensors(directory: Path, stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor, in the order of the files; FP8 comes out as float32."""
    for file, names in stored.files.items():
        scale_files = {stored.scale_files[name] for name in names if name in stored.scale_files}
        with ExitStack() as stack:
            shards = {
                each: stack.enter_context(open_shard(directory / each, "pt"))
                for each in {file} | scale_files
            }
            for name in names:
                tensor = shards[file].get_tensor(name)
                if name in stored.scale_files:
                    scale = shards[stored.scale_files[name]].get_tensor(scale_name(name))
                    tensor = dequantise(tensor, scale)
                yield name, tensor


def check_finite(directory: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError for NaN, infinity, or a number too large for `dtype`. One pass."""
    ends_2 = torch.stack(tensor.aminmax())
    if not bool(ends_2.isfinite().all()):
        raise CheckpointError(
            f"{directory}: tensor {name} holds NaN or infinity; use an earlier checkpoint"
        )
    if not bool(ends_2.to(dtype).isfinite().all()):
        raise CheckpointError(
            f"{directory}: tensor {name} holds {float(ends_2.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use float32"
        )


def finite(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, each passed through `check_finite`; `directory` is for the message."""
    for name, tensor in tensors:
        check_finite(directory, name, tensor, dtype)
        yield name, tensor


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends without an error.

    It is made beside its place, flushed to disk and renamed, so a reader never sees half of one,
    also after a kill; a folder that was there is replaced in one step.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            fsync(path)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(
    directory: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: str,
    tokenizer_from: Path | None,
    max_shard_bytes: int,
    metadata: Mapping[str, Any],
) -> None:
    """Fill an empty folder with a checkpoint in one of `DTYPES`. Tensors are used up one by one."""
    values = config.to_dict() | {"dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    if dtype == "fp8":
        values["quantization_config"] = FP8_SETTINGS
    _write_json(directory / CONFIG_NAME, values)
    shards = _Shards(directory, max_shard_bytes)
    for name, tensor in tensors:
        shards.add(_encode(name, tensor, dtype))
    shards.close(metadata)
    if tokenizer_from is not None:
        for file in TOKENIZER_FILES:
            if (tokenizer_from / file).is_file():
                shutil.copyfile(tokenizer_from / file, directory / file)


def _encode(name: str, tensor: Tensor, dtype: str) -> dict[str, Tensor]:
    """What is stored for one tensor. Router weight and bias stay float32 or wider."""
    plain = DTYPES[dtype]
    if name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias")):
        plain = torch.promote_types(plain, torch.float32)
    source = tensor.detach().to("cpu")
    if dtype == "fp8" and is_fp8_weight(name):
        stored, scale = quantise(source)
        return {name: stored, scale_name(name): scale}
    out = source.to(plain).contiguous()
    # A slice that needed no conversion still shares its stack's memory: give it its own.
    return {name: out.clone() if out.data_ptr() == tensor.data_ptr() else out}


class _Shards:
    """Writes shards of at most `max_bytes` (one tensor may be more); names them when all are
    known, since a shard's name holds their number."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._held: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._written: list[list[str]] = []

    def add(self, entries: dict[str, Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in entries.values())
        if self._held and self._size + size > self._max_bytes:
            self._flush()
        self._held |= entries
        self._size += size
        self._total += size

    def close(self, metadata: Mapping[str, Any]) -> None:
        self._flush()
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._written):
            file = f"model-{i + 1:05d}-of-{len(self._written):05d}.safetensors"
            self._part(i).rename(self._directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {**metadata, "total_size": self._total}, "weight_map": weight_map}
        _write_json(self._directory / INDEX_NAME, index)

    def _flush(self) -> None:
        save_file(self._held, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._held))
        self._held, self._size = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}"


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename into place. What was there changes places with it, or is moved aside first where the
    file system cannot do that."""
    if not target.exists():
        temporary.rename(target)
        fsync(target.parent)
        return
    aside = temporary
    if not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
        target.rename(aside)
        temporary.rename(target)
    fsync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux's renameat2); False where that does not exist."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
