"""Window layers wherever the model runs: what a ring keeps is all that is needed, exactly."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import CONFIG as SMALL
from small_model import VOCAB, make_uneven
from trees import NaiveAttend, random_calls

from model import shared_prefix
from model.attention import Nearby
from model.cache import KVCache
from model.config import FULL, WINDOW, ModelConfig
from model.generate import Engine, GenRequest, Row
from model.native.build import NativeUnavailableError
from model.native.step import NativeModel
from model.running import RunningBatch
from model.scoring import score_tokens
from model.shared_prefix import find_groups
from model.slots import JoinAttend, SlotAttend, SlotCache
from model.transformer import Transformer
from model.window import NOTHING, SPARE, Reach, cache_bytes

HYBRID = replace(SMALL, attn_type_list=(WINDOW, FULL, WINDOW), sliding_window=5, num_sink_tokens=2)
ALL_WINDOWS = replace(SMALL, attn_type_list=(WINDOW,) * 3, sliding_window=4)
SLOTS = 16  # of either: 5 + 2 + 8 and 4 + 0 + 8, rounded up
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[HYBRID, ALL_WINDOWS], ids=["hybrid", "windows"])
def policy(request) -> Transformer:
    return make_uneven(Transformer(request.param, seed=0).cast(torch.float64), 1, 0.2)


def text(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def naive(model: Transformer, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) with attention written out token by token."""
    with torch.no_grad():
        x_TH = model.run(torch.tensor(ids), torch.arange(len(ids)), NaiveAttend(model.config))
        return model.head(x_TH)


def equal(mine: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(mine, wanted, atol=1e-10, rtol=0)


@given(st.integers(1, 6), st.integers(0, 5), st.integers(1, 40), st.integers(-1, 60))
def test_a_ring_holds_what_its_arithmetic_says(window, sinks, columns, last):
    reach = Reach(window, sinks)
    slots = reach.slots(columns)
    last = min(last, columns - 1)
    held = [NOTHING] * slots
    for position in range(last + 1):
        held[int(reach.slot_of(torch.tensor(position), slots))] = position
    assert reach.held(torch.tensor([last]), slots)[0].tolist() == held
    every = torch.arange(last + 1)
    stays = reach.stays(every, torch.tensor(last), slots)
    assert every[stays].tolist() == sorted(p for p in held if p != NOTHING)
    for taken_back in range(SPARE + 1):
        query = torch.tensor(last + 1 - taken_back)
        needed = {k for k in range(int(query)) if bool(reach.sees(query, torch.tensor(k)))}
        assert needed <= set(held)


@torch.no_grad()
def test_rows_padded_on_either_side_equal_the_rule(policy, monkeypatch):
    monkeypatch.setattr("model.attention.NEAR_QUERIES", 4)
    rows = [text(n, n) for n in (23, 7, 1, 14)]
    width = max(map(len, rows))
    right = torch.tensor([[*row, *[3] * (width - len(row))] for row in rows])
    left = torch.tensor([[*[3] * (width - len(row)), *row] for row in rows])
    pad_left_B = torch.tensor([width - len(row) for row in rows])
    from_right, from_left = policy(right), policy(left, pad_left_B=pad_left_B)
    assert not from_left.isnan().any()
    for b, row in enumerate(rows):
        wanted = naive(policy, row)
        equal(from_right[b, : len(row)], wanted)
        equal(from_left[b, width - len(row) :], wanted)
    windowless = replace(policy.config, attn_type_list=(), sliding_window=None, num_sink_tokens=0)
    full = Transformer(windowless, seed=None).cast(torch.float64)
    full.load_state_dict(policy.state_dict())
    assert (full(right) - from_right).abs().max() > 1e-3
    wide = replace(policy.config, sliding_window=width)
    wide_window = Transformer(wide, seed=None).cast(torch.float64)
    wide_window.load_state_dict(policy.state_dict())
    assert torch.equal(full(right), wide_window(right))


@torch.no_grad()
@pytest.mark.parametrize("parts", [[1] * 60, [40, 1, 1, 18], [3, 30, 27], [60]])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_gives_the_logits_of_the_whole_row(policy, parts, padded):
    lengths = [60, 33, 2, 58] if padded else [60, 60]
    rows = [text(n, n + i) for i, n in enumerate(lengths)]
    ids_BT = torch.tensor([[*[0] * (60 - len(row)), *row] for row in rows])
    pad_left_B = torch.tensor([60 - n for n in lengths]) if padded else None
    cache = KVCache(policy.config, len(rows), 64, CPU, torch.float64)
    assert cache.keys[0].shape[2] == SLOTS < cache.columns == 64
    logits = torch.cat(
        [policy(p, pad_left_B=pad_left_B, cache=cache) for p in ids_BT.split(parts, dim=1)], dim=1
    )
    for b, row in enumerate(rows):
        equal(logits[b, 60 - len(row) :], naive(policy, row))


@torch.no_grad()
def test_tokens_can_be_taken_back_from_a_ring(policy):
    kept, refused, after = text(40, 1), text(SPARE, 2), text(20, 3)
    cache = KVCache(policy.config, 1, 100, CPU, torch.float64)
    policy(torch.tensor([kept]), cache=cache)
    policy(torch.tensor([refused]), cache=cache)
    cache.length -= SPARE
    parts = [policy(torch.tensor([[id]]), cache=cache) for id in after]
    equal(torch.cat(parts, dim=1)[0], naive(policy, kept + after)[40:])


def rescored(model: Transformer, prompt: tuple[int, ...], ids: list[int]) -> torch.Tensor:
    logits_TV = naive(model, [*prompt, *ids])[len(prompt) - 1 : -1]
    return logits_TV.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def requests() -> list[GenRequest]:
    """Prompts below and far above the window, some alike; replies of several turns of the ring."""
    sizes = [1, 3, 8, 30, 30, 57, 16, 17]
    prompts = [tuple(text(n, i)) for i, n in enumerate(sizes)] * 2
    return [GenRequest(p, 20 + 7 * (i % 5), seed=i) for i, p in enumerate(prompts)]


def test_generation_equals_recomputation(policy):
    asked = requests()
    for request, made in zip(asked, Engine(policy).generate(asked), strict=True):
        made_T = torch.tensor(made.logprobs, dtype=torch.float64)
        equal(made_T, rescored(policy, request.prompt_ids, made.ids))


@pytest.mark.parametrize("packed", [True, False])
def test_a_running_batch_equals_recomputation(policy, packed):
    batch = RunningBatch(Engine(policy), max_batch=7)
    if not packed:
        batch._packed = None
    assert batch._prefix is None
    rows = [Row(request) for request in requests()]
    waiting, rng = list(rows), random.Random(0)
    dropped = rows[5]
    while waiting or batch.running:
        room = batch.room([row.request for row in waiting[: rng.randint(0, 4)]])
        batch.join(waiting[:room])
        del waiting[:room]
        batch.step()
        if len(dropped.ids) == 5 and dropped in batch._rows:
            batch.drop([dropped])
    assert len(dropped.ids) == 5
    for row in rows:
        made_T = torch.tensor(row.logprobs, dtype=torch.float64)
        equal(made_T, rescored(policy, row.request.prompt_ids, row.ids))


@torch.no_grad()
def test_prompts_read_in_pieces_and_caches_that_grow(policy):
    """Rows join in chunks between steps of others; the cache moves, and rows change places."""
    texts = [text(n, n) for n in (90, 30, 60)]
    cache = SlotCache(policy.config, CPU, torch.float64)
    got: list[list[torch.Tensor]] = [[], [], []]
    filled = [0, 0, 0]

    def join(first: int, counts: list[int]) -> None:
        chosen = list(range(first, first + len(counts)))
        starts = [filled[r] for r in chosen]
        cache.fit(
            3,
            max(s + n for s, n in zip(starts, counts, strict=True)),
            min(3, cache.rows),
            max(filled),
        )
        attend = JoinAttend(cache, first, starts, counts)
        ids = [
            id for r, s, n in zip(chosen, starts, counts, strict=True) for id in texts[r][s : s + n]
        ]
        x_MH = policy.run(torch.tensor(ids), attend.column_M, attend)
        for r, part, n in zip(chosen, x_MH.split(counts), counts, strict=True):
            got[r].append(policy.head(part))
            filled[r] += n

    def step() -> None:
        column_B = torch.tensor(filled)
        cache.fit(3, max(filled) + 1, 3, max(filled))
        attend = SlotAttend(cache, column_B, max(filled) + 1)
        ids = [t[f] for t, f in zip(texts, filled, strict=True)]
        logits = policy.head(policy.run(torch.tensor(ids), column_B, attend))
        for r in range(3):
            got[r].append(logits[r : r + 1])
            filled[r] += 1

    join(0, [3, 1, 11])
    step()
    join(0, [40, 12])
    join(2, [1])
    step()
    join(1, [5, 30])
    step()
    for r in range(3):
        equal(torch.cat(got[r]), naive(policy, texts[r][: filled[r]]))
    cache.move(2, 0, filled[2])
    texts[0], filled[0], got[0] = texts[2], filled[2], []
    step()
    equal(torch.cat(got[0]), naive(policy, texts[2][: filled[2]])[-1:])
    used = policy.config.attn_type_list.index(WINDOW)
    assert cache.of(used).shape[3] == SLOTS


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_shared_beginnings_in_window_layers(seed, tree, policy, monkeypatch):
    lay_out = shared_prefix.lay_out
    monkeypatch.setattr("model.scoring.lay_out", lambda *args, **_: lay_out(*args, tree=tree))
    rows = random_calls(seed, 7, 14, 30)
    rows += [[*rows[0], *text(9, seed)], text(30, seed)]
    if seed == 0:  # nothing in common
        rows = [[i, *text(12 + i, i)] for i in range(4)]
    lengths_B = torch.tensor([len(row) for row in rows])
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    assert (find_groups(ids_BT, (lengths_B - 1).tolist()).saved > 15) == (seed > 0)
    logp_BT = score_tokens(policy, ids_BT, lengths_B).logp_BT
    for b, row in enumerate(rows):
        if len(row) > 1:
            equal(logp_BT[b, 1 : len(row)].detach(), rescored(policy, (row[0],), row[1:]))


@torch.no_grad()
def test_a_window_layer_looks_at_what_is_near_alone(monkeypatch):
    seen: list[int] = []
    inner = torch.nn.functional.scaled_dot_product_attention

    def noting(q, k, v, **settings):
        seen.append(k.shape[2])
        return inner(q, k, v, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    position = torch.arange(2000)[None]
    x = torch.zeros(1, 1, 2000, 2)
    Nearby(Reach(100, 3), position, position)(x, x, x)
    assert len(seen) == 8 and max(seen) == 256 + 99 + 3


def test_what_a_token_costs_in_memory():
    """Two window layers of three: the cache of a long text is that of the third, and a rest."""
    full = replace(HYBRID, attn_type_list=(), sliding_window=None, num_sink_tokens=0)
    a_column = 2 * SMALL.num_key_value_heads * SMALL.head_dim * 4
    for columns in (8, 100, 1000):
        for config, wanted in ((full, 3 * columns), (HYBRID, columns + 2 * min(columns, SLOTS))):
            cache = KVCache(config, 1, columns, CPU, torch.float32)
            assert cache.nbytes == cache_bytes(config, columns, 4) == wanted * a_column


def test_native_code_leaves_window_layers_to_torch(policy):
    model = Transformer(policy.config)
    with pytest.raises(NativeUnavailableError, match="window"):
        NativeModel(model)
    assert "window" in RunningBatch(Engine(model)).path


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_split_of_any_text_gives_the_same_numbers(data):
    sizes = data.draw(st.tuples(st.integers(1, 9), st.integers(0, 4)))
    config = ModelConfig(
        **{
            **{name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__},
            "num_hidden_layers": 1,
            "attn_type_list": (WINDOW,),
            "sliding_window": sizes[0],
            "num_sink_tokens": sizes[1],
        }
    )
    model = Transformer(config, seed=0).cast(torch.float64)
    row = text(data.draw(st.integers(1, 45)), 0)
    cache = KVCache(config, 1, 45, CPU, torch.float64)
    parts = []
    with torch.no_grad():
        while cache.length < len(row):
            count = data.draw(st.integers(1, len(row) - cache.length))
            ids = torch.tensor([row[cache.length : cache.length + count]])
            parts.append(model(ids, cache=cache)[0])
    equal(torch.cat(parts), naive(model, row))
