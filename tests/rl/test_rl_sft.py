"""Supervised training: data, masks, mixing, the loop, the manifest."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.chat_format import render_ids, render_reply
from model.config import ModelConfig
from model.tokenizer import Tokenizer, train_tokenizer
from model.transformer import Transformer
from rl import sft_run
from rl.cli import run_main
from rl.config import validate
from rl.envs.mle.prompts import Scaffold, load_scaffold
from rl.errors import ConfigError, DivergedError, SplitError
from rl.sft import main
from rl.sft_config import PolicySource, SftConfig
from rl.sft_data import (
    Examples,
    Mixer,
    dialogue_examples,
    dialogue_pairs,
    pack,
    pad_rows,
    policy_examples,
    policy_texts,
)
from rl.sft_train import Precision, Prepared, learning_rate, supervised_loss, to_device, train
from rl.splits import held_out_ids

DIALOGUE = {
    "messages": [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "round 1"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "a", "type": "function",
                 "function": {"name": "look", "arguments": '{"run": "s0"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "valid_frac falls"},
        {"role": "assistant", "content": "lower the rate"},
    ],
    "tools": [
        {"type": "function", "function": {"name": "look", "description": "d", "parameters": {
            "type": "object", "properties": {"run": {"type": "string"}}, "required": ["run"]}}}
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(policy_texts(200, "t", 1.0, [], Scaffold()), 400)


def tiny(tokenizer: Tokenizer, seed: int = 0) -> Transformer:
    return Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rotary_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=1024,
        ),
        seed=seed,
    )


def config_of(**changes: Any) -> SftConfig:
    data: dict[str, Any] = {
        "data": [{"kind": "policy", "count": 60, "invented": 1.0}],
        "steps": 12,
        "batch": 12,
        "micro_tokens": 2048,
        "max_length": 1024,
        "eval_examples": 20,
        "eval_every": 6,
        "log_every": 3,
        "optim": {"warmup_steps": 4, "lr": 5e-3},
        "workers": 1,
    }
    return validate(SftConfig, data | changes, "test")


def scripts(tokenizer: Tokenizer, count: int, seed: str = "s") -> Examples:
    source = PolicySource(kind="policy", invented=1.0)
    return policy_examples(
        source, count=count, seed=seed, facts=[], scaffold=Scaffold(), tokenizer=tokenizer,
        max_length=1024, workers=1,
    )  # fmt: skip


def test_examples_are_what_rollout_and_server_see(tokenizer: Tokenizer) -> None:
    examples = scripts(tokenizer, 5)
    assert len(examples) == 5
    ids = examples.flat[: examples.start[1]].tolist()
    prompt, reply = ids[: examples.prompt[0]], ids[examples.prompt[0] :]
    text = tokenizer.decode(prompt)
    assert text.endswith("]~b]ai\n<think>\n") and "task " in text
    assert tokenizer.decode(reply).startswith("</think>\n\nimport")
    assert reply[-1] == tokenizer.eos_id
    again = scripts(tokenizer, 5)
    assert np.array_equal(again.flat, examples.flat)
    assert not np.array_equal(scripts(tokenizer, 5, "other").flat, examples.flat)


def test_parallel_generation_gives_the_same_examples(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.sft_data.CHUNK", 3)
    source = PolicySource(kind="policy", invented=1.0)
    made = [
        policy_examples(
            source, count=7, seed="p", facts=[], scaffold=Scaffold(), tokenizer=tokenizer,
            max_length=1024, workers=workers,
        )
        for workers in (1, 2)
    ]  # fmt: skip
    assert np.array_equal(made[0].flat, made[1].flat)


def test_dialogues_train_assistant_turns_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = list(dialogue_pairs(DIALOGUE, tokenizer))
    messages: list[dict[str, Any]] = DIALOGUE["messages"]  # type: ignore[assignment]
    assert len(pairs) == 2
    for (prompt, reply), index in zip(pairs, (2, 4), strict=True):
        assert prompt == render_ids(messages[:index], DIALOGUE["tools"], tokenizer)  # type: ignore[arg-type]
        assert tokenizer.decode(reply) == render_reply(messages[index])
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(DIALOGUE) + "\n\n" + json.dumps(DIALOGUE) + "\n")
    assert len(dialogue_examples(path, tokenizer, 1024)) == 4
    with pytest.raises(ConfigError, match="record 1"):
        dialogue_examples(path, tokenizer, 20)
    path.write_text(json.dumps(DIALOGUE) + "\n{broken\n")
    with pytest.raises(ConfigError, match="line 2"):
        dialogue_examples(path, tokenizer, 1024)


def test_dialogues_are_the_same_from_two_processes(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.sft_data.CHUNK", 2)
    messages: list[dict[str, Any]] = DIALOGUE["messages"]  # type: ignore[assignment]
    untrained = {**DIALOGUE, "messages": [*messages[:2], {**messages[2], "no_loss": True}]}
    untrained["messages"] += messages[3:]
    path = tmp_path / "d.jsonl"
    records = [DIALOGUE, untrained, DIALOGUE, untrained, untrained]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = [dialogue_examples(path, tokenizer, 1024, workers) for workers in (1, 2)]
    assert np.array_equal(made[0].flat, made[1].flat)
    assert len(made[0]) == 2 * 2 + 3 * 1
    long = {"messages": [{"role": "assistant", "content": "x " * 2000}]}
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, long]))
    with pytest.raises(ConfigError, match="record 6"):
        dialogue_examples(path, tokenizer, 1024, 2)


@pytest.mark.parametrize("held_out", sorted(held_out_ids()))
def test_dialogues_that_name_a_held_out_competition_are_refused(
    tokenizer: Tokenizer, tmp_path: Path, held_out: str
) -> None:
    path = tmp_path / "d.jsonl"
    record = {"messages": [{"role": "assistant", "content": f"reward {held_out} 0.4"}]}
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(SplitError, match=held_out):
        dialogue_examples(path, tokenizer, 1024)


def test_loss_counts_reply_tokens_and_any_split_gives_the_same(tokenizer: Tokenizer) -> None:
    examples = scripts(tokenizer, 6)
    model = tiny(tokenizer)
    whole = pad_rows([(examples, i, 1.0) for i in range(6)], int(examples.lengths.max()))
    assert whole.denominator == examples.trained_tokens
    together = supervised_loss(model, to_device(whole, model.device)).item()
    apart = 0.0
    for i in range(6):
        ids = torch.from_numpy(examples.flat[examples.start[i] : examples.start[i + 1]]).long()
        logp = torch.log_softmax(model(ids[None])[0], dim=-1)
        start = int(examples.prompt[i])
        apart -= float(sum(logp[t - 1, ids[t]] for t in range(start, len(ids))))
    assert together == pytest.approx(apart, rel=1e-5)


def test_mixer_keeps_shares_covers_an_epoch_and_respects_the_token_limit() -> None:
    short = pack([([1], [2, 3])] * 10, 100)
    long = pack([([1, 2, 3], [i + 4] * 40) for i in range(4)], 100)
    mixer = Mixer([(short, 3.0, 1.0), (long, 1.0, 0.5)], batch=8, micro_tokens=100, seed=0)
    seen: list[int] = []
    for _ in range(6):
        batches = mixer.next()
        lengths = np.concatenate([b.lengths for b in batches])
        assert (lengths > 10).sum() == 2 and len(lengths) == 8
        assert all(b.ids.size <= 100 for b in batches)
        for b in batches:
            assert set(b.weight[b.lengths > 10]) <= {np.float32(0.5)}
            seen += [int(row[5]) for row, n in zip(b.ids, b.lengths, strict=True) if n > 10]
    # three epochs of four dialogues
    assert sorted(seen) == sorted([4, 5, 6, 7] * 3)


def test_training_lowers_the_fresh_loss_and_uses_all_experts(tokenizer: Tokenizer) -> None:
    config = config_of()
    source = Prepared("p", scripts(tokenizer, 60), scripts(tokenizer, 20, "fresh"), 1.0, 1.0)
    model, log = tiny(tokenizer), io.StringIO()
    result = train(model, [source], config, log)
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    evaluated = [row["fresh_loss/p"] for row in rows if "fresh_loss/p" in row]
    assert evaluated[-1] < evaluated[0] < 6.0
    assert result.fresh["fresh_loss/p"] == evaluated[-1]
    assert 1.0 <= result.expert_load_max < 3.0
    assert any(float(m.e_score_correction_bias.abs().max()) > 0
               for m in (layer.block_sparse_moe for layer in model.layers))  # fmt: skip


def test_bf16_copy_follows_the_float32_master(tokenizer: Tokenizer) -> None:
    model = tiny(tokenizer)
    precision = Precision(model, bf16=True)
    assert precision.compute.dtype == torch.bfloat16 and model.dtype == torch.float32
    examples = scripts(tokenizer, 2)
    for i in range(2):
        batch = to_device(pad_rows([(examples, i, 1.0)], int(examples.lengths[i])), model.device)
        supervised_loss(precision.compute, batch).backward()
        precision.collect()
    assert all(p.grad is None for p in precision.compute.parameters())
    reference = tiny(tokenizer)
    whole = pad_rows([(examples, i, 1.0) for i in range(2)], int(examples.lengths.max()))
    supervised_loss(reference, to_device(whole, model.device)).backward()
    mine, theirs = model.lm_head.grad, reference.lm_head.grad
    assert mine is not None and theirs is not None and mine.dtype == torch.float32
    assert float((mine - theirs).norm() / theirs.norm()) < 0.02
    with torch.no_grad():
        model.lm_head.add_(1.0)
    precision.publish(0.1)
    assert torch.equal(precision.compute.lm_head, model.lm_head.bfloat16())
    bias = [layer.block_sparse_moe.e_score_correction_bias for layer in model.layers]
    assert any(float(b.abs().max()) == pytest.approx(0.1) for b in bias)


def test_schedule_warms_up_and_ends_at_its_floor() -> None:
    config = config_of(optim={"lr": 1.0, "warmup_steps": 2, "final_lr_frac": 0.1})
    assert learning_rate(config, 0, 0.0) == 0.5
    assert learning_rate(config, 1, 0.0) == 1.0
    assert learning_rate(config, 9, 0.5) == pytest.approx(0.55)
    assert learning_rate(config, 20, 1.5) == pytest.approx(0.1)


def test_a_non_finite_loss_ends_the_run(tokenizer: Tokenizer) -> None:
    examples = scripts(tokenizer, 20)
    config = config_of(optim={"lr": 1e30, "warmup_steps": 0}, log_every=1)
    with pytest.raises(DivergedError, match=r"optim\.lr"):
        train(tiny(tokenizer), [Prepared("p", examples, examples, 1.0, 1.0)], config, io.StringIO())


def test_command_writes_checkpoint_and_manifest_without_held_out_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.jsonl").write_text((json.dumps(DIALOGUE) + "\n") * 30)
    small = ModelConfig(
        **{**sft_run.PRESETS["nano"].__dict__, "hidden_size": 32, "num_hidden_layers": 1,
           "num_local_experts": 4, "max_position_embeddings": 1024}
    )  # fmt: skip
    monkeypatch.setitem(sft_run.PRESETS, "nano", small)
    config = {
        "data": [
            {"kind": "policy", "count": 30, "invented": 1.0, "share": 3},
            {"kind": "dialogues", "path": str(tmp_path / "d.jsonl"), "share": 1},
        ],
        "steps": 2, "batch": 8, "micro_tokens": 2048, "max_length": 1024, "eval_examples": 4,
        "workers": 1, "tokenizer_texts": 60, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "sft.yaml").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert run_main(main, [str(tmp_path / "sft.yaml"), "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert json.loads(capsys.readouterr().out) == manifest
    assert not set(manifest["competitions"]) & held_out_ids()
    assert set(manifest) >= {"fresh_loss/0_policy", "fresh_loss/1_dialogues", "tokenizer_hash"}
    # a second run starts from the first one's checkpoint and tokenizer
    config |= {"init": str(out / "checkpoint")}
    (tmp_path / "more.yaml").write_text(json.dumps(config))
    assert run_main(main, [str(tmp_path / "more.yaml"), "--out", str(tmp_path / "two")]) == 0
    second = json.loads((tmp_path / "two/manifest.json").read_text())
    assert second["tokenizer_hash"] == manifest["tokenizer_hash"]
    assert Tokenizer.load(out / "checkpoint").hash == manifest["tokenizer_hash"]


def test_manifest_names_the_train_competitions_whose_facts_were_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stub:
        facts = "facts"

    monkeypatch.setattr(sft_run, "load_competition", lambda name, data: Stub())
    config = config_of(data=[{"kind": "policy", "invented": 0.9}])
    assert set(sft_run.train_facts(config)).isdisjoint(held_out_ids())
    assert len(sft_run.train_facts(config)) == 3
    assert sft_run.train_facts(config_of()) == {}
    assert load_scaffold(None) == Scaffold()
