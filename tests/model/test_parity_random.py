"""Ten random configurations equal transformers' MiniMaxM2 in float32: logits and all gradients."""

import random

import pytest
import torch
from small_model import make_uneven
from test_model_parity import PLAIN

from model.checkpoint import disk_tensors, save_checkpoint
from model.config import ModelConfig
from model.layout import tensor_shapes
from model.transformer import Transformer

transformers = pytest.importorskip("transformers")


def random_config(seed: int) -> ModelConfig:
    """Sizes that divide nothing but what must be divided."""
    rng = random.Random(seed)
    key_heads = rng.randint(1, 3)
    head_dim = 2 * rng.randint(2, 12)
    experts = rng.randint(3, 12)
    return ModelConfig(
        vocab_size=rng.randint(40, 160),
        hidden_size=rng.randint(12, 72),
        intermediate_size=rng.randint(5, 40),
        num_hidden_layers=rng.randint(2, 4),
        num_attention_heads=key_heads * rng.randint(1, 6),
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        rotary_dim=2 * rng.randint(1, head_dim // 2),
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(
            2, experts
        ),  # one alone has weight 1: no gradient for the router
        max_position_embeddings=64,
        rope_theta=rng.choice([100.0, 10_000.0, 5_000_000.0]),
        rms_norm_eps=rng.choice([1e-6, 1e-5]),
        initializer_range=0.2,
    )


def their_gradients(theirs) -> dict[str, torch.Tensor]:
    """Gradients by the names on disk; in their memory the experts of a layer are one tensor."""
    out = {}
    for name, weight in theirs.named_parameters():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        stem = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(weight.grad):
                out[f"{stem}.{e}.w1.weight"], out[f"{stem}.{e}.w3.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            out |= {f"{stem}.{e}.w2.weight": down for e, down in enumerate(weight.grad)}
        else:
            out[name] = weight.grad
    return out


def our_gradients(ours: Transformer) -> dict[str, torch.Tensor]:
    """The same, by the table that names the weights."""
    for weight in ours.parameters():
        weight.data = weight.grad
    found = disk_tensors(ours)
    return {n: t for n, t in found.items() if not n.endswith("e_score_correction_bias")}


@pytest.mark.parametrize("seed", range(10))
def test_logits_and_all_gradients_equal_theirs(seed, tmp_path):
    config = random_config(seed)
    ours = make_uneven(Transformer(config, seed=seed), seed, 0.3)
    save_checkpoint(ours, tmp_path, dtype="float32", tokenizer_from=None)
    theirs = transformers.MiniMaxM2ForCausalLM.from_pretrained(
        tmp_path, **PLAIN, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(0, config.vocab_size, (3, 23), generator=generator)
    target_BT = torch.randint(0, config.vocab_size, (3, 23), generator=generator)
    logits = []
    for model in (ours, theirs):
        found = model(ids_BT)
        logits.append(found if isinstance(found, torch.Tensor) else found.logits)
        loss = torch.nn.functional.cross_entropy(logits[-1].flatten(0, 1), target_BT.flatten())
        loss.backward()
    assert logits[1].std() > 0.3  # no comparison of zeros
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    mine, reference = our_gradients(ours), their_gradients(theirs)
    wanted = {n for n in tensor_shapes(config) if not n.endswith("e_score_correction_bias")}
    assert mine.keys() == reference.keys() == wanted
    for name in wanted:
        error, largest = (mine[name] - reference[name]).abs().max(), reference[name].abs().max()
        assert error <= 1e-5 * min(largest, 1), name
    assert all(g.abs().max() > 1e-4 for n, g in reference.items() if ".experts." not in n)
