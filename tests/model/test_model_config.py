"""ModelConfig: presets, Hugging Face names both ways, and refusals."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from model.config import PRESETS, ModelConfig, load_config
from model.errors import CheckpointError, ModelError


def test_m2_preset_holds_the_released_values():
    m2 = PRESETS["m2"].to_dict()
    released = {
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "rope_theta": 5000000,
        "max_position_embeddings": 196608,
        "rms_norm_eps": 1e-6,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "tie_word_embeddings": False,
        "model_type": "minimax_m2",
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    }
    assert {name: m2[name] for name in released} == released
    assert m2["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 5000000,
        "partial_rotary_factor": 0.5,
    }


def test_a_written_config_reads_back(tmp_path):
    for config in PRESETS.values():
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        assert load_config(tmp_path) == config


def test_rotary_size_and_theta_are_found_in_rope_parameters():
    values = PRESETS["nano"].to_dict()
    del values["rotary_dim"]
    values["rope_theta"] = 1.0  # transformers reads the nested value
    assert ModelConfig.from_dict(values) == PRESETS["nano"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_act", "gelu", "hidden_act"),
        ("scoring_func", "tanh", "scoring_func"),
        ("attn_type_list", [1, 2, 1], "3 entries for 6 layers"),
        ("attn_type_list", [2] * 6, "set sliding_window"),
        ("num_sink_tokens", 4, "no window layer"),
        ("num_sink_tokens", -1, "num_sink_tokens"),
        ("shared_intermediate_size", -8, "shared_intermediate_size"),
        ("use_qk_norm", False, "use_qk_norm"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("model_type", "llama", "model_type"),
        ("quantization_config", {"quant_method": "fp8"}, "quantised"),
        ("attn_type_list", [1, 0, 1, 1, 1, 1], "linear attention"),
        ("hidden_size", "256", "hidden_size"),
        ("rotary_dim", 17, "rotary_dim"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("num_experts_per_tok", 17, "num_experts_per_tok"),
        ("rope_parameters", {"rope_type": "yarn"}, "yarn"),
    ],
)
def test_what_this_code_cannot_do_is_refused_by_name(field, value, said):
    with pytest.raises(ModelError, match=said):
        ModelConfig.from_dict(PRESETS["nano"].to_dict() | {field: value})


WINDOWS = {"attn_type_list": (2, 2, 1, 2, 2, 1), "sliding_window": 64, "num_sink_tokens": 2}


@pytest.mark.parametrize(
    "changes",
    [
        WINDOWS,
        {"scoring_func": "softmax", "norm_topk_prob": False},
        {"shared_intermediate_size": 96},
        WINDOWS | {"shared_intermediate_size": 96},
    ],
)
def test_what_the_released_class_lacks_is_written_under_another_type(tmp_path, changes):
    config = replace(PRESETS["nano"], **changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "selfevo_moe"
    assert load_config(tmp_path) == config


def test_windows_of_layers():
    config = replace(PRESETS["nano"], **WINDOWS)
    assert [config.window_of(i) for i in range(6)] == [64, 64, None, 64, 64, None]
    assert PRESETS["nano"].window_of(0) is None


def test_a_missing_size_is_named():
    values = PRESETS["nano"].to_dict()
    del values["num_local_experts"]
    with pytest.raises(ModelError, match="missing num_local_experts"):
        ModelConfig.from_dict(values)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        load_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_config(tmp_path)


def test_config_is_frozen_and_needs_no_torch():
    with pytest.raises(AttributeError):
        PRESETS["nano"].hidden_size = 1  # type: ignore[misc]
    assert replace(PRESETS["nano"], vocab_size=64).vocab_size == 64
    code = "import model.config, model.errors, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
