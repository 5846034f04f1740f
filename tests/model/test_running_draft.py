"""Guesses in a running batch change how many tokens a step gives, and nothing else."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_model import CONFIG as SMALL
from small_model import VOCAB, make_uneven

from model import running_draft
from model.checkpoint import load_model
from model.config import load_config
from model.errors import ModelError
from model.generate import Engine, GenRequest, Row
from model.mtp import MTP, begin_like, draft_config
from model.mtp_files import save_mtp
from model.prefix_cache import BLOCK
from model.running import RunningBatch
from model.running_draft import REST, DraftOptions
from model.serve import load_service, main
from model.transformer import Transformer

CONFIG = replace(SMALL, num_local_experts=8)
BEGINNING = tuple(i * 7 % VOCAB for i in range(2 * BLOCK + 5))


def a_policy(seed: int = 0) -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=seed), 1, 0.2)


def a_draft(policy: Transformer) -> MTP:
    mtp = MTP(draft_config(CONFIG, experts=1, top_k=1))
    begin_like(mtp.layers[0], policy)
    return mtp


def requests(count: int, seed: int = 0, *, mixed: bool = False) -> list[GenRequest]:
    """Some share a beginning or a whole prompt; `mixed` ones have limits that nothing may guess."""
    rng = random.Random(seed)
    made: list[GenRequest] = []
    for i in range(count):
        begin = rng.choice([0, BLOCK, len(BEGINNING)])
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20)))
        request = GenRequest(
            BEGINNING[:begin] + own,
            rng.randint(1, 40),
            temperature=rng.choice([1.0, 0.7, 0.0]),
            top_p=rng.choice([1.0, 0.8]) if mixed else 1.0,
            top_logprobs=rng.choice([0, 0, 0, 2]) if mixed else 0,
            seed=i,
            stop_ids=frozenset({rng.randrange(VOCAB)}),
        )
        made.append(replace(made[-1], seed=i) if i % 4 == 3 else request)
    return made


def run(batch: RunningBatch, asked: list[GenRequest], seed: int) -> list[Row]:
    """All through the batch, a few at a time joining now and then."""
    rng, rows = random.Random(seed), [Row(request) for request in asked]
    waiting = list(rows)
    while waiting or batch.running:
        some = rng.randint(1, 3) if rng.random() < 0.2 else 0
        room = batch.room([row.request for row in waiting[:some]])
        batch.join(waiting[:room])
        del waiting[:room]
        batch.step()
    return rows


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("most_rows", [2, 8])
def test_replies_are_those_of_plain_steps_bit_for_bit(mixed, most_rows, monkeypatch):
    monkeypatch.setattr(running_draft, "break_even", lambda *_: 0.0)  # never rest
    policy = a_policy()
    asked = requests(24, mixed=mixed)
    plain = run(RunningBatch(Engine(policy)), asked, 3)
    options = DraftOptions(a_draft(policy), guesses=3, most_rows=most_rows)
    batch = RunningBatch(Engine(policy), draft=options)
    made = run(batch, asked, 4)
    for ours, theirs in zip(made, plain, strict=True):
        assert (ours.ids, ours.finish) == (theirs.ids, theirs.finish)
        if mixed:  # how a batch draws depends on all its rows, and so does the last digit
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            assert [[id for id, _ in top] for top in ours.top] == [
                [id for id, _ in top] for top in theirs.top
            ]
        else:
            assert ours.logprobs == theirs.logprobs
    counts = batch.guessed
    assert 0 < counts.accepted < counts.drafted and counts.rounds > 20
    assert "3 guesses" in batch.path


def test_guesses_save_steps():
    policy = a_policy()
    with torch.no_grad():  # a policy that counts, whatever it reads: the draft cannot miss it
        for layer in policy.layers:
            layer.self_attn.o_proj.zero_()
            layer.block_sparse_moe.w2_EIH.zero_()
        policy.lm_head.copy_(20 * policy.embed_tokens.roll(1, 0))
    mtp = a_draft(policy)
    with torch.no_grad():
        block = mtp.layers[0].block
        block.self_attn.o_proj.zero_()
        block.block_sparse_moe.w2_EIH.zero_()
        mtp.layers[0].eh_proj.zero_()[:, : CONFIG.hidden_size] = torch.eye(CONFIG.hidden_size)
    batch = RunningBatch(Engine(policy), draft=DraftOptions(mtp, guesses=3))
    row = Row(GenRequest((5,), 41, temperature=0.0))
    batch.join([row])
    steps = 0
    while batch.running:
        batch.step()
        steps += 1
    assert row.ids == [(5 + i) % VOCAB for i in range(1, 42)]
    assert steps == 1 + 10  # the prompt's token, then four a step
    assert batch.guessed.accepted == batch.guessed.drafted == 30


@pytest.mark.parametrize("rule", ["reject", "match"])
def test_greedy_replies_survive_a_change_of_weights(rule):
    """New weights in the middle of replies: as with plain steps that change at the same tokens."""
    first, second = a_policy(0), a_policy(5)
    asked = [
        replace(r, temperature=0.0, max_new_tokens=30, stop_ids=frozenset()) for r in requests(4)
    ]

    def versions(draft):
        policy = a_policy(0)
        batch = RunningBatch(Engine(policy), draft=draft)
        rows = [Row(request) for request in asked]
        batch.join(rows)
        while min(len(row.ids) for row in rows) < 9:
            batch.step()
        batch.load(second, 1)
        cuts = [len(row.ids) for row in rows]
        while batch.running:
            batch.step()
        return rows, cuts

    rows, cuts = versions(DraftOptions(a_draft(first), guesses=2, rule=rule))
    for row, cut in zip(rows, cuts, strict=True):
        assert [v for _, v in row.versions] == [0, 1]
        prompt = list(row.request.prompt_ids)
        old = Engine(a_policy(0)).generate([replace(row.request, max_new_tokens=cut)])[0].ids
        assert row.ids[:cut] == old
        # Keys and values of the old weights stay; only the newest token is fed again.
        assert len(row.ids) == 30
        assert prompt and row.ids[cut:] != Engine(a_policy(0)).generate([row.request])[0].ids[cut:]


def test_guesses_that_do_not_stand_are_soon_given_up():
    policy = a_policy()
    batch = RunningBatch(Engine(policy), draft=DraftOptions(a_draft(policy), guesses=3))
    row = Row(GenRequest((5, 6), 120, seed=3))
    batch.join([row])
    rounds = []
    while batch.running:
        batch.step()
        rounds.append(batch.guessed.rounds)
    assert rounds[-1] < 30  # a trial, a rest, and perhaps another trial
    still = [a == b for a, b in itertools.pairwise(rounds)]
    assert sum(still) >= REST
    assert row.ids == Engine(policy).generate([row.request])[0].ids


def test_rows_that_leave_take_their_guesses_along():
    policy = a_policy()
    asked = [replace(r, max_new_tokens=40, stop_ids=frozenset()) for r in requests(5)]
    alone = run(RunningBatch(Engine(policy)), asked[1:], 0)
    batch = RunningBatch(Engine(policy), draft=DraftOptions(a_draft(policy), guesses=2))
    rows = [Row(request) for request in asked]
    batch.join(rows)
    for _ in range(6):
        batch.step()
    batch.drop([rows[0]])
    while batch.running:
        batch.step()
    assert [row.ids for row in rows[1:]] == [row.ids for row in alone]


def test_what_cannot_guess_says_so():
    policy = a_policy()
    off = RunningBatch(Engine(policy), draft=DraftOptions(a_draft(policy)), native=False)
    assert off.path.startswith("torch")
    two = MTP(draft_config(CONFIG, experts=1, top_k=1), 2)
    batch = RunningBatch(Engine(policy), draft=DraftOptions(two))
    assert "no guesses (2 MTP modules" in batch.path
    other = MTP(replace(draft_config(CONFIG, experts=1, top_k=1), hidden_size=64))
    with pytest.raises(ModelError, match="hidden_size is 64"):
        RunningBatch(Engine(policy), draft=DraftOptions(other))
    with pytest.raises(ModelError, match="0 guesses"):
        RunningBatch(Engine(policy), draft=DraftOptions(a_draft(policy), guesses=0))


def test_the_server_guesses_with_the_modules_of_a_folder(tmp_path, capsys):
    nano = Path("model/checkpoints/nano")
    config = load_config(nano)
    save_mtp(MTP(draft_config(config, experts=1, top_k=1, width=32)), tmp_path)
    service = load_service(nano, device="cpu", draft=tmp_path, draft_tokens=2)
    try:
        assert "2 guesses a step" in capsys.readouterr().err
        future = service.batcher.submit([GenRequest((1, 5, 9), 20, seed=1)])[0]
        plain = Engine(load_model(nano)).generate([GenRequest((1, 5, 9), 20, seed=1)])[0]
        assert future.result(60).ids == plain.ids
    finally:
        service.batcher.close(timeout_s=5)
    arguments = ["--checkpoint", str(nano), "--device", "cpu", "--port", "0"]
    assert main([*arguments, "--draft", str(tmp_path / "none")]) == 2
    assert "mtp.json: no such file" in capsys.readouterr().err
    assert main([*arguments, "--draft", str(tmp_path), "--draft-tokens", "0"]) == 2
    assert "--draft-tokens is 0" in capsys.readouterr().err
