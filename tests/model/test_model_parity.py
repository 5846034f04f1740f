"""The forward pass and the files are those of transformers' MiniMaxM2ForCausalLM."""

import json

import pytest
import torch
from small_model import make_uneven

from model.checkpoint import load_model, save_checkpoint
from model.config import ModelConfig
from model.transformer import Transformer

transformers = pytest.importorskip("transformers")

# Their plain code: torch's grouped product refuses odd sizes.
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}

# Two odd shapes: a head size that does not divide the hidden size, three query heads a key head,
# experts and widths that are no multiple of anything, and one with a single key head.
SHAPES = {
    "odd": ModelConfig(
        vocab_size=97,
        hidden_size=42,
        intermediate_size=22,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        rotary_dim=6,
        num_local_experts=7,
        num_experts_per_tok=3,
        max_position_embeddings=64,
        rope_theta=1000.0,
        initializer_range=0.2,
    ),
    "single key head": ModelConfig(
        vocab_size=131,
        hidden_size=40,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=12,
        rotary_dim=12,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=96,
        rope_theta=5_000_000.0,
        initializer_range=0.2,
    ),
}


@pytest.fixture(params=SHAPES)
def ours(request):
    """A model in which all weights matter: uneven norms, a routing bias that changes choices."""
    return make_uneven(Transformer(SHAPES[request.param], seed=1), 2, 0.5)


def tokens(config, batch=3, time=19):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.vocab_size, (batch, time), generator=generator)


@torch.no_grad()
def test_our_checkpoint_gives_transformers_the_same_logits(ours, tmp_path):
    save_checkpoint(
        ours, tmp_path / "ours", dtype="float32", tokenizer_from=None, max_shard_bytes=30_000
    )
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    theirs, report = transformers.MiniMaxM2ForCausalLM.from_pretrained(
        tmp_path / "ours",
        **PLAIN,
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids_BT = tokens(ours.config)
    expected_BTV = theirs(ids_BT).logits
    assert expected_BTV.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(ours(ids_BT), expected_BTV, atol=1e-5, rtol=0)
    # The bias really chooses: without it the logits are others.
    for layer in ours.layers:
        layer.block_sparse_moe.e_score_correction_bias.zero_()
    assert (ours(ids_BT) - expected_BTV).abs().max() > 1e-2


@torch.no_grad()
def test_their_checkpoint_loads_here_with_the_same_logits(ours, tmp_path):
    settings = ours.config.to_dict()
    torch.manual_seed(4)
    theirs = transformers.MiniMaxM2ForCausalLM._from_config(
        transformers.MiniMaxM2Config(**settings), **PLAIN, dtype=torch.float32
    )
    for layer in theirs.model.layers:
        layer.mlp.e_score_correction_bias.uniform_(-0.5, 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["model_type"] == "minimax_m2"
    model = load_model(tmp_path / "theirs")
    assert model.config.rotary_dim == ours.config.rotary_dim
    ids_BT = tokens(model.config, batch=2, time=23)
    expected_BTV = theirs.eval()(ids_BT).logits
    torch.testing.assert_close(model(ids_BT), expected_BTV, atol=1e-5, rtol=0)
