"""Checkpoint folders: exact round trip, whole or absent, and errors that name the fault."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.checkpoint as checkpoint_module
import model.shards as shards_module
from model.checkpoint import disk_tensors, load_model, read_metadata, save_checkpoint
from model.config import PRESETS
from model.errors import CheckpointError
from model.transformer import Transformer

CONFIG = replace(
    PRESETS["nano"],
    vocab_size=96,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_local_experts=4,
    max_position_embeddings=64,
)
INDEX = "model.safetensors.index.json"
W2 = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.fixture
def small():
    model = Transformer(CONFIG, seed=0)
    for layer in model.layers:
        layer.block_sparse_moe.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model


@pytest.fixture
def saved(small, tmp_path):
    return save_checkpoint(
        small, tmp_path / "ck", dtype="float32", tokenizer_from=None, max_shard_bytes=60_000
    )


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def rewrite(folder, name, change):
    """Apply `change` to the dictionary of the shard that holds `name`."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_float32_round_trip_is_exact_and_sharded(small, saved):
    loaded = disk_tensors(load_model(saved))
    for name, tensor in disk_tensors(small).items():
        assert torch.equal(loaded[name], tensor), name
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size <= 60_000 + 8_000 for path in shards)  # + names
    index = json.loads((saved / INDEX).read_text())
    assert set(index["weight_map"]) == set(loaded)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in loaded.values())


def test_names_and_shapes_are_those_of_the_released_model(small):
    tensors = disk_tensors(small)
    assert len(tensors) == 3 + 2 * (10 + 3 * 4)
    at = "model.layers.1."
    assert tensors[at + "self_attn.q_norm.weight"].shape == (256,)
    assert tensors[at + "self_attn.k_proj.weight"].shape == (64, 32)
    assert tensors[at + "self_attn.o_proj.weight"].shape == (32, 256)
    assert tensors[at + "block_sparse_moe.gate.weight"].shape == (4, 32)
    assert tensors[at + "block_sparse_moe.experts.3.w1.weight"].shape == (16, 32)
    assert tensors[at + "block_sparse_moe.experts.3.w2.weight"].shape == (32, 16)
    assert tensors["lm_head.weight"].shape == (96, 32)


def test_bfloat16_files_keep_router_and_bias_in_float32(small, tmp_path):
    folder = save_checkpoint(small, tmp_path / "ck", tokenizer_from=None)
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {n for n in stored if n.endswith(("gate.weight", "e_score_correction_bias"))}
    assert {stored[n].dtype for n in stored.keys() - wide} == {torch.bfloat16}
    again = load_model(folder, dtype=torch.bfloat16)
    assert again.embed_tokens.dtype == torch.bfloat16
    assert again.layers[0].block_sparse_moe.gate_EH.dtype == torch.float32
    assert again.layers[0].block_sparse_moe.e_score_correction_bias.dtype == torch.float32
    gate = small.layers[1].block_sparse_moe.gate_EH
    assert torch.equal(load_model(folder).layers[1].block_sparse_moe.gate_EH, gate)


def test_tokenizer_files_and_metadata_travel(small, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not a tokenizer file")
    folder = save_checkpoint(
        small, tmp_path / "ck", tokenizer_from=source, metadata={"steps": 3, "split": "train"}
    )
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / "notes.txt").exists()
    assert read_metadata(folder) == {"steps": 3, "split": "train"}
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        save_checkpoint(small, tmp_path / "other", tokenizer_from=tmp_path)


def test_saving_replaces_a_folder_whole(small, saved):
    (saved / "stale.txt").write_text("old")
    with torch.no_grad():
        small.norm.weight.fill_(2.0)
    save_checkpoint(small, saved, tokenizer_from=None)
    assert not (saved / "stale.txt").exists()
    assert load_model(saved).norm.weight[0] == 2.0
    assert [path.name for path in saved.parent.iterdir()] == ["ck"]  # nothing left beside it


def test_a_save_that_fails_leaves_the_old_checkpoint(small, saved, monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards_module, "save_file", no_room)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small, saved, tokenizer_from=None)
    monkeypatch.undo()
    assert torch.equal(load_model(saved).lm_head, small.lm_head)
    assert [path.name for path in saved.parent.iterdir()] == ["ck"]


def test_a_missing_tensor_is_named(saved):
    index = json.loads((saved / INDEX).read_text())
    del index["weight_map"][W2]
    (saved / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{W2} is missing"):
        load_model(saved)


def test_a_tensor_missing_from_its_shard_is_named(saved):
    rewrite(saved, W2, lambda tensors: tensors.pop(W2))
    with pytest.raises(CheckpointError, match=f"{W2} is missing"):
        load_model(saved)


def test_a_wrong_shape_names_both_shapes_and_touches_nothing(small, saved):
    rewrite(saved, W2, lambda tensors: tensors.update({W2: torch.zeros(31, 16)}))
    with pytest.raises(CheckpointError, match=rf"{W2} has shape \(31, 16\).*\(32, 16\)"):
        load_model(saved)
    before = small.embed_tokens.clone()
    with pytest.raises(CheckpointError):
        checkpoint_module.read_weights(small, saved)
    assert torch.equal(before, small.embed_tokens)


def test_a_tensor_too_many_is_named(saved):
    config = json.loads((saved / "config.json").read_text()) | {"num_hidden_layers": 1}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..* does not belong"):
        load_model(saved)


def test_a_cut_off_or_absent_shard_is_named(saved):
    path = shard_of(saved, W2)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"{path.name}: damaged or cut off"):
        load_model(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name}.*is missing"):
        load_model(saved)


def test_other_folders_and_indexes_are_refused(saved, tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        load_model(tmp_path / "nowhere")
    index = json.loads((saved / INDEX).read_text())
    index["weight_map"][W2] = "../../secret.safetensors"
    (saved / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name"):
        load_model(saved)
    (saved / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(saved)
    (saved / INDEX).unlink()
    with pytest.raises(CheckpointError, match="neither"):
        load_model(saved)
