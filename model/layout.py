"""The Hugging Face layout on disk: names and shapes of the tensors, and the files they are in.

No torch here, so a dry run can say in milliseconds that a checkpoint cannot be loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from safetensors import SafetensorError, safe_open

from model.config import CONFIG_NAME, FP8_BLOCK, ModelConfig, load_config
from model.errors import CheckpointError, ModelError
from model.tokenizer import BOS, EOS, PAD, Tokenizer

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
NAMED_FAULTS: Final = 5
"""So many faults of one kind are named in a message; the others are counted."""
_FLOATS: Final = ("BF16", "F16", "F32", "F64")
_FP8_WEIGHT: Final = re.compile(
    r"model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|block_sparse_moe\.(experts\.\d+|shared_experts)\.w[123])\.weight"
)

Shape = tuple[int, ...]


def check_checkpoint(directory: Path | str) -> None:
    """Raise CheckpointError or ModelError, naming the fault, if a folder cannot be loaded.

    Reads the configuration, the tokenizer and the shards' headers, not the weights themselves.
    """
    directory = Path(directory)
    config = load_config(directory)
    check_tokenizer(directory, config)
    find_tensors(directory, tensor_shapes(config))


def check_tokenizer(directory: Path, config: ModelConfig) -> None:
    """Raise ModelError if the folder's tokenizer is missing or is that of another model."""
    tokenizer = Tokenizer.load(directory)
    check_vocabulary(directory, tokenizer, config)
    marks = (("pad", PAD, tokenizer.pad_id), ("bos", BOS, tokenizer.bos_id))
    for name, token, held in (*marks, ("eos", EOS, tokenizer.eos_id)):
        wanted = getattr(config, f"{name}_token_id")
        if wanted is not None and held != wanted:
            raise CheckpointError(
                f"{directory}: {name}_token_id is {wanted} in {CONFIG_NAME}, but the tokenizer's "
                f"{token} is {held}; the folder mixes two checkpoints"
            )


def check_vocabulary(directory: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise CheckpointError if the model lacks rows for tokens of the folder's tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens but the model "
            f"{config.vocab_size}; the folder mixes two checkpoints"
        )


def last_whole(
    directory: Path | str, check: Callable[[Path], None] = check_checkpoint
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint among a folder's `step-N`, and why newer ones are not whole.

    Whole means that `check` raises no ModelError: what a full disk, a crash or an unfinished copy
    cut off is passed over. None where no folder is whole.
    """
    steps = {
        int(path.name.removeprefix("step-")): path
        for path in Path(directory).glob("step-*")
        if path.name.removeprefix("step-").isdecimal()
    }
    faults: list[str] = []
    for _, path in sorted(steps.items(), reverse=True):
        try:
            check(path)
        except ModelError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


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
        if shared := config.shared_intermediate_size:
            out[f"{moe}.shared_experts.w1.weight"] = (shared, d)
            out[f"{moe}.shared_experts.w3.weight"] = (shared, d)
            out[f"{moe}.shared_experts.w2.weight"] = (d, shared)
    return out | {"model.norm.weight": (d,), "lm_head.weight": (config.vocab_size, d)}


@dataclass(frozen=True)
class Stored:
    """Where the tensors of a checked folder are."""

    files: dict[str, tuple[str, ...]]
    """Shard file → the model's tensors in it, without scales."""
    scale_files: dict[str, str]
    """FP8 tensor → shard file of its scales."""


def is_fp8_weight(name: str) -> bool:
    """True for the tensors that the released FP8 format quantises: projections and experts."""
    return _FP8_WEIGHT.fullmatch(name) is not None


def scale_name(name: str) -> str:
    """Name on disk of an FP8 weight's block scales."""
    return f"{name}_scale_inv"


def scale_shape(shape: Shape) -> Shape:
    """Shape of a weight's block scales: a block at the edge may be smaller than the others."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def find_tensors(directory: Path, shapes: Mapping[str, Shape]) -> Stored:
    """Where each tensor is, once all are there in their shapes, with scales for those in FP8.

    Raises CheckpointError that lists, in one message, all tensors that are missing, not asked for
    or misshapen (the first few by name). Reads headers only.
    """
    where = _where_tensors_are(directory)
    held = _read_headers(directory, where)
    missing = [f"tensor {name} is missing" for name in shapes if name not in held]
    wrong: list[str] = []
    scale_files: dict[str, str] = {}
    for name, shape in shapes.items():
        if name not in held:
            continue
        stored_type, stored_shape = held[name]
        if stored_shape != shape:
            wrong.append(f"tensor {name} has shape {stored_shape} instead of {shape}")
        elif stored_type == "F8_E4M3" and is_fp8_weight(name):
            scale = scale_name(name)
            if scale not in held:
                missing.append(f"tensor {scale} is missing")
            elif held[scale] != ("F32", scale_shape(shape)):
                wrong.append(
                    f"tensor {scale} is {held[scale][0]} {held[scale][1]} instead of "
                    f"F32 {scale_shape(shape)}"
                )
            scale_files[name] = where.get(scale, "")
        elif stored_type not in _FLOATS:
            wrong.append(f"tensor {name} is {stored_type}, which is not read")
    known = shapes.keys() | {scale_name(name) for name in scale_files}
    extra = [f"tensor {name} does not belong to the model" for name in where if name not in known]
    if missing or extra or wrong:
        faults = "; ".join(_name_a_few(kind) for kind in (missing, extra, wrong) if kind)
        raise CheckpointError(
            f"{directory}: against {CONFIG_NAME}, {faults}; save or copy it again"
        )
    if bool(scale_files) != _declares_fp8(directory):
        raise CheckpointError(
            f"{directory}: quantization_config in {CONFIG_NAME} and the weights' type contradict "
            "each other; the folder mixes two checkpoints"
        )
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(where[name], []).append(name)
    return Stored({file: tuple(names) for file, names in files.items()}, scale_files)


def _read_headers(directory: Path, where: Mapping[str, str]) -> dict[str, tuple[str, Shape]]:
    """Type and shape of each tensor that really is in the file where it should be."""
    files = sorted(set(where.values()))
    if absent := [file for file in files if not (directory / file).is_file()]:
        raise CheckpointError(
            f"{directory}: {_name_a_few([f'{file} is missing' for file in absent])}; "
            "copy the checkpoint again"
        )
    held: dict[str, tuple[str, Shape]] = {}
    for file in files:
        with open_shard(directory / file, "numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                if where.get(name) == file:
                    view = shard.get_slice(name)
                    held[name] = view.get_dtype(), tuple(view.get_shape())
    return held


def _name_a_few(faults: Sequence[str]) -> str:
    more = len(faults) - NAMED_FAULTS
    return "; ".join(faults[:NAMED_FAULTS]) + (f"; and {more} more like this" if more > 0 else "")


def _declares_fp8(directory: Path) -> bool:
    path = directory / CONFIG_NAME
    return path.is_file() and bool(_read_object(path).get("quantization_config"))


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
    return _read_object(directory / INDEX_NAME)


def _read_object(path: Path) -> dict[str, Any]:
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
