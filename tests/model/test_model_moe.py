"""Experts computed together equal the plain loop, forward and backward, in float64."""

from dataclasses import replace

import pytest
import torch

from model.config import PRESETS
from model.experts import dense_experts, loop_experts, run_experts, sorted_experts
from model.experts_each import each_experts
from model.moe import MoE

CONFIG = replace(
    PRESETS["nano"],
    hidden_size=20,
    intermediate_size=12,
    num_local_experts=5,
    num_experts_per_tok=2,
)


def case(routing, dtype=torch.float64, tokens=17, seed=0):
    """Inputs with gradients, and expert ids: uneven, one expert empty, or one with everything."""
    generator = torch.Generator().manual_seed(seed)
    hidden, width, count, k = 20, 12, 5, 2
    ids = torch.stack([torch.randperm(count, generator=generator)[:k] for _ in range(tokens)])
    if routing == "empty":
        ids = torch.stack([torch.randperm(count - 1, generator=generator)[:k] for _ in ids])
        assert count - 1 not in ids
    elif routing == "all":
        ids[:, 0], ids[:, 1] = 3, torch.arange(tokens) % 3
    elif routing == "one token":
        ids = ids[:1]
    elif routing == "no token":
        ids = ids[:0]
    shapes = [(len(ids), hidden), (len(ids), k), (count, 2 * width, hidden), (count, width, hidden)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors = [(0.4 * t).to(dtype) for t in tensors]
    x, weights, w13, w2 = (t.requires_grad_() for t in tensors)
    return x, weights, ids, w13, w2


def outcome(function, inputs):
    """Output and the gradients of a curved function of it."""
    out = function(*inputs)
    leaves = [t for t in inputs if t.is_floating_point()]
    return out.detach(), torch.autograd.grad((out.sin() * out).sum(), leaves)


@pytest.mark.parametrize("routing", ["uneven", "empty", "all", "one token"])
@pytest.mark.parametrize("way", ["padded", "each", "dense"])
def test_every_way_equals_the_loop_in_float64(way, routing):
    ways = {
        "padded": lambda *a: sorted_experts(*a, "padded"),
        "each": each_experts,
        "dense": dense_experts,
    }
    out, grads = outcome(ways[way], case(routing))
    expected, expected_grads = outcome(loop_experts, case(routing))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("routing", ["uneven", "empty", "all", "one token"])
def test_the_grouped_product_equals_the_loop_in_float32(routing):
    def grouped(*inputs):
        return sorted_experts(*inputs, "grouped")

    out, grads = outcome(grouped, case(routing, torch.float32))
    expected, expected_grads = outcome(loop_experts, case(routing))
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, atol=1e-5, rtol=1e-4)


def test_gradcheck_of_the_padded_way():
    x, weights, ids, w13, w2 = case("uneven", tokens=6)

    def function(x, weights, w13, w2):
        return sorted_experts(x, weights, ids, w13, w2, "padded")

    assert torch.autograd.gradcheck(function, (x, weights, w13, w2), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_the_way_chosen_here_is_right_for_every_type_and_size(dtype, tokens):
    inputs = case("uneven", dtype, tokens)
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        run_experts(*inputs).double(), loop_experts(*wide), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_weights_stay_in_float32_and_so_does_their_gradient(dtype):
    x, weights, ids, w13, w2 = case("uneven", dtype)
    precise = weights.detach().float().add(1e-4).requires_grad_()  # bfloat16 would lose this
    out = run_experts(x, precise, ids, w13, w2)
    (grad,) = torch.autograd.grad(out.float().sum(), [precise])
    wide = [t.detach().double() for t in (x, precise, w13, w2)]
    wide[1].requires_grad_()
    expected = loop_experts(wide[0], wide[1], ids, wide[2], wide[3])
    (expected_grad,) = torch.autograd.grad(expected.sum(), [wide[1]])
    assert out.dtype == dtype and grad.dtype == torch.float32
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(grad.double(), expected_grad, atol=tolerance, rtol=tolerance)


def test_no_tokens_give_no_rows_and_zero_gradients():
    out, grads = outcome(run_experts, case("no token"))
    assert out.shape == (0, 20)
    assert [g.shape for g in grads] == [(0, 20), (0, 2), (5, 24, 20), (5, 12, 20)]
    assert not any(g.any() for g in grads)


def test_gradients_have_the_strides_of_their_weights_and_zeros_where_no_token_came():
    x, weights, ids, w13, w2 = case("empty")
    turned = w13.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = each_experts(x, weights, ids, turned, w2)
    grads = torch.autograd.grad(out.sum(), [turned, w2])
    for grad, weight in zip(grads, [turned, w2], strict=True):
        assert grad.stride() == weight.stride()
        assert not grad[4].any() and grad[:4].any()


def moe(seed=0):
    layer = MoE(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.3, generator=generator)
    return layer


def test_the_bias_chooses_but_does_not_weigh():
    layer = moe()
    x_MH = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    scores_ME = torch.sigmoid(x_MH @ layer.gate_EH.T)
    layer.e_score_correction_bias[4] = 10.0  # now chosen by every token
    weights_Mk, experts_Mk = layer.route(x_MH)
    assert bool((experts_Mk == 4).any(1).all())
    chosen_Mk = scores_ME.gather(1, experts_Mk)
    torch.testing.assert_close(weights_Mk, chosen_Mk / chosen_Mk.sum(1, keepdim=True))
    torch.testing.assert_close(weights_Mk.sum(1), torch.ones(50))


def test_the_router_runs_in_float32_in_a_bfloat16_model():
    layer = moe()
    x_MH = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights_Mk, experts_Mk = layer.route(x_MH)
    assert weights_Mk.dtype == torch.float32
    exact_Mk, same_Mk = layer.route(x_MH.float())
    assert torch.equal(weights_Mk, exact_Mk) and torch.equal(experts_Mk, same_Mk)


def test_the_router_learns_and_the_bias_does_not():
    layer = moe()
    layer(torch.randn(9, 20)).square().sum().backward()
    assert layer.gate_EH.grad.abs().max() > 0
    assert "e_score_correction_bias" not in dict(layer.named_parameters())


def test_balancing_evens_the_load():
    layer = moe()
    x_MH = torch.randn(400, 20, generator=torch.Generator().manual_seed(1)) + 0.5

    def largest_share():
        _, experts_Mk = layer.route(x_MH)
        return experts_Mk.flatten().bincount(minlength=5).max().item() / 800

    before = largest_share()
    layer.track_load(True)
    for _ in range(200):
        layer(x_MH)
        layer.balance(0.01)
    assert before > 0.3
    assert largest_share() < 0.23
    layer.track_load(False)
    frozen = layer.e_score_correction_bias.clone()
    layer(x_MH)
    layer.balance(0.01)
    assert torch.equal(frozen, layer.e_score_correction_bias)
