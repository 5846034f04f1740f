"""Checkpoints that are damaged, mixed up or half written; and kills while one is written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import killed_saves
import pytest
import torch
from killed_saves import PHASES
from safetensors.torch import load_file, save_file

import model.shards as shards_module
from model.checkpoint import load_model, read_weights, save_checkpoint
from model.config import PRESETS
from model.errors import CheckpointError, ModelError
from model.layout import check_checkpoint, last_whole
from model.tokenizer import train_tokenizer
from model.transformer import Transformer

CONFIG = replace(
    PRESETS["nano"],
    vocab_size=320,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=2,
    num_local_experts=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def small():
    return Transformer(CONFIG, seed=0)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tokenizer of the model's vocabulary."""
    folder = tmp_path_factory.mktemp("words")
    train_tokenizer(["one two three"], 300).save(folder)
    return folder


@pytest.fixture
def saved(small, words, tmp_path):
    return save_checkpoint(
        small, tmp_path / "ck", dtype="float32", tokenizer_from=words, max_shard_bytes=20_000
    )


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(folder, name, change):
    """Apply `change` to the tensors of the shard that holds `name`."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_every_faulty_tensor_is_in_one_message(saved):
    w1 = "model.layers.1.block_sparse_moe.experts.{}.w1.weight".format
    k = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(saved, k, lambda t: t.update({k: torch.zeros(16, 64)}))
    edit_tensors(saved, "lm_head.weight", lambda t: t.pop("lm_head.weight"))

    def mix(index):
        where = index["weight_map"]
        for name in [name for name in where if "layers.1.self_attn" in name]:
            del where[name]  # six
        where["model.mtp.weight"] = where["extra"] = where[w1(0)]

    edit_json(saved / INDEX, mix)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    said = str(caught.value)
    assert said.count("is missing") == 5 and "and 2 more like this" in said  # six and lm_head
    assert "model.layers.1.self_attn.q_proj.weight is missing" in said
    assert "model.mtp.weight does not belong" in said and "extra does not belong" in said
    assert f"{k} has shape (16, 64) instead of (64, 16)" in said
    assert "\n" not in said
    with pytest.raises(CheckpointError, match="and 2 more like this"):
        check_checkpoint(saved)


def test_every_missing_file_is_in_one_message(saved):
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) >= 8
    for path in shards[1:]:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    said = str(caught.value)
    assert f"{shards[1].name} is missing" in said and f"{len(shards) - 6} more" in said


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_weights_that_are_no_numbers_are_refused_by_name(small, saved, name, value):
    edit_tensors(saved, name, lambda t: t[name].view(-1)[3].fill_(value))
    check_checkpoint(saved)  # which reads no weights
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity"):
        load_model(saved, dtype=torch.bfloat16)


def test_nan_is_not_written_either(saved, words):
    broken = load_model(saved)
    with torch.no_grad():
        broken.layers[0].block_sparse_moe.w2_EIH[2, 1, 1] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.0.*experts\.2\.w2\.weight holds NaN"):
        save_checkpoint(broken, saved, tokenizer_from=words)
    load_model(saved)  # the old one is still there
    assert [path.name for path in saved.parent.iterdir()] == ["ck"]


def test_the_tokenizer_of_another_model_is_refused(saved):
    train_tokenizer([" ".join(f"word{i}" for i in range(400))], 400).save(saved)
    with pytest.raises(CheckpointError, match="400 tokens but the model 320"):
        check_checkpoint(saved)
    train_tokenizer(["one"], 300).save(saved)
    check_checkpoint(saved)
    edit_json(saved / "config.json", lambda config: config.update(eos_token_id=9))
    with pytest.raises(CheckpointError, match=r"eos_token_id is 9.*\[e~\[ is 2"):
        check_checkpoint(saved)
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json does not exist"):
        check_checkpoint(saved)


def test_one_shard_is_open_at_a_time(small, saved, monkeypatch):
    most, now = 0, 0
    real = shards_module.open_shard

    class Counted:
        def __init__(self, *args):
            self.shard = real(*args)

        def __enter__(self):
            nonlocal most, now
            now += 1
            most = max(most, now)
            return self.shard.__enter__()

        def __exit__(self, *args):
            nonlocal now
            now -= 1
            return self.shard.__exit__(*args)

    monkeypatch.setattr(shards_module, "open_shard", Counted)
    read_weights(Transformer(CONFIG, seed=None), saved)
    assert (most, now) == (1, 0)


# ------------------------------------------------------------------ half-written ones


def test_kill_9_while_saving_leaves_the_old_checkpoint_or_the_new_one(saved, tmp_path):
    saved.rename(tmp_path / "start")
    for phase in PHASES:
        shutil.copytree(tmp_path / "start", tmp_path / f"old {phase}")
    done = subprocess.run(
        [sys.executable, killed_saves.__file__, str(tmp_path)],
        check=True,
        timeout=120,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # A new place has no old one to swap with: that save ends.
    ended = {line for line in done.stdout.splitlines() if not line.endswith("/killed")}
    assert ended == {"new/swap/0"}
    found = {}
    for phase in PHASES:
        for kind in ("new", "old"):
            path = tmp_path / f"{kind} {phase}"
            # 1 the old checkpoint, 2 the new one; loading half a folder raises
            found[kind, phase] = load_model(path).norm.weight[0].item() if path.exists() else None
    for phase in ("second shard", "index", "flush", "renaming"):
        assert (found["new", phase], found["old", phase]) == (None, 1), phase
    assert (found["new", "swap"], found["old", "swap"]) == (2, 1)
    assert (found["new", "cleaning"], found["old", "cleaning"]) == (2, 2)


def test_the_last_whole_checkpoint_is_found(saved, tmp_path):
    steps = tmp_path / "steps"
    for step in (2, 9, 10, 11, 12):
        shutil.copytree(saved, steps / f"step-{step}")
    (steps / "step-x").mkdir()
    (steps / ".step-13.tmp").mkdir()
    assert last_whole(steps) == (steps / "step-12", [])
    shard = sorted((steps / "step-12").glob("*.safetensors"))[3]
    shard.write_bytes(shard.read_bytes()[:-4])
    (steps / "step-11" / "config.json").unlink()
    found, faults = last_whole(steps)
    assert found == steps / "step-10"
    assert f"{shard.name}: damaged or cut off" in faults[0] and "no config.json" in faults[1]
    for step in (2, 9, 10):
        (steps / f"step-{step}" / "tokenizer.json").unlink()
    found, faults = last_whole(steps)
    assert found is None and len(faults) == 5
    assert last_whole(tmp_path / "nowhere") == (None, [])
