"""Checkpoints in the Hugging Face layout: safetensors shards, index, config, tokenizer files.

Memory holds stacked weights (q/k/v together, all experts together); disk holds M2's own names. The
two meet in `disk_tensors`, which names views into the stacked weights, so reading and writing are
the same table.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import CONFIG_NAME, load_config
from model.errors import CheckpointError
from model.layout import INDEX_NAME, find_tensors, open_shard, read_index
from model.transformer import Transformer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def disk_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name on disk, as a view into the model's weights."""
    width = model.config.intermediate_size
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed_tokens.data}
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}"
        attention, moe = layer.self_attn, layer.block_sparse_moe
        q, k, v = torch.split(attention.qkv_proj.data, attention.sizes)
        out[f"{at}.input_layernorm.weight"] = layer.input_layernorm.weight.data
        out[f"{at}.self_attn.q_proj.weight"] = q
        out[f"{at}.self_attn.k_proj.weight"] = k
        out[f"{at}.self_attn.v_proj.weight"] = v
        out[f"{at}.self_attn.o_proj.weight"] = attention.o_proj.data
        out[f"{at}.self_attn.q_norm.weight"] = attention.q_norm.weight.data
        out[f"{at}.self_attn.k_norm.weight"] = attention.k_norm.weight.data
        out[f"{at}.post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight.data
        out[f"{at}.block_sparse_moe.gate.weight"] = moe.gate_EH.data
        if model.config.use_routing_bias:
            out[f"{at}.block_sparse_moe.e_score_correction_bias"] = moe.e_score_correction_bias
        for e in range(model.config.num_local_experts):
            expert = f"{at}.block_sparse_moe.experts.{e}"
            out[f"{expert}.w1.weight"] = moe.w13_EOH.data[e, :width]
            out[f"{expert}.w3.weight"] = moe.w13_EOH.data[e, width:]
            out[f"{expert}.w2.weight"] = moe.w2_EIH.data[e].t()
    out["model.norm.weight"] = model.norm.weight.data
    out["lm_head.weight"] = model.lm_head.data
    return out


def save_checkpoint(
    model: Transformer,
    directory: Path | str,
    *,
    dtype: str = "bfloat16",
    tokenizer_from: Path | str | None,
    max_shard_bytes: int = 12_000_000,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder that transformers, vLLM and `load_model` read; returns its path.

    Router weight and bias are written in float32, the rest in `dtype`. The folder is written
    beside its place, flushed to disk and renamed, so a reader never sees half of one; a folder that
    was there is replaced. `metadata` (JSON values) goes into the index file.
    Raises CheckpointError for an unknown type and for a `tokenizer_from` without `tokenizer.json`.
    """
    target = Path(directory)
    if dtype not in _DTYPES:
        raise CheckpointError(f"checkpoint type {dtype!r}; use one of {', '.join(_DTYPES)}")
    source = Path(tokenizer_from) if tokenizer_from is not None else None
    if source is not None and not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source}: no tokenizer.json to copy; name a folder that has one")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        config = model.config.to_dict() | {"dtype": dtype}
        _write_json(temporary / CONFIG_NAME, config)
        _write_shards(model, temporary, _DTYPES[dtype], max_shard_bytes, dict(metadata or {}))
        for name in TOKENIZER_FILES if source is not None else ():
            assert source is not None
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def load_model(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Read a checkpoint folder; every tensor must be there, in its shape, and nothing else.

    Raises CheckpointError naming the tensor or file at fault.
    """
    directory = Path(directory)
    model = Transformer(load_config(directory), seed=None).cast(dtype)
    read_weights(model, directory)
    return model.to(device)


def read_weights(model: Transformer, directory: Path | str) -> None:
    """Overwrite a model's weights, in place, with those of a checkpoint of the same sizes.

    All names and shapes are checked before the first weight is touched.
    """
    directory = Path(directory)
    views = disk_tensors(model)
    shapes = {name: tuple(view.shape) for name, view in views.items()}
    for file, names in find_tensors(directory, shapes, framework="pt").items():
        with open_shard(directory / file, "pt") as shard:
            for name in names:
                views[name].copy_(shard.get_tensor(name))


def read_metadata(directory: Path | str) -> dict[str, Any]:
    """What `save_checkpoint` was given as metadata; empty if the folder has no index file."""
    directory = Path(directory)
    if not (directory / INDEX_NAME).is_file():
        return {}
    metadata = dict(read_index(directory).get("metadata") or {})
    metadata.pop("total_size", None)
    return metadata


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(
    model: Transformer,
    directory: Path,
    dtype: torch.dtype,
    max_bytes: int,
    metadata: dict[str, Any],
) -> None:
    shards = list(_split_in_shards(model, dtype, max_bytes))
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        views = disk_tensors(model)
        tensors = {
            name: views[name].to("cpu", _disk_dtype(name, dtype)).contiguous() for name in names
        }
        # A slice that needed no conversion still shares its stack's memory: give it its own.
        tensors = {
            n: t.clone() if t.data_ptr() == views[n].data_ptr() else t for n, t in tensors.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": metadata | {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / INDEX_NAME, index)


def _split_in_shards(model: Transformer, dtype: torch.dtype, max_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, view in disk_tensors(model).items():
        more = view.numel() * _disk_dtype(name, dtype).itemsize
        if names and size + more > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _disk_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    router = name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias"))
    return torch.promote_types(dtype, torch.float32) if router else dtype


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename into place; what was there is moved aside first, since folders cannot be swapped."""
    aside = None
    if target.exists():
        aside = temporary.with_name(temporary.name.replace(".tmp-", ".old-"))
        target.rename(aside)
    temporary.rename(target)
    _fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)
