"""A small model for tests of generation, and weights that all matter."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.config import PRESETS
from model.transformer import Transformer

VOCAB, CONTEXT = 61, 128
CONFIG = replace(
    PRESETS["nano"],
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    num_local_experts=6,
    max_position_embeddings=CONTEXT,
    initializer_range=0.2,
)


@torch.no_grad()
def make_uneven(model: Transformer, seed: int, bias: float) -> Transformer:
    """The model with uneven norms and a routing bias, up to `bias`, that changes choices."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5, generator=generator)
    for layer in model.layers:
        found = layer.block_sparse_moe.e_score_correction_bias
        found.uniform_(-bias, bias, generator=generator)
    return model


def spoil(folder: Path, name: str) -> Path:
    """The checkpoint's folder, once a tensor of it holds NaN: nothing of ours writes such a one."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file)
    return folder
