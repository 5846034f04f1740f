"""Attention by parts against the rule as a mask, with a kernel written out in float64."""

import pytest
import torch

from model import segments
from model.segment_kernels import join
from model.segments import Segment, find_segments, parts_of, pays, segment_attention, suits
from model.visible import dense_mask, row_visibility
from model.window import EVERYTHING
from tests.model.test_tree_attend import by_mask, drawn, piece_of, random_tree


class Plain:
    """The kernel's contract, token by token."""

    def __init__(self):
        self.calls = []

    def scores(self, part, q, k):
        assert part.sizes == (q.shape[2], k.shape[2])
        self.calls.append(part)
        share = q.shape[1] // k.shape[1]
        scores = q[0] @ k[0].repeat_interleave(share, 0).transpose(1, 2) / q.shape[3] ** 0.5
        seen = torch.ones(part.sizes, dtype=torch.bool)
        behind = part.sizes[1] - part.sizes[0]
        return scores.masked_fill(~(seen.tril(behind) if part.causal else seen), -torch.inf)

    def forward(self, part, q, k, v):
        scores = self.scores(part, q, k)
        lse = scores.logsumexp(2)
        share = q.shape[1] // k.shape[1]
        weights = (scores - lse[..., None]).exp()
        return (weights @ v[0].repeat_interleave(share, 0))[None], lse

    def backward(self, part, grad, q, k, v, out, lse):
        share = q.shape[1] // k.shape[1]
        weights = (self.scores(part, q, k) - lse[..., None]).exp()
        k_all, v_all = (x[0].repeat_interleave(share, 0) for x in (k, v))
        inner = grad[0] @ v_all.transpose(1, 2) - (grad * out)[0].sum(2, keepdim=True)
        ds = weights * inner / q.shape[3] ** 0.5
        dk, dv = ds.transpose(1, 2) @ q[0], weights.transpose(1, 2) @ grad[0]
        fold = [x.view(k.shape[1], share, *x.shape[1:]).sum(1)[None] for x in (dk, dv)]
        return (ds @ k_all)[None], *fold


@pytest.fixture(params=[7, segments.LEAST], ids=["many parts", "few parts"])
def least(request, monkeypatch):
    """Sizes with a plan begin at 7: every kind of part occurs in a small tree."""
    monkeypatch.setattr(segments, "LEAST", request.param)
    monkeypatch.setattr(segments, "MOST_QUERIES", 16)


@pytest.mark.parametrize("kinds", [1, 2, 4])
@pytest.mark.parametrize("turn", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("begin", [0, 37])
def test_parts_are_the_rule_forward_and_backward(kinds, turn, begin, least):
    tree = random_tree(90, seed=kinds, turn=turn)
    piece, open_C = piece_of(tree, begin, 90)
    carried = len(open_C)
    q, k, v = (
        drawn(n, h, i) for i, (n, h) in enumerate([(90 - begin, 4)] + 2 * [(len(piece), kinds)])
    )
    parts = parts_of(find_segments(piece.tout_M, carried), carried)
    kernel = Plain()
    found = segment_attention(q, k, v, parts, kernel)
    assert kernel.calls == parts
    seen_MS = dense_mask(piece, EVERYTHING)[carried:]
    assert sum(part.pairs for part in parts) == int(seen_MS.sum())
    expected = by_mask(q, k, v, seen_MS)
    grad = torch.randn_like(found)
    assert (found - expected).abs().max() < 1e-14
    pairs = zip(
        torch.autograd.grad(found, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    )
    for mine, theirs in pairs:
        assert (mine - theirs).abs().max() < 1e-13


def test_segments_of_rows_a_tree_and_a_piece_behind_a_path():
    assert find_segments(row_visibility([3, 2]).tout_M) == [Segment(0, 3, 3), Segment(3, 5, 5)]
    # a trunk of 2, branches of 2 and 1, another root; then what the second branch and a root see
    assert find_segments(torch.tensor([5, 5, 4, 4, 5, 6])) == [
        Segment(0, 2, 5),
        Segment(2, 4, 4),
        Segment(4, 5, 5),
        Segment(5, 6, 6),
    ]
    assert find_segments(torch.tensor([3, 3, 3, 4]), carried=2) == [
        Segment(0, 2, 3),
        Segment(2, 3, 3),
        Segment(3, 4, 4),
    ]
    assert find_segments(torch.tensor([1, 4, 4, 4]), carried=2) == [
        Segment(1, 2, 4),
        Segment(2, 4, 4),
    ]


def test_new_lengths_meet_sizes_seen_before():
    """A plan takes longer than the attention: all lengths to 70,000 need few of them."""
    squares, rectangles = set(), set()
    for length in range(1, 70_000, 137):
        trunk = Segment(0, length, 2 * length + 5000)
        for part in parts_of([trunk]):
            if part.planned:
                (squares if part.causal else rectangles).add(part.sizes)
        own = [part for part in parts_of([trunk]) if part.causal]
        assert own[0].sizes[0] > 15 / 16 * length or length < segments.LEAST
    assert len(squares) <= 110
    assert len(rectangles) <= 8 * 7 * 7
    assert {queries for queries, _ in rectangles} == {1 << i for i in range(10, 17)}


def test_long_segments_pay_and_short_ones_do_not():
    def chosen(tout):
        return pays(parts_of(find_segments(tout)))

    assert chosen(row_visibility([20_000] * 4).tout_M)
    assert not chosen(row_visibility([300] * 260).tout_M)
    agents = torch.tensor(4096 * [36096] + [8096 + 4000 * i for i in range(8) for _ in range(4000)])
    assert chosen(agents)
    chain = torch.tensor(2000 * [38000] + 60 * (200 * [0] + 400 * [38000]))
    for i in range(60):
        chain[2000 + 600 * i : 2200 + 600 * i] = 2200 + 600 * i
    assert not chosen(chain)
    assert not suits(torch.zeros(4, 2, 8, dtype=torch.bfloat16))  # not on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("begin", [0, 500])
def test_parts_on_cuda(begin):
    """cuDNN's and the flash kernel joined, forward and backward, against float64."""
    tree = random_tree(6000, seed=1, turn=0.001)
    piece, open_C = piece_of(tree, begin, 6000)
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(n, h, 128, generator=generator).to(torch.bfloat16).cuda()
        for n, h in [(6000 - begin, 12)] + 2 * [(len(piece), 2)]
    ]
    q, k, v = (x.double().requires_grad_() for x in values)
    expected = by_mask(q, k, v, dense_mask(piece, EVERYTHING)[len(open_C) :].cuda())
    grad = torch.randn(expected.shape, generator=generator).to(torch.bfloat16).cuda()
    reference = torch.autograd.grad(expected, (q, k, v), grad.double())
    mine = [x.clone().requires_grad_() for x in values]
    assert suits(mine[0])
    parts = parts_of(find_segments(piece.tout_M.cuda(), len(open_C)), len(open_C))
    kinds = {(part.planned, part.causal, part.joins) for part in parts}
    assert {(True, True, True), (False, True, True), (False, False, True)} <= kinds
    found = segment_attention(*mine, parts)
    grads = torch.autograd.grad(found, mine, grad)
    for a, b in zip((found, *grads), (expected, *reference), strict=True):
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
