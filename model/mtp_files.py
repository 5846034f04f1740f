"""MTP modules on disk: `mtp.safetensors` and `mtp.json` in a folder, which may be the model's own.

Tensors have DeepSeek-V3's names: `model.layers.{L + i}.` and `enorm`, `hnorm`, `eh_proj`,
`shared_head.norm` or the block's own names, L being the main model's layers. Embedding and head are
the main model's and are not repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint import block_tensors
from model.config import ModelConfig
from model.errors import CheckpointError
from model.layout import open_shard
from model.mtp import MTP
from model.shards import fsync

WEIGHTS_NAME, SIZES_NAME = "mtp.safetensors", "mtp.json"
_SHOWN = 8  # names at most in an error
_SHORT = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def mtp_tensors(mtp: MTP) -> dict[str, Tensor]:
    """Every tensor by its name on disk, as a view into the modules' weights."""
    out: dict[str, Tensor] = {}
    for i, module in enumerate(mtp.layers, mtp.config.num_hidden_layers):
        at = f"model.layers.{i}"
        out[f"{at}.enorm.weight"] = module.enorm.weight.data
        out[f"{at}.hnorm.weight"] = module.hnorm.weight.data
        out[f"{at}.eh_proj.weight"] = module.eh_proj.data
        out[f"{at}.shared_head.norm.weight"] = module.norm.weight.data
        out |= block_tensors(module.block, at, mtp.config)
    return out


def save_mtp(
    mtp: MTP,
    folder: Path | str,
    *,
    dtype: str = "bfloat16",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write both files; a reader never sees half of one. `metadata` (JSON values) goes into
    `mtp.json`. Routers stay float32.

    Raises CheckpointError for an unknown type and for weights that are not finite.
    """
    folder = Path(folder)
    if dtype not in _SHORT:
        raise CheckpointError(f"mtp: type {dtype!r}; use one of {', '.join(_SHORT)}")
    tensors = {}
    for name, view in mtp_tensors(mtp).items():
        router = name.endswith(("block_sparse_moe.gate.weight", "e_score_correction_bias"))
        kept = view.to("cpu", torch.float32 if router else _SHORT[dtype], copy=True)
        if not bool(kept.isfinite().all()):
            raise CheckpointError(f"mtp: {name} holds NaN or infinity; nothing was written")
        tensors[name] = kept.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"num_mtp_modules": mtp.count, "config": mtp.config.to_dict(), **dict(metadata or {})}
    # Weights first: sizes without weights would promise what is not there.
    part = folder / f".{WEIGHTS_NAME}.{os.getpid()}"
    save_file(tensors, part, metadata={"format": "pt"})
    _into_place(part, folder / WEIGHTS_NAME)
    part = folder / f".{SIZES_NAME}.{os.getpid()}"
    part.write_text(json.dumps(sizes, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _into_place(part, folder / SIZES_NAME)


def load_mtp(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MTP:
    """Read the modules of a folder; every tensor must be there, in its shape, finite, and nothing
    else. Raises CheckpointError that lists the tensors at fault."""
    folder = Path(folder)
    config, count = _sizes(folder / SIZES_NAME)
    mtp = MTP(config, count, seed=None).cast(dtype)
    views = mtp_tensors(mtp)
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; copy it again")
    with open_shard(path, "pt") as shard:
        held = {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        faults = [f"{name} is missing" for name in views if name not in held]
        faults += [f"{name} does not belong there" for name in held if name not in views]
        faults += [
            f"{name} has shape {held[name]}, not {tuple(view.shape)}"
            for name, view in views.items()
            if name in held and held[name] != tuple(view.shape)
        ]
        if faults:
            more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            listed = "; ".join(faults[:_SHOWN])
            raise CheckpointError(f"{path}: {listed}{more}; it is not the file of {SIZES_NAME}")
        for name, view in views.items():
            stored = shard.get_tensor(name)
            if not stored.is_floating_point() or not bool(stored.isfinite().all()):
                raise CheckpointError(
                    f"{path}: {name} holds NaN, infinity or no floats; train or copy it again"
                )
            view.copy_(stored)
    return mtp.to(device)


def read_sizes(folder: Path | str) -> dict[str, Any]:
    """All of `mtp.json`. Raises CheckpointError where it is missing or no JSON object."""
    path = Path(folder) / SIZES_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file; name a folder with MTP modules") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); save it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: a JSON object is needed; save it again")
    return values


def _sizes(path: Path) -> tuple[ModelConfig, int]:
    values = read_sizes(path.parent)
    count, config = values.get("num_mtp_modules"), values.get("config")
    if not isinstance(count, int) or count < 1 or not isinstance(config, dict):
        raise CheckpointError(f"{path}: needs num_mtp_modules ≥ 1 and config; save it again")
    return ModelConfig.from_dict(config, where=str(path)), count


def _into_place(part: Path, target: Path) -> None:
    """Flush to disk and rename."""
    fsync(part)
    part.replace(target)
