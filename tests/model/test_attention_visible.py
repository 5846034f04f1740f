"""One rule of visibility: a row in a pack or a tree comes out as if it were alone."""

from dataclasses import replace

import pytest
import torch
from small_model import CONFIG as SMALL
from small_model import make_uneven
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from trees import NaiveAttend, naive_attention, random_calls, tree_of

from model.attention import CausalAttend
from model.config import FULL, WINDOW
from model.errors import ModelError
from model.flex import flex, whole_blocks
from model.transformer import Transformer
from model.visible import (
    Visibility,
    VisibleAttend,
    block_mask,
    dense_mask,
    row_visibility,
)
from model.window import EVERYTHING, Reach

HYBRID = replace(SMALL, attn_type_list=(WINDOW, FULL, WINDOW), sliding_window=5, num_sink_tokens=2)
REACHES = [EVERYTHING, Reach(5, 2), Reach(33), Reach(70, 20)]


def forest(seed, longest=40):
    return tree_of(random_calls(seed, 8, longest, 6))


def dense_blocks(counts, indices, blocks):
    """Which blocks a list of blocks names."""
    out = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row, (count, index) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0], strict=True)):
        out[row, index[:count].long()] = True
    return out


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("seed", range(4))
def test_the_block_mask_is_the_librarys(seed, block, reach):
    made = forest(seed).visibility if seed else row_visibility([300])
    blocks = -(-len(made) // block) + seed % 2
    made = made.padded(blocks * block)
    mine = block_mask(made, reach, block)
    size = len(made)
    theirs = create_block_mask(
        mine.mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=block
    )
    dense = dense_mask(made, reach)
    tile = dense.view(blocks, block, blocks, block)
    full = dense_blocks(mine.full_kv_num_blocks, mine.full_kv_indices, blocks)
    some = dense_blocks(mine.kv_num_blocks, mine.kv_indices, blocks)
    assert not (full & some).any()
    assert not (full & ~tile.all(3).all(1)).any()
    wanted = dense_blocks(theirs.kv_num_blocks, theirs.kv_indices, blocks)
    wanted |= dense_blocks(theirs.full_kv_num_blocks, theirs.full_kv_indices, blocks)
    assert torch.equal(wanted, tile.any(3).any(1))
    assert not (wanted & ~(full | some)).any()
    if reach is EVERYTHING or not seed:  # a forest may hold depths that lie between
        assert torch.equal(wanted, full | some)
        assert torch.equal(full, dense_blocks(*theirs_full(theirs), blocks))
    # The other order, for the backward pass, is the same blocks.
    turned = dense_blocks(mine.q_num_blocks, mine.q_indices, blocks)
    assert torch.equal(turned.T, some)


def theirs_full(mask):
    return mask.full_kv_num_blocks, mask.full_kv_indices


@pytest.mark.filterwarnings("ignore:.*flex_attention called without")
@pytest.mark.parametrize("reach", REACHES)
def test_flex_attention_by_these_masks_equals_the_dense_rule(reach):
    generator = torch.Generator().manual_seed(0)
    made = forest(3)
    own = len(made.ids_M)
    visibility = made.visibility.padded(-(-own // 128) * 128)
    q, k, v = (torch.randn(len(visibility), heads, 16, generator=generator) for heads in (4, 2, 2))
    out = flex(q, k, v, block_mask(visibility, reach), flex_attention)
    for path in made.places:
        wide = (x[path].double() for x in (q, k, v))
        expected = naive_attention(*wide, reach.window, reach.sinks)
        torch.testing.assert_close(out[path].flatten(1).double(), expected, atol=1e-5, rtol=0)


def test_packs_of_all_lengths_share_one_compiled_function():
    run = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend="eager")

    def once(tokens, reach):
        blocks = whole_blocks(tokens, SMALL)
        assert 0 <= blocks * 128 - tokens < 4 * 128
        made = row_visibility([tokens // 3, tokens - tokens // 3]).padded(blocks * 128)
        q, k, v = (torch.ones(len(made), heads, 16) for heads in (4, 2, 2))
        return flex(q, k, v, block_mask(made, reach), run)

    with torch.no_grad():
        once(500, EVERYTHING)  # four blocks, as many as there are query heads
        once(500, Reach(50, 2))
        with torch.compiler.set_stance("fail_on_recompile"):
            for tokens in (7, 129, 250, 384, 800):
                once(tokens, EVERYTHING)
                once(tokens, Reach(tokens // 2 + 1, 3))
    torch._dynamo.reset()


@pytest.mark.parametrize("reach", [(None, 0), (5, 2), (1, 0), (7, 11)])
@pytest.mark.parametrize("kind", ["rows", "tree"])
def test_visible_attention_equals_every_text_by_itself(kind, reach):
    window, sinks = reach
    config = SMALL
    if window:
        config = replace(
            SMALL, attn_type_list=(WINDOW,) * 3, sliding_window=window, num_sink_tokens=sinks
        )
    generator = torch.Generator().manual_seed(1)
    if kind == "rows":
        lengths = [3, 1, 17, 9]
        visibility, places, start = row_visibility(lengths), [], 0
        for length in lengths:
            places.append(list(range(start, start + length)))
            start += length
        assert visibility.depth_M.tolist() == [t for n in lengths for t in range(n)]
    else:
        made = forest(5, longest=9)
        visibility, places = made.visibility, made.places
    q, k, v = (
        torch.randn(len(visibility), heads, 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    out = VisibleAttend(visibility, config)(0, q, k, v)
    for path in places:
        expected = naive_attention(q[path], k[path], v[path], window, sinks)
        torch.testing.assert_close(out[path], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["full", "hybrid"])
@pytest.mark.parametrize("seed", range(3))
def test_a_call_in_a_tree_has_the_hidden_states_and_gradients_of_the_call_alone(seed, config):
    model = make_uneven(Transformer(config, seed=seed).cast(torch.float64), seed, 0.2)
    calls = random_calls(seed, 6, 12, 5)
    made = tree_of(calls)
    assert len(made.ids_M) < sum(map(len, calls)) - 10
    attend = VisibleAttend(made.visibility, config)
    together = model.run(made.ids_M, made.visibility.depth_M, attend)
    generator = torch.Generator().manual_seed(seed)
    loss_of_tree = loss_alone = torch.zeros((), dtype=torch.float64)
    for call, path in zip(calls, made.places, strict=True):
        position = torch.arange(len(call))
        ids = torch.tensor(call)
        alone = model.run(ids, position, CausalAttend(config, 1, len(call)))
        torch.testing.assert_close(together[path], alone, atol=1e-12, rtol=0)
        with torch.no_grad():
            naive = model.run(ids, position, NaiveAttend(config))
        torch.testing.assert_close(alone.detach(), naive, atol=1e-12, rtol=0)
        weight = torch.randn(alone.shape, generator=generator, dtype=torch.float64)
        loss_of_tree = loss_of_tree + (together[path] * weight).sum()
        loss_alone = loss_alone + (alone * weight).sum()
    used = [p for name, p in model.named_parameters() if name != "lm_head"]
    mine = torch.autograd.grad(loss_of_tree, used)
    wanted = torch.autograd.grad(loss_alone, used)
    for a, b in zip(mine, wanted, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_checkpointed_blocks_give_the_same_gradients():
    model = Transformer(HYBRID, seed=0).cast(torch.float64)
    made = forest(2, longest=9)

    def gradients(remade):
        attend = VisibleAttend(made.visibility, HYBRID)
        cos, sin = model.rotary[:, made.visibility.depth_M].double().unsqueeze(2)
        x = model.embed_tokens[made.ids_M]
        for layer in model.layers:
            if remade:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        used = [model.embed_tokens, *model.layers.parameters()]
        return torch.autograd.grad(x.square().sum(), used)

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(a, b)


def test_wrong_shapes_are_told_and_nothing_is_no_trouble():
    with pytest.raises(ModelError, match=r"tout \(3,\) and depth \(4,\)"):
        Visibility(torch.arange(3), torch.arange(4))
    with pytest.raises(ModelError, match="whole numbers"):
        Visibility(torch.arange(3), torch.zeros(3))
    attend = VisibleAttend(row_visibility([3]), SMALL)
    x = torch.zeros(4, 4, 16)
    with pytest.raises(ModelError, match="4 tokens, but a visibility of 3"):
        attend(0, x, x, x)
    nothing = VisibleAttend(row_visibility([0, 0]), SMALL)
    assert nothing(0, x[:0], x[:0, :2], x[:0, :2]).shape == (0, 64)
