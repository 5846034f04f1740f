"""The tree's layout against the definition of a trie, on random forests and the awkward cases."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.prefix_tree import build_packs, cut, lay_out, sort_calls
from rl.tree_plan import Costs


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


def row_of(call):
    return (*call.prompt_ids, *call.response_ids)[:-1]


def naive_order(rows, depth=0):
    """Indices of `rows` (index → ids, all equal up to `depth`): longest branch first."""
    ended = sorted(i for i, row in rows.items() if len(row) == depth)
    branches = {}
    for i, row in rows.items():
        if len(row) > depth:
            branches.setdefault(row[depth], {})[i] = row
    falling = sorted(branches.items(), key=lambda x: (-max(map(len, x[1].values())), x[0]))
    return [i for _, branch in falling for i in naive_order(branch, depth + 1)] + ended


def common(a, b):
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@settings(max_examples=300, deadline=None)
@given(FEW | calls_of(st.integers(0, 3)))
def test_calls_are_in_pre_order_longest_branch_first(calls):
    found = sort_calls(calls)
    rows = {i: row_of(call) for i, call in enumerate(calls) if call.response_ids}
    assert list(found.index) == naive_order(rows)
    assert [tuple(row) for row in found.rows] == [rows[i] for i in found.index]
    ordered = [(), *(rows[i] for i in found.index)]
    assert list(found.shared) == [common(a, b) for a, b in pairwise(ordered)]


@settings(max_examples=200, deadline=None)
@given(FEW | calls_of(st.integers(0, 3)), st.sampled_from([None, 15, 30]))
def test_each_token_is_followed_by_its_deepest_child(calls, budget):
    for pack in build_packs(calls, budget):
        reach = [int(pack.depth_M[k : pack.tout_M[k]].max()) for k in range(pack.tokens)]
        children = {}
        for k in range(pack.tokens):
            children.setdefault((path_to(pack, k)[:-1] or [-1])[-1], []).append(k)
        for parent, found in children.items():
            assert found[0] == parent + 1
            depths = [reach[k] for k in found]
            # The first call of a run may be cut off from what is deeper below it.
            assert budget is not None or depths == sorted(depths, reverse=True)
        assert len(pack.starts) == sum(k not in children for k in range(pack.tokens))  # leaves
        ends = [*pack.starts[1:], pack.tokens]
        assert all(
            list(np.diff(pack.depth_M[a:b])) == [1] * (b - a - 1)
            for a, b in zip(pack.starts, ends, strict=True)
        )


def test_a_stripped_agent_is_one_run_and_one_for_each_stripped_answer():
    rng = np.random.default_rng(0)
    agents, turns = 3, 5
    prompt, calls = (7,) * 10, []
    for _ in range(agents):
        history = prompt
        for _ in range(turns):
            answer = tuple(rng.integers(100, 10**6, 6).tolist())
            calls.append(One(history, answer))
            history += answer[4:] + tuple(rng.integers(100, 10**6, 3).tolist())
    (pack,) = build_packs(calls)
    lengths = np.diff(np.append(pack.starts, pack.tokens)).tolist()
    # An agent's last call is its spine. Other answers hang off it, deepest first; those of the
    # first turn hang off the prompt that the agents share, after every spine.
    spine = 5 * turns
    answers = [10 + 5 * turn for turn in range(turns - 2, 0, -1)]
    rest = [5] * len(answers)
    assert lengths == [10 + spine, *rest, *[spine, *rest] * (agents - 1), *[5] * agents]
    depths = pack.depth_M[pack.starts].tolist()
    assert depths == [0, *answers, *[10, *answers] * (agents - 1), *[10] * agents]


def test_equal_calls_and_prefixes_follow_what_holds_them_and_add_nothing():
    calls = [
        One((1, 2), (9,)),  # a prefix of all but the last
        One((1, 2, 3), (4,)),
        One((1, 2, 3), (4, 5, 9)),
        One((1, 2, 3, 4), (5, 8)),  # the same row as the call before
        One((1, 2), (4, 6, 6)),
        One((0, 0), (0,)),
    ]
    found = sort_calls(calls)
    assert found.index == (2, 3, 1, 4, 0, 5)
    assert found.shared == (0, 5, 3, 2, 2, 0)
    (pack,) = build_packs(calls)
    assert pack.ids_M.tolist() == [1, 2, 3, 4, 5, 4, 6, 0, 0]
    assert pack.starts.tolist() == [0, 5, 7]
    assert pack.calls_M.tolist() == [5, 5, 3, 2, 2, 1, 1, 1, 1]


def test_branches_of_equal_length_keep_the_order_of_their_ids():
    calls = [One((5,), (i, i)) for i in (3, 1, 2, 1)]
    for given_calls, index in ((calls, (1, 3, 2, 0)), (calls[::-1], (0, 2, 1, 3))):
        assert sort_calls(given_calls).index == index


def test_labels_part_calls_as_ids_do():
    calls = [One((1, 2), (3, 4)), One((1, 2), (3, 4)), One((1, 2), (3, 4, 5))]
    labels = [
        np.array([[0], [second], [0], [0]][: len(row_of(c))])
        for c, second in zip(calls, (0, 1, 1), strict=True)
    ]
    found = sort_calls(calls, labels)
    assert found.index == (2, 1, 0)
    assert found.shared == (0, 3, 1)


def test_thousands_of_nested_branches_need_no_recursion():
    ids = np.arange(5001)
    calls = [One(ids[: 1 + i], ids[: 1 + i % 2]) for i in range(5000)]
    (pack,) = build_packs(calls)
    assert pack.tokens == 5000 + 2500
    assert pack.depth_M[pack.starts].tolist() == [0, *range(4998, 0, -2)]


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


@settings(max_examples=100, deadline=None)
@given(FEW, st.sampled_from([15, 30]))
def test_a_pack_costs_the_same_before_and_after_it_is_laid_out(calls, budget):
    costs = Costs(token=3.0, pair=7.0, start=11.0, row=5.0, plain_pair=0.5)
    found = sort_calls(calls)
    for run in cut(found, budget):
        assert costs.of_run(found, run) == pytest.approx(costs.of(lay_out(calls, found, run)))


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
