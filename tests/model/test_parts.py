"""Attention divided in parts against the rule as a mask, with kernels written out in float64."""

from itertools import pairwise

import pytest
import torch

from benchmarks import parts as bench
from model import parts
from model.part_attend import PartAttend, divided_attention, suits
from model.part_kernels import Places, join
from model.parts import Part, Row, divide, division
from model.strands import Strand, find_strands
from model.visible import dense_mask, forest_visibility, row_visibility
from model.window import EVERYTHING
from tests.model.test_tree_attend import (
    by_mask,
    drawn,
    equal_gradients,
    piece_of,
    random_tree,
)


class Plain:
    """The kernels' contract, score by score."""

    def __init__(self):
        self.calls = 0

    def part(self, part, q, k, v):
        self.calls += 1
        assert part.sizes == (len(q) - part.padding, len(k) - part.padding)
        return forward(q, k, v, self.seen_by(part))

    def part_backward(self, part, grad, q, k, v, out, lse):
        return backward(grad, q, k, v, out, lse, self.seen_by(part))

    def seen_by(self, part):
        queries, keys = part.sizes
        seen = torch.ones(queries + part.padding, keys + part.padding, dtype=torch.bool)
        return seen.tril() if part.causal else seen

    def rows(self, rows, q, k, v):
        return forward(q, k, v, self.seen_in(rows))

    def rows_backward(self, rows, grad, q, k, v, out, lse):
        return backward(grad, q, k, v, out, lse, self.seen_in(rows))

    def seen_in(self, rows):
        seen = torch.zeros(int(rows.ends_q[-1]), int(rows.ends_k[-1]), dtype=torch.bool)
        ends = zip(pairwise(rows.ends_q.tolist()), pairwise(rows.ends_k.tolist()), strict=True)
        for (q0, q1), (k0, k1) in ends:
            assert q1 - q0 <= rows.most[0] and k1 - k0 <= rows.most[1]
            whole = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            seen[q0:q1, k0:k1] = whole.tril((k1 - k0) - (q1 - q0))
        return seen


def weights_of(q, k, seen):
    k_all = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("snd,jnd->nsj", q, k_all) / q.shape[2] ** 0.5
    return scores.masked_fill(~seen, -torch.inf)


def forward(q, k, v, seen):
    scores = weights_of(q, k, seen)
    lse = scores.logsumexp(2)
    v_all = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.einsum("nsj,jnd->snd", (scores - lse[..., None]).exp(), v_all), lse


def backward(grad, q, k, v, out, lse, seen):
    share = q.shape[1] // k.shape[1]
    weights = (weights_of(q, k, seen) - lse[..., None]).exp()
    k_all, v_all = (x.repeat_interleave(share, 1) for x in (k, v))
    inner = torch.einsum("snd,jnd->nsj", grad, v_all) - (grad * out).sum(2).t()[..., None]
    ds = weights * inner / q.shape[2] ** 0.5
    dk = torch.einsum("nsj,snd->jnd", ds, q)
    dv = torch.einsum("nsj,snd->jnd", weights, grad)
    fold = (x.view(len(k), k.shape[1], share, -1).sum(2) for x in (dk, dv))
    return torch.einsum("nsj,jnd->snd", ds, k_all), *fold


def check(piece, carried, kinds):
    """Output and gradients of a division against the mask."""
    found = division(find_strands(piece.depth_M, carried), carried)
    own = len(piece) - carried
    q, k, v = (drawn(n, h, i) for i, (n, h) in enumerate([(own, 4)] + 2 * [(len(piece), kinds)]))
    places = Places.of(found.rows, q.device) if found.rows else None
    kernel = Plain()
    out = divided_attention(q, k, v, found, places, kernel)
    assert kernel.calls == len(found.squares) + len(found.rectangles)
    seen_MS = dense_mask(piece, EVERYTHING)[carried:]
    assert found.pairs == int(seen_MS.sum())
    expected = by_mask(q, k, v, seen_MS)
    grad = torch.randn_like(out)
    assert (out - expected).abs().max() < 1e-13
    equal_gradients(out, expected, (q, k, v), grad)
    return found


@pytest.fixture(params=[7, parts.LEAST], ids=["many parts", "few parts"])
def least(request, monkeypatch):
    """Sizes with a plan begin at 7: every kind of part occurs in a small tree."""
    monkeypatch.setattr(parts, "LEAST", request.param)
    monkeypatch.setattr(parts, "MOST_QUERIES", 16)


@pytest.mark.parametrize("kinds", [1, 2, 4])
@pytest.mark.parametrize("turn", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("begin", [0, 37])
def test_parts_are_the_rule_forward_and_backward(kinds, turn, begin, least):
    piece, open_C = piece_of(random_tree(90, seed=kinds, turn=turn), begin, 90)
    check(piece, len(open_C), kinds)


@pytest.mark.parametrize("begin", [0, 150])
@pytest.mark.parametrize("seed", range(3))
def test_larger_trees_with_every_kind_of_part(begin, seed, monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 16)
    piece, open_C = piece_of(random_tree(420, seed=seed, turn=0.06), begin, 420)
    found = check(piece, len(open_C), 2)
    assert found.squares and found.rows
    assert found.rectangles and any(len(row.runs) > 1 for row in found.rows)


def test_squares_are_lengthened_where_their_ends_are_long(monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 16)
    rows = row_visibility([147, 145, 144, 64, 67, 65])  # steps of 4 in an octave
    found = check(rows, 0, 2)
    square = [(part.sizes[0], part.padding) for part in found.squares]
    assert square == [(147, 1), (144, 0), (144, 0), (64, 0), (67, 1), (64, 0)]
    assert [(row.begin, row.end) for row in found.rows] == [(291, 292), (631, 632)]


def test_strands_of_rows_a_tree_and_a_piece_behind_a_path():
    rows = row_visibility([3, 2])
    assert find_strands(rows.depth_M) == [Strand(0, 3, ()), Strand(3, 5, ())]
    # a trunk of 2 with a branch of 3, from its first token another of 1, from there one of 2
    tree = find_strands(torch.tensor([0, 1, 2, 3, 4, 3, 1, 2]))
    assert tree == [
        Strand(0, 5, ()),
        Strand(5, 6, ((0, 3),)),
        Strand(6, 8, ((0, 1),)),
    ]
    assert tree[1].depth == 3 and tree[1].pairs == 4 and tree[1].path_d.tolist() == [0, 1, 2]
    deep = find_strands(torch.tensor([0, 1, 2, 3, 2, 3, 3, 0]), carried=2)
    assert deep == [
        Strand(0, 2, ((0, 2),)),
        Strand(2, 4, ((0, 2),)),
        Strand(4, 5, ((0, 2), (4, 5))),
        Strand(5, 6, ()),
    ]


def test_strands_side_by_side_share_what_all_of_them_see(monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 8)
    same = [Strand(0, 8, ()), *(Strand(8 + 4 * i, 12 + 4 * i, ((0, 8),)) for i in range(4))]
    found = division(same)
    assert found.squares == (Part(slice(0, 8), slice(0, 8), causal=True, planned=True),)
    assert found.rectangles == (Part(slice(8, 24), slice(0, 8), causal=False, planned=True),)
    assert found.rows == tuple(Row(s.begin, s.end, ((s.begin, s.end),)) for s in same[1:])
    stops = [32, 28, 20, 9]  # of strands of four that hang ever higher
    stairs = [
        Strand(0, 32, ()),
        *(Strand(32 + 4 * i, 36 + 4 * i, ((0, x),)) for i, x in enumerate(stops)),
    ]
    found = division(stairs)
    rectangles = [(part.queries, part.keys) for part in found.rectangles]
    assert rectangles == [
        (slice(32, 48), slice(0, 9)),
        (slice(36, 44), slice(9, 20)),
    ]
    assert [row.runs[:-1] for row in found.rows] == [((9, 32),), ((20, 28),), (), ()]
    shelf = [
        Strand(0, 32, ()),
        *(Strand(32 + 4 * i, 36 + 4 * i, ((0, 30 if i < 4 else 9),)) for i in range(6)),
    ]
    rectangles = [(part.queries, part.keys) for part in division(shelf).rectangles]
    assert rectangles[0] == (slice(32, 56), slice(0, 9))
    assert (slice(32, 48), slice(9, 29)) in rectangles


def test_new_lengths_meet_sizes_seen_before():
    """A plan takes longer than the attention: all lengths to 70,000 need few of them."""
    squares, rectangles = set(), set()
    for length in range(1, 70_000, 137):
        strands = [Strand(0, length, ()), Strand(length, 2 * length + 5000, ((0, length),))]
        found = division(strands)
        squares |= {part.sizes[0] + part.padding for part in found.squares}
        rectangles |= {part.sizes for part in found.rectangles if part.planned}
        if length >= parts.LEAST:
            covered, padding = found.squares[0].sizes[0], found.squares[0].padding
            assert 15 / 16 * length < covered <= length and padding < length / 16
            assert not padding or covered == length
        for part in found.rectangles:  # what has no plan is little
            assert part.planned or part.pairs <= (1 / 8 + 1 / 4) * strands[1].pairs
    assert len(squares) <= 3 * 16 + 4 * 32 + 32
    assert len(rectangles) <= 13 * 8 * 7
    assert len({queries for queries, _ in rectangles}) <= 13


def agents(count, turns, trunk, leaf, step):
    """Depths of agents on one prompt whose answers hang off a spine, longest branch first."""
    depth = list(range(trunk))
    for _ in range(count):
        depth += range(trunk, trunk + turns * step + leaf)
        for turn in reversed(range(turns)):
            depth += range(trunk + turn * step, trunk + turn * step + leaf)
    return torch.tensor(depth)


def test_long_strands_are_divided_and_short_ones_are_not():
    def share(depth):
        """Estimated cost over that of flex attention."""
        strands = find_strands(depth)
        found = divide(strands)
        assert found is None or found.pairs == sum(strand.pairs for strand in strands)
        return None if found is None else found.cost / found.pairs

    assert share(row_visibility([20_000] * 4).depth_M) < 0.65
    assert share(row_visibility([40_000, 300, 300, 200]).depth_M) < 0.65
    assert share(agents(8, 20, 4096, 300, 800)) < 0.75
    assert share(torch.cat([torch.arange(8192), *([torch.arange(8192, 9092)] * 8)])) < 0.75
    assert share(row_visibility([300] * 260).depth_M) is None
    assert share(row_visibility([1100] * 20).depth_M) is None
    assert share(agents(60, 1, 500, 200, 400)) is None
    attend = PartAttend(torch.arange(4))
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    assert not suits(q) and attend(q, q, q) is None  # not on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("carried", [0, 3000])
def test_parts_on_cuda(carried):
    """cuDNN's and the flash kernel joined, forward and backward, against float64."""
    tree = agents(2, 3, 3000, 300, 900)
    piece = forest_visibility(tree.tolist())
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(n, h, 128, generator=generator).to(torch.bfloat16).cuda()
        for n, h in [(len(piece) - carried, 12)] + 2 * [(len(piece), 2)]
    ]
    q, k, v = (x.double().requires_grad_() for x in values)
    expected = by_mask(q, k, v, dense_mask(piece, EVERYTHING)[carried:].cuda())
    grad = torch.randn(expected.shape, generator=generator).to(torch.bfloat16).cuda()
    reference = torch.autograd.grad(expected, (q, k, v), grad.double())
    mine = [x.clone().requires_grad_() for x in values]
    assert suits(mine[0])
    found = division(find_strands(tree, carried), carried)
    assert found.squares and any(len(row.runs) > 1 for row in found.rows)
    assert any(part.padding for part in found.squares)
    assert {part.planned for part in found.rectangles} == {True, False}
    out = divided_attention(*mine, found, Places.of(found.rows, mine[0].device))
    grads = torch.autograd.grad(out, mine, grad)
    for a, b in zip((out, *grads), (expected, *reference), strict=True):
        assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.gpu
def test_joining_on_cuda_is_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    out, more = (torch.randn(77, 3, 40, generator=generator) for _ in range(2))
    lse, more_lse = (10 * torch.randn(3, 77, generator=generator) for _ in range(2))
    cuda = [x.cuda() for x in (out, lse, more, more_lse)]
    join(*cuda)
    join(out, lse, more, more_lse)
    assert (cuda[0].cpu() - out).abs().max() < 1e-5
    assert (cuda[1].cpu() - lse).abs().max() < 1e-5


def test_a_forests_subtrees_end_where_another_token_is_as_high():
    trees = [random_tree(200, seed, turn=0.3).depth_M.tolist() for seed in range(5)]
    for depth in [shape.depth for shape in bench.shapes(small=True)] + trees:
        tout = [
            next((j for j in range(i + 1, len(depth)) if depth[j] <= depth[i]), len(depth))
            for i in range(len(depth))
        ]
        found = forest_visibility(depth)
        assert found.tout_M.tolist() == tout and found.depth_M.tolist() == depth


def test_the_benchmark_of_choices_runs_without_a_gpu():
    rows = bench.measure(repeats=1)["rows"]
    assert [row["chosen"] for row in rows] == ["flex"] * 3
    assert [row["pairs"] for row in rows] == [15_150, 46_560, 43_300]
    assert all(row["flex_ms"] > 0 for row in rows)
