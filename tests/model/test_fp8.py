"""The released FP8 format against a naive per-block implementation, and its files."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from small_model import make_uneven

from model.checkpoint import disk_tensors, load_model, read_metadata, save_checkpoint
from model.config import PRESETS, ModelConfig
from model.convert import main as convert
from model.errors import CheckpointError, ModelError
from model.fp8 import dequantise, quantise
from model.layout import is_fp8_weight, tensor_shapes
from model.transformer import Transformer

# Several blocks and an edge in both directions.
CONFIG = replace(
    PRESETS["nano"],
    vocab_size=96,
    hidden_size=192,
    intermediate_size=160,
    num_hidden_layers=2,
    num_local_experts=4,
    max_position_embeddings=64,
)
BF16_MAX = float(torch.finfo(torch.bfloat16).max)
F32_MAX = float(torch.finfo(torch.float32).max)


def e4m3_table():
    """The 127 finite numbers ≥ 0, by code, from the format's definition."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, normal)


TABLE = e4m3_table()


def naive(weight):
    """(codes, scales) block by block: nearest number of the table, the even code where two are."""
    rows, columns = weight.shape
    codes = np.zeros(weight.shape, np.uint8)
    scales = np.ones((-(-rows // 128), -(-columns // 128)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            block = weight[at]
            largest = np.abs(block).max()
            if largest > 0:
                scale = max(np.float32(largest) / np.float32(448), np.float32(2.0**-126))
                scales[i, j] = scale
            scaled = np.abs(block / scales[i, j]).astype(np.float64)
            far = np.abs(scaled[..., None] - TABLE)
            nearest = far.argmin(-1)
            above = np.minimum(nearest + 1, 126)
            tie = np.take_along_axis(far, above[..., None], -1)[..., 0] == far.min(-1)
            code = np.where(tie & (nearest % 2 == 1), above, nearest)
            codes[at] = code | np.where(np.signbit(block), 128, 0)
    return codes, scales


def half_step(scaled):
    """Half the distance of the e4m3 numbers around each |x|: 2^(e − 4), 2^-10 for subnormals."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(scaled)))
    return 2.0 ** (np.maximum(exponent, -6) - 4)


def expand(scales, shape):
    return np.kron(scales.astype(np.float64), np.ones((128, 128)))[: shape[0], : shape[1]]


def random_weight(seed, shape, exponents):
    """Numbers whose blocks differ in size by powers of two drawn from `exponents`."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape) * 2.0 ** -rng.integers(0, 12, shape)
    size = rng.integers(*exponents, (-(-shape[0] // 128), -(-shape[1] // 128)), endpoint=True)
    weight = np.clip(weight * expand(2.0**size, shape), -F32_MAX, F32_MAX)
    return weight.astype(np.float32)


def check(weight):
    stored, scale = quantise(torch.from_numpy(weight))
    codes, scales = naive(weight)
    np.testing.assert_array_equal(scale.numpy(), scales)
    np.testing.assert_array_equal(stored.view(torch.uint8).numpy(), codes)
    back = dequantise(stored, scale).numpy().astype(np.float64)
    wide = expand(scales, weight.shape)
    bound = wide * half_step(weight / wide) * (1 + 2.0**-13)
    assert (np.abs(back - weight) <= bound).all()
    normal = np.abs(weight) >= wide / 64
    error = np.abs(back - weight)
    assert (error[normal] <= np.abs(weight[normal]) / 16 * (1 + 2.0**-13)).all()
    return back


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    exponents=st.sampled_from([(-4, 0), (-145, -110), (100, 126), (-149, 127)]),
)
def test_round_trip_stays_inside_the_bound_and_equals_the_naive_one(seed, rows, columns, exponents):
    check(random_weight(seed, (rows, columns), exponents))


@pytest.mark.parametrize("largest", [BF16_MAX, F32_MAX, 448.0, 2.0**-133, 2.0**-149])
def test_ends_of_the_range_come_back(largest):
    weight = np.zeros((130, 257), np.float32)
    weight[3, 5], weight[129, 256], weight[7, 8] = largest, -largest, largest / 3
    back = check(weight)
    assert np.isfinite(back).all() and np.isfinite(back.astype(np.float32)).all()
    if largest >= 448:
        np.testing.assert_allclose(back[3, 5], largest, rtol=2**-22)
    if largest == BF16_MAX:
        assert float(torch.tensor(back[3, 5]).to(torch.bfloat16)) == BF16_MAX


def test_blocks_of_zeros_stay_zero_and_have_scale_one():
    weight = np.zeros((256, 130), np.float32)
    weight[200, 1] = 3.0
    stored, scale = quantise(torch.from_numpy(weight))
    assert scale.tolist() == [[1.0, 1.0], [torch.tensor(3.0).div(448).item(), 1.0]]
    np.testing.assert_array_equal(dequantise(stored, scale).numpy(), weight)


def test_what_is_quantised_is_what_the_released_weights_quantise():
    names = [name for name in tensor_shapes(PRESETS["m2"]) if is_fp8_weight(name)]
    assert len(names) == 47_864  # scales of the released checkpoint: 62 · (4 + 3 · 256)
    for name in ("embed_tokens.weight", "layers.0.block_sparse_moe.gate.weight", "norm.weight"):
        assert not is_fp8_weight(f"model.{name}")
    assert not is_fp8_weight("lm_head.weight")


@pytest.fixture(scope="module")
def small():
    return make_uneven(Transformer(CONFIG, seed=0), 1, 0.1)


@pytest.fixture
def saved(small, tmp_path):
    return save_checkpoint(
        small, tmp_path / "fp8", dtype="fp8", tokenizer_from=None, max_shard_bytes=200_000
    )


def read_raw(folder):
    """Type, shape and value of every tensor, without this project's reader."""
    out = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                out[name] = shard.get_tensor(name)
    return out


def e4m3_numbers(tensor):
    """Values of FP8 codes by the table."""
    codes = tensor.view(torch.uint8).numpy()
    return np.where(codes & 128, -1.0, 1.0) * TABLE[codes & 127]


def test_a_saved_folder_is_the_released_layout_and_loads_dequantised(small, saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    raw = read_raw(saved)
    assert len(list(saved.glob("*.safetensors"))) > 2
    w1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    assert raw[w1].dtype == torch.float8_e4m3fn and raw[w1].shape == (160, 192)
    assert raw[w1 + "_scale_inv"].dtype == torch.float32
    assert raw[w1 + "_scale_inv"].shape == (2, 2)
    assert raw["model.layers.0.self_attn.k_proj.weight_scale_inv"].shape == (1, 2)
    kinds = {str(raw[name].dtype) for name in raw if not is_fp8_weight(name)}
    assert kinds == {"torch.float32", "torch.bfloat16"}
    assert raw["lm_head.weight"].dtype == torch.bfloat16
    assert raw["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.float32
    loaded = disk_tensors(load_model(saved))
    for name, value in loaded.items():
        if is_fp8_weight(name):
            scales = raw[name + "_scale_inv"].numpy()
            expected = e4m3_numbers(raw[name]) * expand(scales, value.shape)
            np.testing.assert_array_equal(value.numpy(), expected.astype(np.float32))
        else:
            assert torch.equal(value, raw[name].float()), name
    assert (
        load_model(saved, dtype=torch.bfloat16).layers[0].self_attn.o_proj.dtype == torch.bfloat16
    )


def test_scales_may_lie_in_another_file(small, saved):
    before = load_model(saved).layers[1].block_sparse_moe.w2_EIH.clone()
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    raw = read_raw(saved)
    scales = {name: tensor for name, tensor in raw.items() if name.endswith("_scale_inv")}
    weights = {name: tensor for name, tensor in raw.items() if name not in scales}
    for path in saved.glob("*.safetensors"):
        path.unlink()
    from safetensors.torch import save_file

    save_file(weights, saved / "a.safetensors")
    save_file(scales, saved / "b.safetensors")
    index["weight_map"] = dict.fromkeys(weights, "a.safetensors")
    index["weight_map"] |= dict.fromkeys(scales, "b.safetensors")
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_model(saved).layers[1].block_sparse_moe.w2_EIH, before)


@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path):
    """On a CPU it dequantises; its own rule needs sizes below 128 or multiples of it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = replace(CONFIG, hidden_size=256, intermediate_size=96)
    model = make_uneven(Transformer(config, seed=3), 1, 0.1)
    save_checkpoint(model, tmp_path / "fp8", dtype="fp8", tokenizer_from=None)
    theirs, report = transformers.MiniMaxM2ForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids_BT = torch.arange(20)[None] % 96
    torch.testing.assert_close(
        load_model(tmp_path / "fp8")(ids_BT), theirs(ids_BT).logits, atol=1e-5, rtol=0
    )


# ------------------------------------------------------------------ bad folders


def rewrite(folder, change):
    """Apply `change` to the dictionary of all tensors; one file afterwards, no index."""
    from safetensors.torch import save_file

    raw = read_raw(folder)
    change(raw)
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file(raw, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}_scale_inv"), f"{Q}_scale_inv is missing"),
        (lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 2)}), r"\(1, 2\) instead of F32 \(2,"),
        (
            lambda t: t.update({f"{Q}_scale_inv": torch.ones(2, 2, dtype=torch.bfloat16)}),
            "BF16",
        ),
        (lambda t: t.update({Q: t[Q].bfloat16()}), f"{Q}_scale_inv does not belong"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight is F8_E4M3, which is not read",
        ),
        (lambda t: t.update({Q: t[Q].float().to(torch.float8_e5m2)}), "F8_E5M2, which is not"),
        (lambda t: t[f"{Q}_scale_inv"].fill_(torch.inf), f"{Q} holds NaN or infinity"),
        (lambda t: t[Q].view(torch.uint8).fill_(127), f"{Q} holds NaN or infinity"),
    ],
)
def test_faulty_fp8_is_refused_by_name(saved, change, said):
    rewrite(saved, change)
    with pytest.raises(CheckpointError, match=said):
        load_model(saved)


def test_configuration_and_weights_must_agree_on_fp8(saved):
    config = json.loads((saved / "config.json").read_text())
    settings_ = config.pop("quantization_config")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config.*contradict"):
        load_model(saved)
    for change in (
        {"weight_block_size": [64, 64]},
        {"quant_method": "awq"},
        {"fmt": "e5m2"},
        {"activation_scheme": "static"},
        {"scale_fmt": "ue8m0"},
    ):
        values = config | {"quantization_config": settings_ | change}
        with pytest.raises(ModelError, match=next(iter(change))):
            ModelConfig.from_dict(values)
    kept = ModelConfig.from_dict(config | {"quantization_config": settings_ | {"fmt": "e4m3fn"}})
    assert kept == CONFIG


# ------------------------------------------------------------------ the command


def test_convert_goes_to_fp8_and_back(small, saved, tmp_path):
    plain = save_checkpoint(small, tmp_path / "bf16", tokenizer_from=None, metadata={"steps": 3})
    (plain / "tokenizer.json").write_text("{}")
    assert convert([str(plain), str(tmp_path / "a"), "--dtype", "fp8"]) == 0
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert read_metadata(tmp_path / "a") == {"steps": 3}
    # bf16 first, then FP8: what a folder of bf16 weights can give
    expected = load_model(plain)
    for name, view in disk_tensors(expected).items():
        if is_fp8_weight(name):
            view.copy_(dequantise(*quantise(view)))
    found = disk_tensors(load_model(tmp_path / "a"))
    assert all(torch.equal(found[n], t) for n, t in disk_tensors(expected).items())
    assert convert([str(tmp_path / "a"), str(tmp_path / "b"), "--dtype", "float32"]) == 0
    back = disk_tensors(load_model(tmp_path / "b"))
    assert all(torch.equal(back[n], t) for n, t in found.items())
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_convert_ends_with_2_and_leaves_nothing(saved, tmp_path, capsys):
    def run(source, target, said):
        assert convert([str(source), str(tmp_path / target), "--dtype", "bfloat16"]) == 2
        assert said in capsys.readouterr().err

    run(tmp_path / "nowhere", "a", "not a checkpoint folder")
    run(saved, "fp8", "exists")
    rewrite(saved, lambda tensors: tensors[f"{Q}_scale_inv"].fill_(torch.nan))
    run(saved, "b", f"{Q} holds NaN")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8"]
    done = subprocess.run(
        [sys.executable, "-m", "model.convert", "a", "b", "--dtype", "int4"], capture_output=True
    )
    assert done.returncode == 2


def test_numbers_too_large_for_bf16_are_refused(small, tmp_path):
    plain = save_checkpoint(small, tmp_path / "f32", dtype="float32", tokenizer_from=None)
    rewrite(plain, lambda tensors: tensors["lm_head.weight"].fill_(F32_MAX))
    assert load_model(plain).lm_head.max() == F32_MAX
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*too large for bfloat16"):
        load_model(plain, dtype=torch.bfloat16)
