"""The running batch: what joins and leaves changes nothing, nor do cache and packed weights."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG as SMALL
from small_model import CONTEXT, VOCAB, make_uneven

from model.attention import CausalAttend
from model.errors import ModelError
from model.generate import Engine, GenRequest, Row
from model.packed import PackedModel
from model.prefix_cache import BLOCK, PrefixCache
from model.running import RunningBatch
from model.scoring import token_logprobs
from model.transformer import Transformer

CONFIG = replace(SMALL, num_local_experts=8)
BEGINNING = tuple(i * 7 % VOCAB for i in range(3 * BLOCK + 5))


@pytest.fixture(scope="module")
def policy() -> Transformer:
    return make_uneven(Transformer(CONFIG, seed=0).cast(torch.float64), 1, 0.2)


def requests(count: int, seed: int = 0) -> list[GenRequest]:
    """Of many lengths and settings; two of three share a beginning, some a whole prompt."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        begin = rng.choice([0, BLOCK, 2 * BLOCK + 3, len(BEGINNING)]) if i % 3 else 0
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 20)))
        request = GenRequest(
            BEGINNING[:begin] + own,
            rng.randint(1, 30),
            temperature=rng.choice([1.0, 0.7, 0.0]),
            top_p=rng.choice([1.0, 0.8]),
            seed=i,
            stop_ids=frozenset({rng.randrange(VOCAB)}),
        )
        made.append(replace(made[-1], seed=i) if i % 4 == 3 else request)
    return made


def run(batch: RunningBatch, asked: list[GenRequest], rng: random.Random) -> list[Row]:
    """All requests through the batch, joining a few at a time between any two steps."""
    rows = [Row(request) for request in asked]
    waiting = list(rows)
    while waiting or batch.running:
        room = batch.room([row.request for row in waiting[: rng.randint(0, 4)]])
        batch.join(waiting[:room])
        del waiting[:room]
        for row in batch.step():
            assert row.finish is not None
    return rows


def close(rows: list[Row], wanted: list, tolerance: float) -> None:
    for row, generation in zip(rows, wanted, strict=True):
        assert row.ids == generation.ids and row.finish == generation.finish_reason
        got, expected = torch.tensor([row.logprobs, generation.logprobs], dtype=torch.float64)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("prefix_tokens", [0, 12 * BLOCK, 4096])
@pytest.mark.parametrize("max_batch", [3, 64])
def test_whoever_else_runs_each_result_is_that_of_the_request_alone(
    policy: Transformer, prefix_tokens: int, max_batch: int
) -> None:
    asked = requests(24)
    engine = Engine(policy)
    alone = [engine.generate([request])[0] for request in asked]
    batch = RunningBatch(engine, max_batch=max_batch, prefix_tokens=prefix_tokens)
    for seed in range(2):  # the second time the cache is full of the first
        rows = run(batch, asked, random.Random(seed))
        close(rows, alone, 1e-10)
    assert any(row.cached for row in rows) == bool(prefix_tokens or max_batch == 64)


def test_in_float32_log_probs_are_those_of_the_trainers_forward(policy: Transformer) -> None:
    model = Transformer(CONFIG, seed=0)
    asked = requests(24, seed=1)
    rows = run(RunningBatch(Engine(model)), asked, random.Random(0))
    assert sum(row.cached for row in rows) > 10 * BLOCK
    for request, row in zip(asked, rows, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *row.ids]])
        with torch.no_grad():
            again_BT = token_logprobs(
                model, ids, torch.tensor([ids.shape[1]]), request.temperature or 1.0
            )
        again = again_BT[0, len(request.prompt_ids) :]
        torch.testing.assert_close(again, torch.tensor(row.logprobs), atol=1e-4, rtol=0)


def test_rows_that_are_dropped_leave_the_others_as_they_were(policy: Transformer) -> None:
    asked = [replace(request, max_new_tokens=30) for request in requests(12, seed=2)]
    engine = Engine(policy)
    alone = engine.generate(asked)
    batch = RunningBatch(engine)
    rows = [Row(request) for request in asked]
    batch.join(rows[:8])
    for step in range(40):
        if step < 8:
            batch.drop([row for row in (rows[step],) if step % 2 == 0 and row.finish is None])
        if step == 3:
            batch.join(rows[8:])
        batch.step()
    assert batch.running == 0
    kept = [i for i in range(12) if i >= 8 or i % 2 or rows[i].finish]
    close([rows[i] for i in kept], [alone[i] for i in kept], 1e-10)
    assert len(kept) < 12


def test_a_prompt_that_several_rows_have_is_computed_once(policy: Transformer) -> None:
    tokens: list[int] = []

    class Noting(PackedModel):
        def run(self, ids_M, position_M, attend):
            tokens.append(len(ids_M))
            return super().run(ids_M, position_M, attend)

    batch = RunningBatch(Engine(policy), prefix_tokens=0)
    batch._packed = Noting(policy)
    prompt = BEGINNING[:30]
    rows = [Row(GenRequest(prompt, 1, seed=i)) for i in range(9)]
    batch.join(rows)
    batch.step()
    assert tokens == [30] and [row.cached for row in rows] == [0] + [30] * 8
    prefixed = RunningBatch(Engine(policy))
    prefixed._packed = Noting(policy)
    tokens.clear()
    prefixed.join([Row(GenRequest((*BEGINNING, i), 1, seed=i)) for i in range(4)])
    prefixed.step()
    assert tokens == [len(BEGINNING) + 1, 3 * (len(BEGINNING) + 1 - 3 * BLOCK)]
    tokens.clear()
    prefixed.join([Row(GenRequest(BEGINNING[:BLOCK], 1))])  # the last token is always computed
    prefixed.step()
    assert tokens == [BLOCK]


def test_replies_are_beginnings_of_later_prompts(policy: Transformer) -> None:
    engine = Engine(policy)
    batch = RunningBatch(engine)
    [first] = run(batch, [GenRequest(BEGINNING[:20], 30, seed=1)], random.Random(0))
    longer = GenRequest((*BEGINNING[:20], *first.ids, 5, 6), 8, seed=2)
    [row] = run(batch, [longer], random.Random(0))
    assert row.cached == 49 // BLOCK * BLOCK
    close([row], engine.generate([longer]), 1e-10)


def test_new_weights_forget_the_old_ones_keys(policy: Transformer) -> None:
    batch = RunningBatch(Engine(policy))
    request = GenRequest(BEGINNING, 9, seed=1)
    run(batch, [request], random.Random(0))
    other = Transformer(CONFIG, seed=9).cast(torch.float64)
    batch.load(other, 1)
    [row] = run(batch, [request], random.Random(0))
    assert row.cached == 0 and batch.version == 1
    close([row], Engine(other).generate([request]), 1e-10)


def test_memory_stays_within_its_bounds_and_is_given_back(policy: Transformer) -> None:
    batch = RunningBatch(Engine(policy), cache_tokens=16 * CONTEXT, max_batch=64)
    a_token = batch._engine.model.config.num_hidden_layers * 2 * CONFIG.key_value_size * 8
    rows = [Row(GenRequest((1,) * 60, CONTEXT - 60, seed=i)) for i in range(40)]
    waiting, most = list(rows), 0
    while waiting or batch.running:
        room = batch.room([row.request for row in waiting])
        batch.join(waiting[:room])
        del waiting[:room]
        most = max(most, batch.running)
        assert batch.cache_bytes <= 16 * CONTEXT * a_token
        batch.step()
    assert most == 16 and batch.cache_bytes == 0
    with pytest.raises(ModelError, match="give at least 1024"):
        RunningBatch(Engine(policy), cache_tokens=1023)


def test_a_constraint_that_breaks_ends_its_own_row(policy: Transformer) -> None:
    class Broken:
        def mask(self) -> None:
            raise ValueError("no mask")

        def accept(self, id: int) -> None:
            raise AssertionError

        def done(self) -> bool:
            return False

    engine = Engine(policy)
    asked = requests(3)
    bad = GenRequest((1, 2), 9, seed=0, constraint=Broken())
    rows = run(RunningBatch(engine), [*asked, bad], random.Random(0))
    close(rows[:3], engine.generate(asked), 1e-10)
    assert isinstance(rows[3].error, ValueError) and rows[3].ids == []
    with pytest.raises(ValueError, match="no mask"):
        rows[3].result(0)


def test_likeliest_tokens_and_scores_of_the_prompt(policy: Transformer) -> None:
    asked = [
        GenRequest(BEGINNING, 5, seed=1, top_logprobs=3, prompt_logprobs=True),
        GenRequest(BEGINNING, 5, 0.5, seed=1, top_logprobs=2),
        GenRequest(BEGINNING, 5, seed=1),
    ]
    batch = RunningBatch(Engine(policy))
    for _ in range(2):  # with and without a warm cache
        rows = run(batch, asked, random.Random(0))
        for request, row in zip(asked, rows, strict=True):
            ids = [*BEGINNING, *row.ids]
            with torch.no_grad():
                logits_TV = policy(torch.tensor([ids]))[0]
            place = len(BEGINNING) - 1
            best_TV = (logits_TV / request.temperature).log_softmax(-1)[place:-1]
            for top, logp_V in zip(row.top, best_TV, strict=bool(request.top_logprobs)):
                values, best = logp_V.topk(request.top_logprobs)
                assert [id for id, _ in top] == best.tolist()
                assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-10)
            assert (row.prompt is not None) == request.prompt_logprobs
        logp_TV = logits_TV.log_softmax(-1)[: len(BEGINNING) - 1]
        own = logp_TV.gather(1, torch.tensor(BEGINNING[1:])[:, None])[:, 0]
        assert rows[0].prompt.logprobs == pytest.approx(own.tolist(), abs=1e-10)
        assert [top[0][0] for top in rows[0].prompt.top] == logp_TV.argmax(-1).tolist()
        assert rows[0].ids == rows[2].ids and rows[2].top == []
    with pytest.raises(ModelError, match="running batch"):
        Engine(policy).generate(asked)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 96])
def test_packed_weights_give_the_models_numbers(policy: Transformer, tokens: int) -> None:
    packed = PackedModel(policy)
    ids = torch.arange(tokens) * 5 % VOCAB
    attend = CausalAttend(CONFIG, 1, tokens)
    expected = policy.head(policy.run(ids, torch.arange(tokens), attend))
    got = packed.head(packed.run(ids, torch.arange(tokens), attend))
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


# ---------------------------------------------------------------- the prefix cache by itself

TEXTS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=5)), max_size=25)


def data_of(ids: list[int]) -> torch.Tensor:
    """Keys and values that tell all of the text up to each token, as real ones do."""
    number, told = 0.0, []
    for id in ids:
        number = number * 3 + id + 1
        told.append(number)
    size = (CONFIG.num_hidden_layers, 2, CONFIG.num_key_value_heads, len(ids), CONFIG.head_dim)
    return torch.tensor(told, dtype=torch.float64)[:, None].expand(size).clone()


@settings(max_examples=80)
@given(texts=TEXTS, blocks=st.integers(1, 6))
def test_a_found_block_holds_the_keys_of_exactly_this_beginning(texts, blocks: int) -> None:
    cache = PrefixCache(CONFIG, blocks * BLOCK + 3, torch.device("cpu"), torch.float64)
    for puts, letters in texts:
        ids = [letter for letter in letters for _ in range(BLOCK)] + [9]
        if puts:
            cache.put(ids, data_of(ids))
            # What was put last is there, as far as there is room.
            assert len(cache.find(ids)) == min(len(letters), blocks)
        found = cache.find(ids)
        if found:
            length = len(found) * BLOCK
            torch.testing.assert_close(cache.read(found), data_of(ids[:length]), rtol=0, atol=0)
        assert len(cache) <= blocks
    cache.clear()
    assert len(cache) == 0 and cache.find([1] * BLOCK) == []


def test_the_longest_unused_text_goes_first_and_its_end_before_its_beginning() -> None:
    cache = PrefixCache(CONFIG, 4 * BLOCK, torch.device("cpu"), torch.float64)
    old, new, third = ([letter] * (2 * BLOCK) for letter in (1, 2, 3))
    for ids in (old, new):
        cache.put(ids, data_of(ids))
    cache.find(old)  # used again, so `new` is the older one now
    cache.put(third[:BLOCK], data_of(third[:BLOCK]))
    assert [len(cache.find(ids)) for ids in (new, old, third)] == [1, 2, 1]
