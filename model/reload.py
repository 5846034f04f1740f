"""New weights for a model that is in use: checked whole before the first number is replaced."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from model.checkpoint import load_model
from model.config import load_config
from model.errors import CheckpointError
from model.transformer import Transformer


@dataclass(frozen=True)
class NewWeights:
    """A checkpoint's weights in this machine's memory, of the sizes and type of a model in use."""

    model: Transformer

    @classmethod
    def read(cls, directory: Path | str, like: Transformer) -> NewWeights:
        """Read a folder. Raises CheckpointError or ModelError for a folder that cannot be loaded,
        for other sizes than those of `like`, and for numbers that are not finite."""
        directory = Path(directory)
        config = load_config(directory)
        for field in fields(config):
            new, old = getattr(config, field.name), getattr(like.config, field.name)
            if new != old:
                raise CheckpointError(
                    f"{directory}: {field.name} is {new}, but the model in use has {old}; "
                    "start another server for it"
                )
        return cls(load_model(directory, dtype=like.dtype))

    @torch.no_grad()
    def copy_to(self, model: Transformer) -> None:
        """Put the numbers where the model's are, so that whatever reads them there stays good."""
        for new, old in zip(
            (*self.model.parameters(), *self.model.buffers()),
            (*model.parameters(), *model.buffers()),
            strict=True,
        ):
            old.copy_(new)
