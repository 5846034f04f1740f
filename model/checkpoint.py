"""Checkpoints in the Hugging Face layout: safetensors shards, index, config, tokenizer files.

Memory holds stacked weights (q/k/v together, all experts together); disk holds M2's own names. The
two meet in `disk_tensors`, which names views into the stacked weights, so reading and writing are
the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, load_config
from model.errors import CheckpointError
from model.layout import INDEX_NAME, find_tensors, read_index
from model.shards import DTYPES, check_finite, finite, read_tensors, whole_folder, write_folder
from model.transformer import Block, Transformer


def disk_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name on disk, as a view into the model's weights."""
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed_tokens.data}
    for i, layer in enumerate(model.layers):
        out |= block_tensors(layer, f"model.layers.{i}", model.config)
    out["model.norm.weight"] = model.norm.weight.data
    out["lm_head.weight"] = model.lm_head.data
    return out


def block_tensors(layer: Block, at: str, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of one block by their names on disk, which begin with `at`."""
    width = config.intermediate_size
    attention, moe = layer.self_attn, layer.block_sparse_moe
    q, k, v = torch.split(attention.qkv_proj.data, attention.sizes)
    out: dict[str, Tensor] = {
        f"{at}.input_layernorm.weight": layer.input_layernorm.weight.data,
        f"{at}.self_attn.q_proj.weight": q,
        f"{at}.self_attn.k_proj.weight": k,
        f"{at}.self_attn.v_proj.weight": v,
        f"{at}.self_attn.o_proj.weight": attention.o_proj.data,
        f"{at}.self_attn.q_norm.weight": attention.q_norm.weight.data,
        f"{at}.self_attn.k_norm.weight": attention.k_norm.weight.data,
        f"{at}.post_attention_layernorm.weight": layer.post_attention_layernorm.weight.data,
        f"{at}.block_sparse_moe.gate.weight": moe.gate_EH.data,
    }
    if config.use_routing_bias:
        out[f"{at}.block_sparse_moe.e_score_correction_bias"] = moe.e_score_correction_bias
    for e in range(config.num_local_experts):
        expert = f"{at}.block_sparse_moe.experts.{e}"
        out[f"{expert}.w1.weight"] = moe.w13_EOH.data[e, :width]
        out[f"{expert}.w3.weight"] = moe.w13_EOH.data[e, width:]
        out[f"{expert}.w2.weight"] = moe.w2_EIH.data[e].t()
    if moe.shared_w13_QH is not None and moe.shared_w2_HS is not None:
        shared, w1_w3 = f"{at}.block_sparse_moe.shared_experts", moe.shared_w13_QH.data
        out[f"{shared}.w1.weight"], out[f"{shared}.w3.weight"] = w1_w3.chunk(2)
        out[f"{shared}.w2.weight"] = moe.shared_w2_HS.data
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

    `dtype` is bfloat16, float32, float64 or fp8 (projections and experts in FP8 blocks, the rest
    bfloat16). Router weight and bias are written in float32. The folder is written beside its
    place, flushed to disk and renamed, so a reader never sees half of one; a folder that was there
    is replaced. `metadata` (JSON values) goes into the index file.
    Raises CheckpointError for an unknown type, a `tokenizer_from` without `tokenizer.json`, and NaN
    or infinity in a weight, since no reader takes them.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"checkpoint type {dtype!r}; use one of {', '.join(DTYPES)}")
    source = Path(tokenizer_from) if tokenizer_from is not None else None
    if source is not None and not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source}: no tokenizer.json to copy; name a folder that has one")
    with whole_folder(Path(directory)) as folder:
        write_folder(
            folder,
            model.config,
            finite(Path(directory), disk_tensors(model).items(), DTYPES[dtype]),
            dtype=dtype,
            tokenizer_from=source,
            max_shard_bytes=max_shard_bytes,
            metadata=metadata or {},
        )
    return Path(directory)


def load_model(
    directory: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """Read a checkpoint folder; every tensor must be there, in its shape, finite, and nothing else.

    FP8 weights are dequantised. Raises CheckpointError naming the tensors or file at fault.
    """
    directory = Path(directory)
    model = Transformer(load_config(directory), seed=None).cast(dtype)
    read_weights(model, directory)
    return model.to(device)


def read_weights(model: Transformer, directory: Path | str) -> None:
    """Overwrite a model's weights, in place, with those of a checkpoint of the same sizes.

    All names and shapes are checked before the first weight is touched; NaN and infinity are found
    while copying, so after that error the model is good for nothing.
    """
    directory = Path(directory)
    views = disk_tensors(model)
    stored = find_tensors(directory, {name: tuple(view.shape) for name, view in views.items()})
    for name, tensor in read_tensors(directory, stored):
        check_finite(directory, name, tensor, views[name].dtype)
        views[name].copy_(tensor)


def read_metadata(directory: Path | str) -> dict[str, Any]:
    """What `save_checkpoint` was given as metadata; empty if the folder has no index file."""
    directory = Path(directory)
    if not (directory / INDEX_NAME).is_file():
        return {}
    metadata = dict(read_index(directory).get("metadata") or {})
    metadata.pop("total_size", None)
    return metadata
