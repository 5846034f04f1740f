"""MTP modules on disk: DeepSeek-V3's names, and files that are not what they say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import CONFIG, VOCAB, make_uneven

from model.chat_format import render_ids
from model.checkpoint import load_model
from model.draft import DraftTraining, main, measure, train
from model.draft_data import TokenRow, batches, pad, read_rows, sample_replies, write_rows
from model.draft_loss import draft_loss
from model.errors import CheckpointError, ModelError
from model.generate import Engine
from model.mtp import MTP, draft_config
from model.mtp_files import load_mtp, mtp_tensors, save_mtp
from model.tokenizer import Tokenizer
from model.transformer import Transformer

FEW = draft_config(CONFIG, experts=2, top_k=1, width=12)


def test_modules_come_back_as_they_were(tmp_path):
    mtp = MTP(FEW, 2, seed=4)
    mtp.layers[1].block.block_sparse_moe.e_score_correction_bias.fill_(0.125)
    save_mtp(mtp, tmp_path, dtype="float32", metadata={"held_out": {"kl": [0.5]}})
    back = load_mtp(tmp_path)
    assert back.config == mtp.config and back.count == 2
    for name, tensor in mtp.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor)
    assert json.loads((tmp_path / "mtp.json").read_text())["held_out"] == {"kl": [0.5]}
    assert {path.name for path in tmp_path.iterdir()} == {"mtp.safetensors", "mtp.json"}


def test_names_are_deepseeks_and_follow_the_main_models_layers(tmp_path):
    save_mtp(MTP(FEW, 2), tmp_path)
    held = load_file(tmp_path / "mtp.safetensors")
    hidden = CONFIG.hidden_size
    for layer in (3, 4):  # the main model has layers 0 to 2
        at = f"model.layers.{layer}"
        assert held[f"{at}.eh_proj.weight"].shape == (hidden, 2 * hidden)
        assert held[f"{at}.eh_proj.weight"].dtype == torch.bfloat16
        for norm in ("enorm", "hnorm", "shared_head.norm", "input_layernorm"):
            assert held[f"{at}.{norm}.weight"].shape == (hidden,)
        assert held[f"{at}.block_sparse_moe.gate.weight"].dtype == torch.float32
        assert f"{at}.self_attn.q_proj.weight" in held
        assert f"{at}.block_sparse_moe.experts.1.w2.weight" in held
    assert all(name.startswith(("model.layers.3.", "model.layers.4.")) for name in held)


def test_all_tensors_at_fault_are_listed(tmp_path):
    save_mtp(MTP(FEW), tmp_path)
    path = tmp_path / "mtp.safetensors"
    held = load_file(path)
    held["model.layers.9.enorm.weight"] = held.pop("model.layers.3.enorm.weight")
    held["model.layers.3.eh_proj.weight"] = held["model.layers.3.eh_proj.weight"].t().contiguous()
    save_file(held, path)
    with pytest.raises(CheckpointError) as caught:
        load_mtp(tmp_path)
    said = str(caught.value)
    assert "model.layers.3.enorm.weight is missing" in said
    assert "model.layers.9.enorm.weight does not belong there" in said
    assert "model.layers.3.eh_proj.weight has shape (96, 48), not (48, 96)" in said


def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path):
    mtp = MTP(FEW)
    save_mtp(mtp, tmp_path)
    before = (tmp_path / "mtp.safetensors").read_bytes()
    mtp.layers[0].eh_proj.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"eh_proj.weight holds NaN"):
        save_mtp(mtp, tmp_path)
    assert (tmp_path / "mtp.safetensors").read_bytes() == before
    held = load_file(tmp_path / "mtp.safetensors")
    held["model.layers.3.hnorm.weight"][1] = torch.inf
    save_file(held, tmp_path / "mtp.safetensors")
    with pytest.raises(CheckpointError, match=r"hnorm.weight holds NaN, infinity"):
        load_mtp(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "mtp.json").unlink(), "no such file"),
        (lambda d: (d / "mtp.json").write_text("[]"), "JSON object"),
        (lambda d: (d / "mtp.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "mtp.json").write_text('{"num_mtp_modules": 0}'), "num_mtp_modules"),
        (lambda d: (d / "mtp.safetensors").unlink(), "no such file"),
        (lambda d: (d / "mtp.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"), "damaged"),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path, spoil, said):
    save_mtp(MTP(FEW), tmp_path)
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        load_mtp(tmp_path)
    with pytest.raises(CheckpointError, match="type 'int8'"):
        save_mtp(MTP(FEW), tmp_path, dtype="int8")


def test_views_are_views():
    mtp = MTP(FEW)
    for view in mtp_tensors(mtp).values():
        view.fill_(0.5)
    assert all(bool((weight == 0.5).all()) for weight in mtp.parameters())


# ------------------------------------------------------------------------------ training


def some_rows(count: int) -> list[TokenRow]:
    """Rows in which each token decides the next."""
    out = []
    for i in range(count):
        ids = [(7 * i + 13 * t * t) % VOCAB for t in range(12 + i % 5)]
        out.append(TokenRow(tuple(ids[:4]), tuple(ids[4:])))
    return out


def test_training_lowers_the_kl_and_leaves_the_policy_alone():
    model = make_uneven(Transformer(CONFIG, seed=1), 2, 0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    training = DraftTraining(steps=60, tokens=400, warmup=5, lr=5e-3, depths=2, width=24)
    mtp = train(model, some_rows(32), training, told.append)
    assert told[-1]["kl"][0] < 0.5 * told[0]["kl"][0]
    assert told[-1]["overlap"][0] > told[0]["overlap"][0] + 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    batch = pad(some_rows(32))
    args = (batch.ids_BT, batch.first_B, batch.lengths_B)
    with torch.no_grad():
        assert draft_loss(model, mtp, *args, depths=1).kl[0] < told[0]["kl"][0]
    again = train(model, some_rows(32), training)
    for a, b in zip(mtp.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)  # one seed, one draft


def test_experts_of_a_draft_are_kept_in_use():
    model = make_uneven(Transformer(CONFIG, seed=1), 2, 0.3)
    training = DraftTraining(steps=3, tokens=400, experts=4, experts_per_token=1, balance=0.01)
    bias_E = train(model, some_rows(16), training).layers[0].block.block_sparse_moe
    moved = bias_E.e_score_correction_bias
    assert moved.abs().max() == pytest.approx(0.03) and moved.min() < 0 < moved.max()


def test_batches_hold_every_row_once():
    rows = some_rows(23)
    stream = batches(rows, 60, seed=0)
    seen = 0
    ends: list[int] = []
    while seen < len(rows):
        batch = next(stream)
        assert batch.ids_BT.numel() <= 60 or len(batch.ids_BT) == 1
        seen += len(batch.ids_BT)
        ends += batch.lengths_B.tolist()
    assert sorted(ends) == sorted(len(row.prompt) + len(row.reply) for row in rows)


def test_rows_come_back_and_faults_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [*some_rows(2), TokenRow((1, 2), (), 9, True)]
    write_rows(path, rows)
    assert read_rows(path, VOCAB, replies=False)[2] == rows[2]
    assert read_rows(path, VOCAB, replies=False)[0].reply == rows[0].reply
    with pytest.raises(ModelError, match="line 3: no reply_ids"):
        read_rows(path, VOCAB, replies=True)
    for line, said in (("{}", "no row"), ('{"prompt_ids": [999]}', "from 0"), ("x", "no row")):
        path.write_text(line)
        with pytest.raises(ModelError, match=said):
            read_rows(path, VOCAB, replies=False)
    with pytest.raises(ModelError, match="cannot be read"):
        read_rows(tmp_path / "none", VOCAB, replies=False)


def test_the_bundled_models_draft_is_made_by_three_commands(tmp_path, capsys):
    nano = ["--checkpoint", "model/checkpoints/nano", "--device", "cpu"]
    prompts, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    write_rows(prompts, [TokenRow((1, 300, 301), max_new=8), TokenRow((5, 6), max_new=6)])
    made = ["--prompts", str(prompts), "--count", "6", "--out", str(rows)]
    assert main(["sample", *nano, *made]) == 0
    assert len(read_rows(rows, 2048, replies=True)) == 6
    draft = tmp_path / "draft"
    short = ["--steps", "2", "--tokens", "64", "--depths", "2", "--width", "32"]
    held = ["--data", str(rows), "--held-out", str(rows), "--out", str(draft)]
    assert main(["train", *nano, *short, *held]) == 0
    assert json.loads((draft / "mtp.json").read_text())["held_out"]["rows"] == 6
    capsys.readouterr()
    assert (
        main(["measure", *nano, "--data", str(rows), "--draft", str(draft), "--depths", "1"]) == 0
    )
    assert len(json.loads(capsys.readouterr().out)["kl"]) == 1
    assert main(["measure", *nano, "--data", str(rows), "--draft", str(tmp_path)]) == 2
    assert "mtp.json: no such file" in capsys.readouterr().err
    assert main(["train", *nano, *held, "--modules", "3", "--depths", "2"]) == 2
    assert "as many depths as modules" in capsys.readouterr().err


def test_the_bundled_head_is_small_and_good():
    nano = Path("model/checkpoints/nano")
    assert (nano / "mtp.safetensors").stat().st_size <= 1_000_000
    model, mtp = load_model(nano), load_mtp(nano)
    mtp.check_fits(model)
    # What the policy says to an opening that neither was trained on.
    tokenizer = Tokenizer.load(nano)
    message = {
        "role": "user",
        "content": "predict price : regression , rmse , 900 rows , 4 numeric",
    }
    prompt = TokenRow(tuple(render_ids([message], None, tokenizer)), max_new=80)
    rows = list(sample_replies(Engine(model), [prompt], 8, temperature=1.0, seed=5))
    assert measure(model, mtp, rows, depths=2)["overlap"][0] > 0.7
