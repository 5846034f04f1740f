"""The durable state of a trainer: exact float32 weights, both moments, `trainer.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import save_checkpoint
from model.transformer import Transformer
from rl.errors import CheckpointStateError
from rl.masters import MasterAdamW

STATE_FILE = "state.safetensors"
INFO_FILE = "trainer.json"


class TrainerState:
    """Writes and reads what a trainer is besides its settings."""

    def __init__(self, model: Transformer, optimizer: MasterAdamW) -> None:
        self.model = model
        self.version = 0
        self._names = [name for name, _ in model.named_parameters()]
        self._optimizer = optimizer

    def save(
        self,
        folder: Path,
        info: dict[str, Any],
        *,
        tokenizer_from: Path,
        with_state: bool,
        metadata: dict[str, Any],
    ) -> None:
        """Fill `folder`: bf16 weights in Hugging Face layout; `trainer/` with exact float32 weights
        and both moments (only `with_state`) and `trainer.json` = `info` + version."""
        weights = folder / "weights"
        save_checkpoint(self.model, weights, tokenizer_from=tokenizer_from, metadata=metadata)
        for path in weights.iterdir():
            path.rename(folder / path.name)
        weights.rmdir()
        trainer = folder / "trainer"
        trainer.mkdir()
        if with_state:
            save_file(self._tensors(), trainer / STATE_FILE)
            _fsync_file(trainer / STATE_FILE)
        moments = self._optimizer.moments(0)
        step = float(moments["step"]) if moments else 0
        text = json.dumps(info | {"version": self.version, "optimizer_step": step})
        (trainer / INFO_FILE).write_text(text + "\n", encoding="utf-8")
        _fsync_file(trainer / INFO_FILE)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote, return its `info`; CheckpointStateError says what is off."""
        info = read_info(folder)
        path = folder / "trainer" / STATE_FILE
        if not path.is_file():
            raise CheckpointStateError(
                f"{path} is missing: the checkpoint can be served or started from, not resumed"
            )
        tensors = load_file(path)
        for name, tensor in self._exact_weights():
            stored = tensors.get(f"weight.{name}")
            if stored is None or stored.shape != tensor.shape:
                raise CheckpointStateError(f"{path}: no tensor weight.{name} of that shape")
        step = torch.tensor(float(info["optimizer_step"]))
        for index, name in enumerate(self._names):
            moments = None  # where nothing was updated before the checkpoint
            if f"exp_avg.{name}" in tensors:
                keys = ("exp_avg", "exp_avg_sq")
                moments = {"step": step.clone()} | {key: tensors[f"{key}.{name}"] for key in keys}
            self._optimizer.restore(index, tensors[f"weight.{name}"], moments)
        for name, buffer in self._biases():
            buffer.copy_(tensors[f"weight.{name}"])
        self.version = int(info["version"])
        return info

    def _exact_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self._names, self._optimizer.masters, strict=True)
        yield from self._biases()

    def _biases(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                yield name, buffer

    def _tensors(self) -> dict[str, Tensor]:
        out = {
            f"weight.{name}": tensor.detach().cpu().contiguous()
            for name, tensor in self._exact_weights()
        }
        for index, name in enumerate(self._names):
            for key, moment in (self._optimizer.moments(index) or {}).items():
                if key != "step":
                    out[f"{key}.{name}"] = moment.detach().cpu().contiguous()
        return out


def read_info(folder: Path) -> dict[str, Any]:
    """`trainer.json` of a step checkpoint."""
    path = folder / "trainer" / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointStateError(f"{path}: unreadable; remove this checkpoint") from error
    if not isinstance(info, dict):
        raise CheckpointStateError(f"{path}: not a JSON object; remove this checkpoint")
    return info


def _fsync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
