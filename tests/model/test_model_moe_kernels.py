"""The passes of the GPU path against naive code: on a CUDA device, or on a CPU in Triton's
interpreter (`TRITON_INTERPRET=1`, triton installed)."""

import os

import pytest
import torch
import torch.nn.functional as F

from model import experts_fused
from model.experts import loop_experts
from model.experts_fused import (
    can_fuse,
    combine,
    fused_experts,
    gather,
    sort_pairs,
    swiglu,
    swiglu_backward,
)

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and not os.environ.get("TRITON_INTERPRET"), reason="cuda: needs a CUDA device"
    ),
]
DEVICE = "cuda" if CUDA else "cpu"
F32, BF16 = torch.float32, torch.bfloat16

# Tokens, hidden size, width, experts, experts a token; most are no multiple of a tile.
SIZES = [(37, 24, 16, 5, 2), (300, 40, 24, 70, 3), (50, 1040, 520, 6, 2), (1, 32, 16, 5, 2)]
SIZES += [(129, 48, 136, 300, 1)]


def routing(kind, tokens, experts, top_k):
    generator = torch.Generator().manual_seed(0)
    if kind == "one takes all":
        return torch.arange(top_k).add(1).expand(tokens, top_k).contiguous().to(DEVICE)
    scores_ME = torch.rand(tokens, experts, generator=generator)
    return scores_ME[:, : experts - 1].topk(top_k).indices.to(DEVICE)  # the last has none


def case(size, dtype, kind="random"):
    tokens, hidden, width, experts, top_k = size
    generator = torch.Generator().manual_seed(1)
    shapes = ((tokens, hidden), (experts, 2 * width, hidden), (experts, width, hidden))
    scales = (1.0, 1.5 * hidden**-0.5, 1.5 * width**-0.5)
    made = [s * torch.randn(n, generator=generator) for n, s in zip(shapes, scales, strict=True)]
    x, w13, w2 = (t.to(DEVICE, dtype).requires_grad_() for t in made)
    weights = torch.randn(tokens, top_k, generator=generator).to(DEVICE).requires_grad_()
    return x, weights, routing(kind, tokens, experts, top_k), w13, w2


def close(got, expected, dtype):
    tolerance = {F32: 3e-6, BF16: 1.5e-2}[dtype]
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("kind", ["random", "one takes all"])
@pytest.mark.parametrize("size", SIZES)
def test_the_sort_is_stable_and_counts(size, kind):
    tokens, _, _, experts, top_k = size
    experts_Mk = routing(kind, tokens, experts, top_k)
    rows = sort_pairs(experts_Mk, experts)
    expected = experts_Mk.flatten().sort(stable=True)
    assert torch.equal(rows.pair_R.long(), expected.indices)
    assert torch.equal(
        rows.pair_R[rows.slot_P.long()].long(), torch.arange(tokens * top_k).to(DEVICE)
    )
    ends_E = torch.bincount(expected.values, minlength=experts).cumsum(0)
    assert torch.equal(rows.ends_E.long(), ends_E) and rows.ends_E.dtype == torch.int32


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", SIZES)
def test_each_pass_equals_indexing_and_arithmetic(size, dtype):
    x_MH, weights_Mk, experts_Mk, _, _ = (t.detach() for t in case(size, dtype))
    top_k, width = size[4], size[2]
    rows = sort_pairs(experts_Mk, size[3])
    pair_R = rows.pair_R.long()
    x_RH = gather(x_MH, rows)
    assert torch.equal(x_RH, x_MH[pair_R // top_k])
    sums_MH = torch.zeros(x_MH.shape, dtype=torch.float64, device=DEVICE)
    close(combine(x_RH, rows), sums_MH.index_add(0, pair_R // top_k, x_RH.double()), dtype)
    generator = torch.Generator().manual_seed(3)
    up_RO = torch.randn(len(pair_R), 2 * width, generator=generator).to(DEVICE, dtype)
    grad_RI = torch.randn(len(pair_R), width, generator=generator).to(DEVICE, dtype)
    wide_up, wide_weights = (t.double().requires_grad_() for t in (up_RO, weights_Mk))
    gate, value = wide_up.chunk(2, -1)
    h_RI = F.silu(gate) * value * wide_weights.flatten()[pair_R][:, None]
    close(swiglu(up_RO, weights_Mk, rows), h_RI, dtype)
    expected = torch.autograd.grad(h_RI, (wide_up, wide_weights), grad_RI.double())
    grad_up_RO, grad_weights_Mk, again_RI = swiglu_backward(up_RO, weights_Mk, rows, grad_RI)
    close(grad_up_RO, expected[0], dtype)
    close(grad_weights_Mk, expected[1], F32)
    close(again_RI, h_RI, dtype)


# torch has no grouped product in float32 on a GPU that keeps the host out.
@pytest.mark.parametrize("dtype", [BF16] if CUDA else [F32, BF16])
@pytest.mark.parametrize("kind", ["random", "one takes all"])
@pytest.mark.parametrize("size", SIZES)
def test_a_whole_layer_equals_the_loop(size, kind, dtype):
    inputs = case(size, dtype, kind)
    if CUDA:
        assert can_fuse(inputs[0], inputs[4])
    leaves = [t for t in inputs if t.is_floating_point()]
    # Leave rubbish where results will lie: experts without tokens must not inherit it.
    rubbish = [torch.full_like(t, torch.nan) for t in leaves for _ in range(3)]
    del rubbish
    out = fused_experts(*inputs)
    back = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    grads = torch.autograd.grad(out, leaves, back.to(dtype))
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    expected = loop_experts(*wide)
    wide_leaves = [t for t in wide if t.is_floating_point()]
    expected_grads = torch.autograd.grad(expected, wide_leaves, back.to(dtype).double())
    assert out.dtype == dtype
    tolerance = {F32: 2e-6, BF16: 2e-2}[dtype]
    for got, want, leaf in zip(
        [out, *grads], [expected, *expected_grads], [out, *leaves], strict=True
    ):
        assert (got.double() - want).norm() <= tolerance * want.norm()
        assert got.dtype == leaf.dtype and got.stride() == leaf.stride()
    unused = [e for e in range(size[3]) if not bool((inputs[2] == e).any())]
    for grad in grads[2:]:
        assert not grad[unused].any()
    again = fused_experts(*inputs)
    assert torch.equal(again, out)
    repeated = torch.autograd.grad(again, leaves, back.to(dtype))
    assert all(map(torch.equal, repeated, grads))


@pytest.mark.parametrize("size", SIZES[:2])
def test_kept_and_gathered_rows_give_the_same_bits(size, monkeypatch):
    found = []
    for limit in (0, 1 << 30):
        monkeypatch.setattr(experts_fused, "KEPT_BYTES", limit)
        inputs = case(size, BF16 if CUDA else F32)
        leaves = [t for t in inputs if t.requires_grad]
        out = fused_experts(*inputs)
        found.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(map(torch.equal, *found))


@pytest.mark.skipif(not CUDA, reason="cuda: needs a CUDA device")
def test_a_captured_layer_follows_its_inputs():
    """The host never looks at the routing, so a CUDA graph holds the layer."""
    size = (200, 64, 32, 8, 2)
    x, weights, ids, w13, w2 = (t.detach() for t in case(size, BF16))
    side = torch.cuda.Stream()
    with torch.no_grad():
        with torch.cuda.stream(side):
            fused_experts(x, weights, ids, w13, w2)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_experts(x, weights, ids, w13, w2)
        ids.copy_(routing("one takes all", 200, 8, 2))
        x.mul_(-1)
        graph.replay()
        torch.testing.assert_close(out, fused_experts(x, weights, ids, w13, w2), atol=0, rtol=0)
