"""Attention of trees by strands and of pieces with carried keys, against the rule as a mask."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model.config import PRESETS
from model.errors import ModelError
from model.flex import BLOCK
from model.strands import find_strands, strand_attention
from model.tree_attend import TreeAttend, carried_mask
from model.visible import Visibility, dense_mask, forest_visibility
from model.window import EVERYTHING, Reach


def random_tree(tokens, seed, turn=0.1):
    """Depth and `tout` of random forests in pre-order."""
    rng = random.Random(seed)
    depth = [0]
    while len(depth) < tokens:
        turns = rng.random() < turn
        depth.append(rng.randrange(depth[-1] + 1) if turns else depth[-1] + 1)
    return forest_visibility(depth)


def piece_of(tree, begin, end):
    """Tokens [begin, end) of a tree behind the path that is open there, and the path's places."""
    open_C = (tree.tout_M[:begin] > begin).nonzero()[:, 0]
    places_S = torch.cat([open_C, torch.arange(begin, end)])
    tout_S = torch.searchsorted(places_S, tree.tout_M[places_S])
    return Visibility(tout_S, tree.depth_M[places_S]), open_C


def drawn(tokens, heads, seed, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, size, generator=generator, dtype=dtype, requires_grad=True)


def by_mask(q, k, v, mask):
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], enable_gqa=True)
    return out[0].transpose(0, 1)


def equal_gradients(found, expected, inputs, grad):
    pairs = zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    )
    for mine, theirs in pairs:
        assert (mine - theirs).abs().max() < 1e-13


@pytest.mark.parametrize("kinds", [1, 2, 4])
@pytest.mark.parametrize("turn", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("begin", [0, 37])
def test_strands_are_the_rule_forward_and_backward(kinds, turn, begin):
    tree = random_tree(90, seed=kinds, turn=turn)
    piece, open_C = piece_of(tree, begin, 90)
    carried = len(open_C)
    q, k, v = (
        drawn(n, h, i) for i, (n, h) in enumerate([(90 - begin, 4)] + 2 * [(len(piece), kinds)])
    )
    strands = find_strands(piece.depth_M, carried)
    assert [s.end - s.begin for s in strands] and strands[-1].end == 90 - begin
    found = strand_attention(q, k, v, strands)
    expected = by_mask(q, k, v, dense_mask(piece, EVERYTHING)[carried:])
    grad = torch.randn_like(found)
    assert (found - expected).abs().max() < 1e-14
    equal_gradients(found, expected, (q, k, v), grad)


CONFIG = PRESETS["nano"]


@pytest.mark.parametrize("reach", [EVERYTHING, Reach(40, 3)], ids=["full", "window"])
@pytest.mark.parametrize(("begin", "end"), [(1, 200), (130, 900), (512, 640), (700, 1000)])
def test_a_pieces_block_mask_is_the_rule(reach, begin, end):
    """Every pair that is seen lies in a listed block, full blocks hold nothing else, and the rule
    inside partial blocks is exact: the dense mask comes back out of it."""
    tree = random_tree(1000, seed=begin, turn=0.01)
    piece, open_C = piece_of(tree, begin, end)
    carried = len(open_C)
    mask, gap, queries, keys = carried_mask(piece, carried, reach, CONFIG)
    assert queries % BLOCK == keys % BLOCK == 0 and queries != keys
    expected = torch.zeros(queries, keys, dtype=torch.bool)
    dense = dense_mask(piece, reach)[carried:]
    expected[: end - begin, :carried] = dense[:, :carried]
    expected[: end - begin, carried + gap :][:, : end - begin] = dense[:, carried:]
    padding = torch.arange(end - begin, queries)
    expected[padding, carried + gap + padding] = True
    whole = create_block_mask(mask.mask_mod, None, None, queries, keys, device="cpu")
    q = torch.arange(queries)[:, None]
    k = torch.arange(keys)
    assert torch.equal(mask.mask_mod(0, 0, q, k), expected)
    some = expected.view(queries // BLOCK, BLOCK, -1, BLOCK).any(3).any(1)
    full = expected.view(queries // BLOCK, BLOCK, -1, BLOCK).all(3).all(1)

    def listed(counts, order):
        out = torch.zeros(queries // BLOCK, keys // BLOCK, dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            out[row, order[0, 0, row, :count].long()] = True
        return out

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    every = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (some & ~(partial | every)).any() and not (every & ~full).any()
    if reach.window is None:
        assert torch.equal(listed(whole.full_kv_num_blocks, whole.full_kv_indices), every)
        assert torch.equal(partial | every, some)


def test_a_pieces_attention_through_flex():
    """The reference (uncompiled) flex attention of a piece, as CUDA's gets it."""
    tree = random_tree(420, seed=3, turn=0.03)
    piece, open_C = piece_of(tree, 150, 420)
    carried = len(open_C)
    q, k, v = (
        x.detach() for x in (drawn(270, 8, 0), drawn(len(piece), 2, 1), drawn(len(piece), 2, 2))
    )
    attend = TreeAttend(piece, CONFIG, [(k[:carried], v[:carried])], carried)
    expected = attend(0, q, k[carried:], v[carried:]).view_as(q)
    mask, gap, queries, keys = carried_mask(piece, carried, EVERYTHING, CONFIG)
    long_q = F.pad(q, (0, 0, 0, 0, 0, queries - 270))
    long_k, long_v = (
        torch.cat([F.pad(x[:carried], (0, 0, 0, 0, 0, gap)), x[carried:]]) for x in (k, v)
    )
    long_k, long_v = (F.pad(x, (0, 0, 0, 0, 0, keys - len(x))) for x in (long_k, long_v))
    parts = (x.transpose(0, 1)[None] for x in (long_q, long_k, long_v))
    out = flex_attention(*parts, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)[:270]
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_a_pieces_attention_on_cuda(dtype, tolerance):
    """Compiled flex attention of pieces with carried keys, forward and backward, some lengths."""
    for begin, end in ((300, 1000), (90, 1000), (640, 999)):
        tree = random_tree(1000, seed=begin, turn=0.02)
        piece, open_C = piece_of(tree, begin, end)
        carried = len(open_C)
        values = [
            drawn(n, h, i, torch.float32, size=32).detach()
            for i, (n, h) in enumerate([(end - begin, 8)] + 2 * [(len(piece), 2)])
        ]
        q, k, v = (x.double().requires_grad_() for x in values)
        expected = by_mask(q, k, v, dense_mask(piece, EVERYTHING)[carried:])
        grad = torch.randn_like(expected)
        theirs = torch.autograd.grad(expected, (q, k, v), grad)
        q, k, v = (x.to("cuda", dtype).requires_grad_() for x in values)
        seen = Visibility(piece.tout_M.cuda(), piece.depth_M.cuda())
        attend = TreeAttend(seen, CONFIG, [(k[:carried], v[:carried])], carried)
        found = attend(0, q, k[carried:], v[carried:]).view_as(q)
        assert (found.cpu().double() - expected).abs().max() < tolerance
        mine = torch.autograd.grad(found, (q, k, v), grad.to("cuda", dtype))
        for a, b in zip(mine, theirs, strict=True):
            assert (a.cpu().double() - b).abs().max() < tolerance * max(1, b.abs().max())


def test_refusals():
    tree = random_tree(30, seed=1)
    piece, open_C = piece_of(tree, 12, 30)
    k = torch.zeros(len(open_C) + 1, 2, 8)
    with pytest.raises(ModelError, match="keys of other lengths"):
        TreeAttend(piece, CONFIG, [(k, k)], len(open_C))
    attend = TreeAttend(piece, CONFIG, [(k[1:], k[1:])], len(open_C))
    with pytest.raises(ModelError, match="17 tokens after"):
        attend(0, torch.zeros(17, 8, 8), torch.zeros(17, 2, 8), torch.zeros(17, 2, 8))
