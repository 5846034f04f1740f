"""`python -m model.describe` gives the released model's published numbers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import model
from model.checkpoint import save_checkpoint
from model.config import FULL, PRESETS, WINDOW
from model.describe import describe, main
from model.layout import tensor_shapes
from model.transformer import Transformer

NANO = Path(model.__path__[0]) / "checkpoints" / "nano"


def billions(number, digits=2):
    return round(number / 1e9, digits)


def test_m2_has_the_published_numbers():
    m2 = describe(PRESETS["m2"])
    assert billions(m2.parameters) == 228.69
    assert billions(m2.active, 3) == 9.801
    assert billions(m2.active_with_head) == 10.42
    assert billions(m2.active_with_head_and_embedding) == 11.03
    assert billions(m2.parameters_by_part["experts"] / 62, 3) == 3.624
    assert round(m2.parameters_by_part["attention"] / 62e6, 2) == 44.04
    assert round(m2.parameters_by_part["router"] / 62e6, 2) == 0.79
    assert billions(m2.parameters_by_part["embedding"] + m2.parameters_by_part["head"], 3) == 1.229
    assert m2.kv_bytes_per_token == 253_952
    assert (m2.context, round(m2.kv_bytes_at_context / 2**30, 1)) == (196_608, 46.5)
    assert (m2.kv_bytes_of_windows, m2.window_layers) == (0, 0)
    # What hf-mem reads from the headers of the released files (its README).
    assert m2.memory["fp8"] == 230_121_630_720


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("small", 0.298, 0.147), ("base", 1.056, 0.453), ("mini", 17.79, 2.077)],
)
def test_presets_have_the_sizes_of_their_names(name, parameters, active):
    found = describe(PRESETS[name])
    assert billions(found.parameters, 3) == pytest.approx(parameters, abs=5e-3)
    assert billions(found.active_with_head_and_embedding, 3) == pytest.approx(active, abs=1e-3)


@pytest.mark.parametrize("name", ["small", "base", "mini"])
def test_presets_keep_the_rules_of_shape(name):
    config, m2 = PRESETS[name], PRESETS["m2"]
    assert config.head_dim == m2.head_dim and config.rotary_dim == m2.rotary_dim
    assert config.intermediate_size * 2 == config.hidden_size
    assert config.num_attention_heads == 6 * config.num_key_value_heads
    if name == "mini":
        assert config.query_size == 2 * config.hidden_size
        assert (config.num_local_experts, config.num_experts_per_tok) == (128, 8)


def test_parameters_are_those_of_the_model():
    config = replace(PRESETS["nano"], num_hidden_layers=2)
    found, real = describe(config), Transformer(config, seed=None)
    bias = sum(layer.block_sparse_moe.e_score_correction_bias.numel() for layer in real.layers)
    assert found.parameters == bias + sum(p.numel() for p in real.parameters())
    assert sum(found.parameters_by_part.values()) == found.parameters
    used = {n: s for n, s in tensor_shapes(config).items() if ".experts." not in n}
    one = 3 * config.hidden_size * config.intermediate_size
    by_hand = sum(a * (b[0] if b else 1) for a, *b in used.values()) + 2 * 2 * one
    assert found.active_with_head_and_embedding == by_hand


def test_windows_bound_memory_and_work():
    kinds = (WINDOW, WINDOW, FULL, WINDOW, WINDOW, FULL)
    config = replace(PRESETS["nano"], attn_type_list=kinds, sliding_window=100, num_sink_tokens=4)
    full, found = describe(PRESETS["nano"], context=1000), describe(config, context=1000)
    layer = full.kv_bytes_per_token // 6
    assert layer == 2 * 2 * 32 * 2  # keys and values, 2 heads of 32, 2 bytes
    assert (found.window_layers, found.kv_bytes_per_token) == (4, 2 * layer)
    assert found.kv_bytes_of_windows == 4 * 104 * layer
    assert found.kv_bytes_at_context == (2 * 1000 + 4 * 104) * layer
    # 8 query heads of 32: two products of two operations for each position that is seen
    assert full.flops_per_token - found.flops_per_token == 4 * (1000 - 104) * 4 * 256
    assert full.flops_per_token == 2 * full.active_with_head + 6 * 1000 * 4 * 256
    short = describe(config, context=50)
    assert short.kv_bytes_at_context == 6 * 50 * layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_memory_is_what_a_checkpoint_takes(tmp_path, dtype):
    config = replace(PRESETS["nano"], num_hidden_layers=1, hidden_size=130, vocab_size=64)
    save_checkpoint(Transformer(config), tmp_path / "ck", dtype=dtype, tokenizer_from=None)
    index = json.loads((tmp_path / "ck" / "model.safetensors.index.json").read_text())
    assert describe(config).memory[dtype] == index["metadata"]["total_size"]


def test_optimiser_memory_is_masters_and_two_moments():
    found = describe(PRESETS["base"])
    assert found.memory["optimiser"] == 3 * 4 * found.parameters
    # float32 gradients, and bfloat16 copies of all but the router, which is float32 itself
    short = found.parameters - found.parameters_by_part["router"]
    assert found.memory["training"] == 4 * 4 * found.parameters + 2 * short


def test_the_command(tmp_path, capsys):
    assert main(["m2"]) == 0
    shown = capsys.readouterr().out
    for figure in ("228.69 B", "9.80 B", "10.42 B", "253,952", "46.5 GiB"):
        assert figure in shown
    assert main([str(NANO), "--json", "--context", "1"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"] == 9_139_328 + 6 * 16  # and the routing biases
    assert values["kv_bytes_at_context"] == 1536
    for arguments, said in (
        (["m3"], "no model 'm3'; name a folder or one of nano, small, base, mini, m2"),
        ([str(tmp_path)], "not a checkpoint folder"),
        (["nano", "--context", "4097"], "from 1 to the model's 4096"),
        (["nano", "--context", "0"], "from 1"),
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert said in shown.err and not shown.out


def test_no_torch_is_imported():
    code = "import model.describe, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
