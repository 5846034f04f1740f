"""Attention divided in parts against the rule as a mask, with kernels written out in float64."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from model import parts
from model.config import PRESETS
from model.part_attend import PartAttend, Rest, divided_attention, suits
from model.part_kernels import join
from model.parts import Part, divide, division
from model.strands import Strand, find_strands
from model.visible import dense_mask, row_visibility
from model.window import EVERYTHING
from tests.model.test_tree_attend import by_mask, drawn, piece_of, random_tree

CONFIG = PRESETS["nano"]


class Plain:
    """The kernels' contract, score by score."""

    def __init__(self):
        self.calls = []

    def scores(self, part, q, k):
        assert part.sizes == (len(q), len(k))
        share = q.shape[1] // k.shape[1]
        k_all = k.repeat_interleave(share, 1)
        scores = torch.einsum("snd,jnd->nsj", q, k_all) / q.shape[2] ** 0.5
        seen = torch.ones(part.sizes, dtype=torch.bool)
        if part.causal:
            seen = seen.tril(part.sizes[1] - part.sizes[0])
        if part.lengths:
            row = torch.arange(len(part.lengths)).repeat_interleave(torch.tensor(part.lengths))
            seen &= row[:, None] == row
        return scores.masked_fill(~seen, -torch.inf)

    def forward(self, part, q, k, v):
        self.calls.append(part)
        scores = self.scores(part, q, k)
        lse = scores.logsumexp(2)
        weights = (scores - lse[..., None]).exp()
        share = q.shape[1] // k.shape[1]
        return torch.einsum("nsj,jnd->snd", weights, v.repeat_interleave(share, 1)), lse

    def backward(self, part, grad, q, k, v, out, lse):
        share = q.shape[1] // k.shape[1]
        weights = (self.scores(part, q, k) - lse[..., None]).exp()
        k_all, v_all = (x.repeat_interleave(share, 1) for x in (k, v))
        inner = torch.einsum("snd,jnd->nsj", grad, v_all) - (grad * out).sum(2).t()[..., None]
        ds = weights * inner / q.shape[2] ** 0.5
        dk = torch.einsum("nsj,snd->jnd", ds, q)
        dv = torch.einsum("nsj,snd->jnd", weights, grad)
        fold = (x.view(len(k), k.shape[1], share, -1).sum(2) for x in (dk, dv))
        return torch.einsum("nsj,jnd->snd", ds, k_all), *fold


def check(piece, carried, found, kernel, kinds):
    """Output and gradients of a division, whose rest goes through reference flex attention."""
    own = len(piece) - carried
    q, k, v = (drawn(n, h, i) for i, (n, h) in enumerate([(own, 4)] + 2 * [(len(piece), kinds)]))
    rest = Rest(found, piece.tout_M, CONFIG, carried) if found.rest else None
    with torch.set_grad_enabled(rest is None):  # reference flex attention has no backward pass
        out = divided_attention(q, k, v, found, rest, kernel, flex_attention)
    assert kernel.calls == list(found.parts)
    seen_MS = dense_mask(piece, EVERYTHING)[carried:]
    left = sum(strand.pairs for strand in found.rest)
    assert sum(part.pairs for part in found.parts) + left == int(seen_MS.sum())
    expected = by_mask(q, k, v, seen_MS)
    grad = torch.randn_like(out)
    assert (out - expected).abs().max() < 1e-13
    if rest is not None:
        return
    pairs = zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    )
    for mine, theirs in pairs:
        assert (mine - theirs).abs().max() < 1e-13


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
    strands = find_strands(piece.depth_M, len(open_C))
    everything = division(strands, set(range(len(strands))), len(open_C))
    assert not everything.rest
    check(piece, len(open_C), everything, Plain(), kinds)


@pytest.mark.parametrize("begin", [0, 150])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_goes_through_flex_attention(begin, seed, monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 16)
    piece, open_C = piece_of(random_tree(420, seed=seed, turn=0.03), begin, 420)
    strands = find_strands(piece.depth_M, len(open_C))
    long = {i for i, strand in enumerate(strands) if len(strand) >= 16}
    found = division(strands, long, len(open_C))
    assert found.rest and found.parts
    check(piece, len(open_C), found, Plain(), 2)


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


def test_strands_side_by_side_share_a_rectangle(monkeypatch):
    monkeypatch.setattr(parts, "LEAST", 8)
    strands = [Strand(0, 8, ()), *(Strand(8 + 4 * i, 12 + 4 * i, ((0, 8),)) for i in range(4))]
    found = division(strands, set(range(5)))
    assert found.parts == (
        Part(slice(0, 8), slice(0, 8), causal=True, planned=True),
        Part(slice(8, 24), slice(8, 24), causal=True, lengths=(4, 4, 4, 4)),
        Part(slice(8, 24), slice(0, 8), causal=False, planned=True),
    )


def test_new_lengths_meet_sizes_seen_before():
    """A plan takes longer than the attention: all lengths to 70,000 need few of them."""
    squares, rectangles = set(), set()
    for length in range(1, 70_000, 137):
        strands = [Strand(0, length, ()), Strand(length, 2 * length + 5000, ((0, length),))]
        found = division(strands, {0, 1})
        for part in found.parts:
            if part.planned:
                (squares if part.causal else rectangles).add(part.sizes)
        if length >= parts.LEAST:
            assert found.parts[0].sizes[0] > 15 / 16 * length
    assert len(squares) <= 3 * 16 + 4 * 32 + 32
    assert len(rectangles) <= 8 * 7 * 7
    assert {queries for queries, _ in rectangles} == {1 << i for i in range(10, 17)}


def agents(count, turns, trunk, leaf, step):
    """Depths of agents on one prompt whose answers hang off a spine, longest branch first."""
    depth = list(range(trunk))
    for _ in range(count):
        depth += range(trunk, trunk + turns * step + leaf)
        for turn in reversed(range(turns)):
            depth += range(trunk + turn * step, trunk + turn * step + leaf)
    return torch.tensor(depth)


def test_long_strands_are_taken_and_short_ones_left():
    def left(depth):
        found = divide(find_strands(depth))
        return None if found is None else sum(map(len, found.rest)) / len(depth)

    assert left(row_visibility([20_000] * 4).depth_M) == 0
    assert left(row_visibility([300] * 260).depth_M) is None
    assert left(row_visibility([40_000, 300, 300, 200]).depth_M) == 0  # too few to start it for
    stripped = left(agents(8, 20, 4096, 300, 800))
    assert stripped is not None and abs(stripped - 8 * 19 * 300 / 174_500) < 0.02
    siblings = torch.cat([torch.arange(8192), *([torch.arange(8192, 9092)] * 8)])
    assert left(siblings) == 0
    assert left(agents(60, 1, 500, 200, 400)) is None
    attend = PartAttend(siblings, siblings, CONFIG)
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    assert not suits(q) and attend(q, q, q) is None  # not on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("begin", [0, 500])
@pytest.mark.parametrize("left", [False, True])
def test_parts_on_cuda(begin, left):
    """cuDNN's and the flash kernel joined, and flex attention beside them, against float64."""
    piece, open_C = piece_of(random_tree(6000, seed=1, turn=0.001), begin, 6000)
    carried = len(open_C)
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(n, h, 128, generator=generator).to(torch.bfloat16).cuda()
        for n, h in [(6000 - begin, 12)] + 2 * [(len(piece), 2)]
    ]
    q, k, v = (x.double().requires_grad_() for x in values)
    expected = by_mask(q, k, v, dense_mask(piece, EVERYTHING)[carried:].cuda())
    grad = torch.randn(expected.shape, generator=generator).to(torch.bfloat16).cuda()
    reference = torch.autograd.grad(expected, (q, k, v), grad.double())
    mine = [x.clone().requires_grad_() for x in values]
    assert suits(mine[0])
    strands = find_strands(piece.depth_M, carried)
    taken = {i for i, strand in enumerate(strands) if not left or len(strand) >= 1024}
    found = division(strands, taken, carried)
    kinds = {(part.planned, part.causal) for part in found.parts}
    assert len(kinds) == 4 and bool(found.rest) == left
    assert left or any(part.lengths for part in found.parts)
    rest = Rest(found, piece.tout_M.cuda(), PRESETS["small"], carried) if left else None
    out = divided_attention(*mine, found, rest)
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
