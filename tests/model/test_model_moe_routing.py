"""Routers, replay, load statistics, the auxiliary loss and shared experts, against naive code."""

import json
from dataclasses import replace

import pytest
import torch
from small_model import CONFIG as SMALL
from small_model import make_uneven
from torch.utils.checkpoint import checkpoint

from model.checkpoint import load_model, save_checkpoint
from model.errors import CheckpointError, ModelError
from model.generate import Engine, GenRequest
from model.layout import tensor_shapes
from model.moe import MoE, RoutingTape
from model.native.build import NativeUnavailableError
from model.native.step import NativeModel
from model.packed import PackedModel
from model.transformer import Transformer

SOFT = replace(SMALL, scoring_func="softmax", norm_topk_prob=False, shared_intermediate_size=28)
VARIANTS = {
    "released": SMALL,
    "softmax, weights as they are": SOFT,
    "softmax, normed": replace(SMALL, scoring_func="softmax"),
    "sigmoid, weights as they are": replace(SMALL, norm_topk_prob=False),
    "shared experts": replace(SMALL, shared_intermediate_size=28),
}
LAYERS, EXPERTS, TOP_K = 3, 6, 2


@pytest.fixture(params=VARIANTS)
def config(request):
    return VARIANTS[request.param]


def layer_of(config, seed=0):
    layer = MoE(config, 1).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.3, generator=generator)
        layer.e_score_correction_bias.uniform_(-0.3, 0.3, generator=generator)
    return layer


def model_of(config, seed=0):
    model = make_uneven(Transformer(config, seed=seed), 1, 0.3)
    return model.cast(torch.float64)


def tokens(count, hidden=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, hidden, generator=generator, dtype=torch.float64)


def ids_of(batch=2, time=13, seed=2):
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(seed))


def naive(layer, config, x_MH, chosen=None):
    """One token and one expert at a time, as the papers write it. Scores, choices, output."""
    scores, choices, outs = [], [], []
    for m, x in enumerate(x_MH):
        logits = layer.gate_EH @ x
        if config.scoring_func == "softmax":
            score = logits.exp() / logits.exp().sum()
        else:
            score = 1 / (1 + (-logits).exp())
        rank = (score + layer.e_score_correction_bias).argsort(descending=True)
        choice = rank[:TOP_K].tolist() if chosen is None else chosen[m].tolist()
        total = sum(score[e] for e in choice) if config.norm_topk_prob else 1
        out = sum(score[e] / total * swiglu(x, layer.w13_EOH[e], layer.w2_EIH[e].T) for e in choice)
        if config.shared_intermediate_size:
            out = out + swiglu(x, layer.shared_w13_QH, layer.shared_w2_HS)
        scores.append(score)
        choices.append(sorted(choice))
        outs.append(out)
    return torch.stack(scores), choices, torch.stack(outs)


def swiglu(x, w13, w2):
    half = len(w13) // 2
    gate, value = w13[:half] @ x, w13[half:] @ x
    return w2 @ (gate / (1 + (-gate).exp()) * value)


def test_a_layer_is_what_the_papers_write_with_all_gradients(config):
    layer, x_MH = layer_of(config), tokens(11).requires_grad_()
    leaves = [x_MH, *layer.parameters()]
    assert len(leaves) == (6 if config.shared_intermediate_size else 4)
    _, _, expected = naive(layer, config, x_MH)
    out = layer(x_MH)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    expected_grads = torch.autograd.grad(expected.sin().sum(), leaves)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert expected_grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-10)


def test_a_forced_choice_weighs_anew_and_the_router_keeps_its_gradient(config):
    layer, x_MH = layer_of(config), tokens(9)
    generator = torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in x_MH])
    _, own, _ = naive(layer, config, x_MH)
    assert own != [sorted(c) for c in chosen.tolist()]
    forced_LMk = torch.stack([chosen.flip(0), chosen, chosen]).to(torch.uint8)  # the layer is 1
    out = layer(x_MH, RoutingTape(forced_LMk))
    _, _, expected = naive(layer, config, x_MH, chosen)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    (grad,) = torch.autograd.grad(out.sin().sum(), [layer.gate_EH])
    (expected_grad,) = torch.autograd.grad(expected.sin().sum(), [layer.gate_EH])
    assert expected_grad.abs().max() > 1e-3
    torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-10)


def test_replay_repeats_a_pass_of_other_weights(config):
    first, second = model_of(config), model_of(config, seed=5)
    tape = RoutingTape(keep_choices=True)
    first(ids_of(), tape=tape)
    assert [c.dtype for c in tape.choices] == [torch.uint8] * LAYERS
    again = RoutingTape(torch.stack(tape.choices), keep_choices=True)
    free = RoutingTape(keep_choices=True)
    second(ids_of(), tape=again)
    second(ids_of(), tape=free)
    assert torch.equal(torch.stack(again.choices), torch.stack(tape.choices))
    assert not torch.equal(torch.stack(free.choices), torch.stack(tape.choices))


def test_replaying_its_own_choices_changes_nothing(config):
    model, tape = model_of(config), RoutingTape(keep_choices=True)
    expected = model(ids_of(), tape=tape)
    torch.testing.assert_close(model(ids_of()), expected, atol=0, rtol=0)
    forced = torch.stack(tape.choices).long()
    forced[:, ::3] = -1  # these tokens choose for themselves
    torch.testing.assert_close(model(ids_of(), tape=RoutingTape(forced)), expected)


@pytest.mark.parametrize("counted", [False, True])
def test_load_and_auxiliary_loss_are_their_sums_written_out(config, counted):
    layer, x_MH = layer_of(config), tokens(10)
    times = [0.0, 1.0, 3.0, 2.0, 1.0, 0.0, 5.0, 1.0, 1.0, 4.0] if counted else [1.0] * 10
    tape = RoutingTape(multiplicity_M=torch.tensor(times) if counted else None)
    layer(x_MH, tape)
    scores, choices, _ = naive(layer, config, x_MH)
    load, odds = [0.0] * EXPERTS, [0.0] * EXPERTS
    for score, choice, count in zip(scores, choices, times, strict=True):
        for e in choice:
            load[e] += count
        odds = [p + count * s / score.sum() for p, s in zip(odds, score, strict=True)]
    assert tape.load_LE.tolist() == [load]
    assert sum(load) == TOP_K * sum(times)
    expected = EXPERTS * sum(
        f / sum(load) * p / sum(times) for f, p in zip(load, odds, strict=True)
    )
    torch.testing.assert_close(tape.aux_loss, expected, atol=1e-12, rtol=1e-12)
    (grad,) = torch.autograd.grad(tape.aux_loss, [layer.gate_EH])
    (expected_grad,) = torch.autograd.grad(expected, [layer.gate_EH])
    torch.testing.assert_close(grad, expected_grad, atol=1e-14, rtol=1e-10)


def test_padding_does_not_count():
    model = model_of(SMALL)
    real, padded = ids_of(1, 9), torch.cat([ids_of(1, 9), ids_of(1, 4, seed=8)], dim=1)
    times_M = torch.tensor([1.0] * 9 + [0.0] * 4)
    alone, beside = RoutingTape(), RoutingTape(multiplicity_M=times_M)
    model(real, tape=alone)
    model(padded, tape=beside)
    torch.testing.assert_close(beside.load_LE, alone.load_LE, atol=0, rtol=0)
    torch.testing.assert_close(beside.aux_loss, alone.aux_loss)


def test_the_auxiliary_loss_is_one_where_all_is_even_and_the_mean_over_layers():
    even = RoutingTape()
    scores = torch.full((EXPERTS, EXPERTS), 0.25, dtype=torch.float64)
    even.note(0, scores, torch.stack([torch.arange(EXPERTS), torch.arange(EXPERTS).roll(1)], 1))
    assert even.aux_loss.item() == pytest.approx(1)
    one_sided = torch.zeros(4, EXPERTS, dtype=torch.float64)
    one_sided[:, 3] = 1
    even.note(1, one_sided, torch.full((4, 1), 3))
    assert even.aux_loss.item() == pytest.approx((1 + EXPERTS) / 2)


def test_balance_moves_the_bias_against_the_load_of_a_tape():
    model, tape = model_of(SMALL), RoutingTape()
    model(ids_of(4), tape=tape)
    before = [layer.block_sparse_moe.e_score_correction_bias.clone() for layer in model.layers]
    model.balance(0.01, tape.load_LE)
    for layer, old, load in zip(model.layers, before, tape.load_LE, strict=True):
        moved = layer.block_sparse_moe.e_score_correction_bias - old
        signs = [(load.mean() > n).int() - (load.mean() < n).int() for n in load]
        assert set(map(int, signs)) >= {-1, 1}
        torch.testing.assert_close(moved, 0.01 * torch.tensor(signs, dtype=torch.float64))


def test_recomputed_layers_are_noted_once_and_pass_gradients():
    model = model_of(SMALL)
    plain, again = RoutingTape(keep_choices=True), RoutingTape(keep_choices=True)
    model(ids_of(), tape=plain)
    grads = torch.autograd.grad(plain.aux_loss, model.layers[0].block_sparse_moe.gate_EH)
    for layer in model.layers:
        inner = layer.forward
        layer.forward = lambda *a, inner=inner: checkpoint(inner, *a, use_reentrant=False)
    out = model(ids_of(), tape=again)
    (out.square().mean() + again.aux_loss).backward()
    assert len(again.choices) == LAYERS
    torch.testing.assert_close(again.load_LE, plain.load_LE, atol=0, rtol=0)
    model.zero_grad()
    recomputed = RoutingTape()
    model(ids_of(), tape=recomputed)
    recomputed.aux_loss.backward()
    torch.testing.assert_close(model.layers[0].block_sparse_moe.gate_EH.grad, grads[0])


@pytest.mark.parametrize(
    ("tape", "words"),
    [
        (RoutingTape(torch.zeros(2, 26, 2, dtype=torch.long)), "(3, 26, 2)"),
        (RoutingTape(torch.zeros(3, 26, 2)), "whole numbers"),
        (RoutingTape(torch.full((3, 26, 2), 6)), "expert 6; the model has 6"),
        (RoutingTape(multiplicity_M=torch.ones(25)), "26 tokens"),
    ],
)
def test_a_tape_that_does_not_fit_is_refused(tape, words):
    with pytest.raises(ModelError, match=words.replace("(", r"\(").replace(")", r"\)")):
        model_of(SMALL)(ids_of(), tape=tape)


def test_a_tape_serves_one_pass():
    tape = RoutingTape()
    with pytest.raises(ModelError, match="before a pass wrote it"):
        _ = tape.load_LE
    model = model_of(SMALL)
    model(ids_of(), tape=tape)
    with pytest.raises(ModelError, match="earlier pass"):
        model(ids_of(), tape=tape)


def test_a_variant_survives_its_checkpoint(tmp_path):
    model = make_uneven(Transformer(SOFT, seed=3), 1, 0.3)
    folder = save_checkpoint(model, tmp_path / "a", dtype="float32", tokenizer_from=None)
    written = json.loads((folder / "config.json").read_text())
    assert written["model_type"] == "selfevo_moe"  # the released class must not read it
    again = load_model(folder)
    assert again.config == SOFT
    assert torch.equal(again(ids_of()), model(ids_of()))
    shapes = tensor_shapes(SOFT)
    at = "model.layers.2.block_sparse_moe.shared_experts"
    assert [shapes[f"{at}.{w}.weight"] for w in ("w1", "w3", "w2")] == [
        (28, 48),
        (28, 48),
        (48, 28),
    ]
    # w1 is the gate: exchanged with w3, the model is another.
    block = again.layers[0].block_sparse_moe
    block.shared_w13_QH.data = block.shared_w13_QH.data.roll(28, 0)
    assert not torch.allclose(again(ids_of()), model(ids_of()))


def test_a_checkpoint_without_its_shared_experts_is_refused(tmp_path):
    save_checkpoint(Transformer(SMALL), tmp_path / "a", dtype="float32", tokenizer_from=None)
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(SOFT.to_dict()))
    with pytest.raises(CheckpointError, match=r"shared_experts\.w1\.weight is missing"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "released"])
def test_faster_forward_passes_leave_variants_to_torch(name):
    model = make_uneven(Transformer(VARIANTS[name], seed=0), 1, 0.3)
    with pytest.raises(NativeUnavailableError, match="not of the kind that native code"):
        NativeModel(model)
    assert not PackedModel.suits(model)
    prompt, ids = (5, 17, 40), []
    made = Engine(model).generate([GenRequest(prompt, 40, temperature=0.0)])[0]
    for _ in made.ids:
        ids.append(int(model(torch.tensor([[*prompt, *ids]]))[0, -1].argmax()))
    assert list(made.ids) == ids
