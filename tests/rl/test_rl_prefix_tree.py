"""The tree's layout against the definition of a trie, on random forests and the awkward cases."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.prefix_tree import build_packs, cut, sort_calls


@dataclass(frozen=True)
class One:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def calls_of(draw_ids):
    return st.lists(
        st.builds(
            One,
            st.lists(draw_ids, min_size=1, max_size=9).map(tuple),
            st.lists(draw_ids, max_size=6).map(tuple),
        ),
        min_size=1,
        max_size=12,
    )


FEW = calls_of(st.integers(0, 1))  # two letters: deep sharing, equal calls, one a prefix of another


def path_to(pack, index):
    """The packed tokens that `index` sees, by the rule."""
    return [k for k in range(index + 1) if index < pack.tout_M[k]]


@settings(max_examples=200, deadline=None)
@given(FEW, st.sampled_from([None, 15, 20, 40]))
def test_every_trained_token_sees_exactly_its_own_call(calls, budget):
    packs = build_packs(calls, budget)
    seen = []
    for pack in packs:
        assert budget is None or pack.tokens <= budget
        rows = zip(pack.predictor_n, pack.target_n, pack.call_n, pack.offset_n, strict=True)
        for predictor, target, call, offset in rows:
            whole = (*calls[call].prompt_ids, *calls[call].response_ids)
            at = len(calls[call].prompt_ids) + offset
            path = path_to(pack, predictor)
            assert tuple(pack.ids_M[path]) == whole[:at]
            assert list(pack.depth_M[path]) == list(range(at))
            assert target == whole[at]
            seen.append((int(call), int(offset)))
    wanted = [(c, t) for c, call in enumerate(calls) for t in range(len(call.response_ids))]
    assert sorted(seen) == wanted


@settings(max_examples=100, deadline=None)
@given(FEW)
def test_one_token_a_prefix_and_its_count(calls):
    prefixes = {}
    for call in calls:
        if call.response_ids:
            whole = (*call.prompt_ids, *call.response_ids)
            for end in range(1, len(whole)):
                prefixes[whole[:end]] = prefixes.get(whole[:end], 0) + 1
    packs = build_packs(calls)
    if not prefixes:
        assert packs == []
        return
    (pack,) = packs
    found = {tuple(pack.ids_M[path_to(pack, k)]): int(pack.calls_M[k]) for k in range(pack.tokens)}
    assert found == prefixes
    assert pack.pairs == sum(len(prefix) for prefix in prefixes)
    assert sort_calls(calls).tokens == pack.tokens


def test_nothing_shared_is_plain_packing():
    calls = [One((i, 1, 2), (3, 4)) for i in range(5)]
    (pack,) = build_packs(calls)
    assert pack.tokens == 5 * 4
    assert list(pack.tout_M) == [end for end in (4, 8, 12, 16, 20) for _ in range(4)]


def test_a_budget_cuts_between_calls_and_repeats_the_path():
    calls = [One((7,) * 10, (i, i)) for i in range(4)]
    runs = cut(sort_calls(calls), 13)
    assert [len(run) for run in runs] == [3, 1]
    assert [pack.tokens for pack in build_packs(calls, 13)] == [13, 11]


def test_refusals():
    with pytest.raises(ValueError, match="more than a pack's 10"):
        build_packs([One((1,) * 11, (2,))], 10)
    with pytest.raises(ValueError, match="call 1 has no prompt"):
        build_packs([One((1,), (2,)), One((), (2,))])
    assert build_packs([One((1, 2), ())]) == []


def test_a_large_batch_is_laid_out_in_numpy_time():
    """80 turns of 8 agents: seven million tokens before merging."""
    rng = np.random.default_rng(0)
    calls = []
    for _ in range(2):
        history = rng.integers(0, 50_000, 4096).tolist()
        for _ in range(80):
            answer = rng.integers(0, 50_000, 300).tolist()
            calls.append(One(tuple(history), tuple(answer)))
            history += answer + rng.integers(0, 50_000, 700).tolist()
    (pack,) = build_packs(calls)
    assert pack.tokens == 2 * (4096 + 79 * 1000 + 299)
