"""The Hugging Face layout on disk: names and shapes of the tensors, and the files they are in.

No torch here, so a dry run can say in milliseconds that a checkpoint cannot be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from model.config import CONFIG_NAME, ModelConfig, load_config
from model.errors import CheckpointError
from model.tokenizer import Tokenizer

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

Shape = tuple[int, ...]


def check_checkpoint(directory: Path | str) -> None:
    """Raise CheckpointError or ModelError, naming the fault, if a folder cannot be loaded.

    Reads the configuration, the tokenizer and the shards' headers, not the weights themselves.
    """
    directory = Path(directory)
    config = load_config(directory)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens but the model "
            f"{config.vocab_size}; the folder mixes two checkpoints"
        )
    find_tensors(directory, tensor_shapes(config), framework="numpy")


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name on disk → shape of every tensor of a checkpoint of these sizes."""
    d, width, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    q, kv = config.query_size, config.key_value_size
    out: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        attention, moe = f"model.layers.{i}.self_attn", f"model.layers.{i}.block_sparse_moe"
        out |= {
            f"model.layers.{i}.input_layernorm.weight": (d,),
            f"{attention}.q_proj.weight": (q, d),
            f"{attention}.k_proj.weight": (kv, d),
            f"{attention}.v_proj.weight": (kv, d),
            f"{attention}.o_proj.weight": (d, q),
            f"{attention}.q_norm.weight": (q,),
            f"{attention}.k_norm.weight": (kv,),
            f"model.layers.{i}.post_attention_layernorm.weight": (d,),
            f"{moe}.gate.weight": (experts, d),
        }
        if config.use_routing_bias:
            out[f"{moe}.e_score_correction_bias"] = (experts,)
        for e in range(experts):
            out[f"{moe}.experts.{e}.w1.weight"] = (width, d)
            out[f"{moe}.experts.{e}.w3.weight"] = (width, d)
            out[f"{moe}.experts.{e}.w2.weight"] = (d, width)
    return out | {"model.norm.weight": (d,), "lm_head.weight": (config.vocab_size, d)}


def find_tensors(
    directory: Path, shapes: Mapping[str, Shape], *, framework: Literal["pt", "numpy"]
) -> dict[str, list[str]]:
    """Shard file → names of its tensors, once all of them are there in their shapes.

    Raises CheckpointError for the first tensor or file that is missing, misshapen or not asked for.
    """
    where = _where_tensors_are(directory)
    for name in shapes:
        if name not in where:
            raise CheckpointError(f"{directory}: tensor {name} is missing; copy or save it again")
    for name in where:
        if name not in shapes:
            raise CheckpointError(
                f"{directory}: tensor {name} does not belong to the model of its {CONFIG_NAME}"
            )
    files: dict[str, list[str]] = {}
    for name, file in where.items():
        files.setdefault(file, []).append(name)
    for file, names in files.items():
        with open_shard(directory / file, framework) as shard:
            held = set(shard.keys())
            for name in names:
                if name not in held:
                    raise CheckpointError(
                        f"{directory / file}: tensor {name} is missing; save it again"
                    )
                _check_shape(directory, name, shard.get_slice(name), shapes[name])
    return files


def open_shard(path: Path, framework: Literal["pt", "numpy"]) -> Any:
    """An open safetensors file (a context manager); CheckpointError if it is missing or damaged."""
    try:
        return safe_open(path, framework=framework)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the index names this file, but it is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut off ({error}); copy it again") from None


def read_index(directory: Path) -> dict[str, Any]:
    """The index file of a folder that has one; CheckpointError if it is no JSON object."""
    path = directory / INDEX_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); save it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is needed; save it again")
    return values


def _where_tensors_are(directory: Path) -> dict[str, str]:
    """Shard file of each tensor name, from the index or from the single file."""
    if (directory / INDEX_NAME).is_file():
        weight_map = read_index(directory).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{directory / INDEX_NAME}: no weight_map; save it again")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{directory / INDEX_NAME}: {file!r} is not a file name")
        return weight_map
    if (directory / SINGLE_NAME).is_file():
        with open_shard(directory / SINGLE_NAME, "numpy") as shard:
            return dict.fromkeys(shard.keys(), SINGLE_NAME)
    raise CheckpointError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME}; copy it again")


def _check_shape(directory: Path, name: str, stored: Any, asked: Shape) -> None:
    shape = tuple(stored.get_shape())
    if shape != asked:
        raise CheckpointError(
            f"{directory}: tensor {name} has shape {shape}, but {CONFIG_NAME} asks for {asked}"
        )
    if stored.get_dtype() not in ("BF16", "F16", "F32", "F64"):
        raise CheckpointError(
            f"{directory}: tensor {name} is {stored.get_dtype()}; convert the checkpoint to bf16"
        )
