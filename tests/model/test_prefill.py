"""Prompts read in pieces between decode steps: the same results, and nobody waits for them."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG as SMALL
from small_model import VOCAB, make_uneven

from model.errors import ModelError
from model.generate import Engine, Generation, GenRequest, Row
from model.prefix_cache import BLOCK
from model.running import RunningBatch
from model.transformer import Transformer

CONFIG = replace(SMALL, num_local_experts=8)
BEGINNING = tuple(i * 11 % VOCAB for i in range(4 * BLOCK + 5))


@pytest.fixture(scope="module")
def policy() -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=0).cast(torch.float64), 1, 0.2)


@pytest.fixture(scope="module")
def asked() -> list[GenRequest]:
    """Own prompts, common beginnings, prompts that several have; some of them scored."""
    rng = random.Random(4)
    made: list[GenRequest] = []
    for i in range(16):
        begin = rng.choice([0, BLOCK, 2 * BLOCK + 3, len(BEGINNING)])
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 25)))
        prompt = made[-1].prompt_ids if i % 4 == 3 else BEGINNING[:begin] + own
        made.append(GenRequest(prompt, rng.randint(1, 12), rng.choice([0.0, 1.0]), seed=i))
    made[5] = replace(made[5], prompt_logprobs=True, top_logprobs=2)
    made[9] = replace(made[9], prompt_logprobs=True)
    return made


@pytest.fixture(scope="module")
def alone(policy: Transformer, asked: list[GenRequest]) -> list[tuple[Row, Generation]]:
    """Each by itself, its prompt read whole."""
    rows = []
    for request in asked:
        batch, row = RunningBatch(Engine(policy), prefix_tokens=0), Row(request)
        batch.join([row])
        while batch.running:
            batch.step()
        rows.append((row, row.result(0)))
    return rows


def check(row: Row, wanted: Row) -> None:
    assert row.ids == wanted.ids and row.finish == wanted.finish
    assert row.logprobs == pytest.approx(wanted.logprobs, abs=1e-10)
    assert (row.prompt is None) == (wanted.prompt is None)
    if row.prompt is not None and wanted.prompt is not None:
        assert row.prompt.logprobs == pytest.approx(wanted.prompt.logprobs, abs=1e-10)
        tops = [[id for id, _ in top] for top in row.prompt.top]
        assert tops == [[id for id, _ in top] for top in wanted.prompt.top]


@settings(max_examples=20, deadline=None)
@given(
    piece=st.sampled_from([1, 3, BLOCK, 23, 70, 512]),
    prefix_tokens=st.sampled_from([0, 6 * BLOCK, 4096]),
    seed=st.integers(0, 10**6),
    drops=st.booleans(),
)
def test_pieces_change_no_result(policy, asked, alone, piece, prefix_tokens, seed, drops) -> None:
    rng = random.Random(seed)
    batch = RunningBatch(
        Engine(policy), max_batch=8, prefix_tokens=prefix_tokens, prefill_tokens=piece
    )
    order = rng.sample(range(len(asked)), len(asked))
    rows = {i: Row(asked[i]) for i in order}
    waiting, gone = [rows[i] for i in order], set()
    while waiting or batch.running:
        room = batch.room([row.request for row in waiting[: rng.randint(0, 5)]])
        batch.join(waiting[:room])
        del waiting[:room]
        if drops and rng.random() < 0.3:
            inside = [row for row in rows.values() if row not in waiting and row.finish is None]
            left = [row for row in inside if row not in gone and rng.random() < 0.3]
            batch.drop(left)
            gone |= set(left)
        batch.step()
    assert batch.cache_bytes == 0
    for i, row in rows.items():
        if row not in gone:
            check(row, alone[i][0])


@pytest.mark.parametrize("piece", [1, 7, 30])
def test_pieces_in_window_layers(asked: list[GenRequest], piece: int) -> None:
    config = replace(CONFIG, attn_type_list=(1, 2, 2), sliding_window=20, num_sink_tokens=2)
    model = make_uneven(Transformer(config, seed=0).cast(torch.float64), 1, 0.2)
    wanted = Engine(model).generate(
        [replace(r, prompt_logprobs=False, top_logprobs=0) for r in asked]
    )
    batch, rows = RunningBatch(Engine(model), prefill_tokens=piece), [Row(r) for r in asked]
    gone = rows[2]
    for start in range(0, len(rows), 4):
        batch.join(rows[start : start + 4])
        for _ in range(3):
            batch.step()
        batch.drop([gone] if gone.finish is None else [])
    while batch.running:
        batch.step()
    for row, made in zip(rows, wanted, strict=True):
        if row is not gone:
            assert row.ids == made.ids
            assert row.logprobs == pytest.approx(made.logprobs, abs=1e-10)


@pytest.mark.parametrize("native", [True, False])
def test_rows_get_a_token_a_step_while_a_long_prompt_is_read(native: bool) -> None:
    config = replace(CONFIG, num_hidden_layers=1, max_position_embeddings=4_200)
    model = make_uneven(Transformer(config, seed=0), 1, 0.2)
    batch = RunningBatch(Engine(model), prefill_tokens=250, native=native)
    short = [Row(GenRequest((1, i), 60, seed=i)) for i in range(3)]
    batch.join(short)
    for _ in range(3):
        batch.step()
    long = Row(GenRequest(tuple(i * 7 % VOCAB for i in range(4_000)), 2, seed=9))
    last = Row(GenRequest((5, 6), 2, seed=10))
    batch.join([long, last])
    for step in range(16):
        assert [len(row.ids) for row in short] == [3 + step] * 3
        assert long.ids == [] and last.ids == []  # first come, first served
        batch.step()
    # The sixteenth piece ends the prompt, so that its row writes in the same step.
    assert len(long.ids) == 1 and [len(row.ids) for row in short] == [19] * 3
    batch.step()
    assert len(last.ids) == 1 and long.finish == "length"
    batch.drop([row for row in (*short, last) if row.finish is None])
    whole = RunningBatch(Engine(model), prefix_tokens=0, prefill_tokens=4_000, native=native)
    again = Row(long.request)
    whole.join([again])
    whole.step()
    whole.step()
    assert again.ids == long.ids and again.logprobs == pytest.approx(long.logprobs, abs=1e-5)


def test_a_piece_has_at_most_its_tokens(policy: Transformer) -> None:
    batch = RunningBatch(Engine(policy), prefill_tokens=20, prefix_tokens=0)
    read: list[int] = []
    run = batch._run

    def noting(first, starts, ids):
        read.append(sum(len(new) for new in ids))
        return run(first, starts, ids)

    batch._run = noting
    batch.join([Row(GenRequest(BEGINNING[:n], 40, seed=n)) for n in (3, 30, 9, 50)])
    for _ in range(5):
        batch.step()
    assert read == [20, 20, 20, 20, 12]


def test_a_beginning_that_another_is_reading_is_waited_for(policy: Transformer) -> None:
    batch = RunningBatch(Engine(policy), prefill_tokens=BLOCK)
    rows = [Row(GenRequest((*BEGINNING, i), 3, seed=i)) for i in range(3)]
    batch.join(rows)
    while batch.running:
        batch.step()
    assert [row.cached for row in rows] == [0, 4 * BLOCK, 4 * BLOCK]


def test_a_prompt_left_in_its_middle_leaves_its_slot(policy: Transformer) -> None:
    batch = RunningBatch(Engine(policy), prefill_tokens=10, prefix_tokens=0)
    first, second = (Row(GenRequest(BEGINNING[k:], 4, seed=k)) for k in (0, 1))
    batch.join([first, second])
    batch.step()
    batch.drop([first])
    while batch.running:
        batch.step()
    [wanted] = Engine(policy).generate([second.request])
    assert second.ids == wanted.ids and first.ids == []


def test_pieces_need_a_token(policy: Transformer) -> None:
    with pytest.raises(ModelError, match="prefill_tokens is 0"):
        RunningBatch(Engine(policy), prefill_tokens=0)
