"""Every objective against its formula, in float64; which tokens keep a gradient; denominators."""

import math

import pytest
import torch

from rl.objectives import Tokens, cispo, grpo, ppo_clip, reinforce, shares

LOGP = [-1.0, -2.0, -0.5, -3.0, -0.2]
ROLLOUT = [-1.5, -1.0, -3.0, -3.0, -0.3]
ADVANTAGE = [1.5, -2.0, 0.7, -0.4, 0.0]


def run(objective, advantage=ADVANTAGE, share=0.2):
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    made = [torch.tensor(x, dtype=torch.float64) for x in (ROLLOUT, advantage)]
    tokens = Tokens(logp, *made, torch.full((len(LOGP),), share, dtype=torch.float64))
    terms = objective.loss(tokens)
    terms.loss.backward()
    return terms, logp.grad.tolist()


def ratios():
    return [math.exp(a - b) for a, b in zip(LOGP, ROLLOUT, strict=True)]


def test_cispo_weighs_but_never_drops():
    terms, grad = run(cispo(5.0))
    weight = [min(r, 5.0) for r in ratios()]
    loss = -0.2 * sum(w * a * x for w, a, x in zip(weight, ADVANTAGE, LOGP, strict=True))
    assert terms.loss.item() == pytest.approx(loss, abs=1e-14)
    assert grad == pytest.approx([-0.2 * w * a for w, a in zip(weight, ADVANTAGE, strict=True)])
    assert (terms.capped, terms.weight_max, terms.tokens) == (1, 5.0, 5)


def test_m1s_mask_takes_the_gradient_of_what_has_gone_far_enough():
    _, grad = run(cispo(5.0, mask_low=0.5, mask_high=3.0))
    assert grad[1] == 0.0  # A < 0, r = 0.37 < 1 − 0.5
    assert grad[2] == 0.0  # A > 0, r = 12.2 > 1 + 3
    _, plain = run(cispo(5.0))
    assert [grad[i] == plain[i] for i in (0, 3, 4)] == [True] * 3


@pytest.mark.parametrize("make", [ppo_clip, grpo])
def test_clipping_stops_the_gradient_outside_the_band_on_the_good_side_only(make):
    terms, grad = run(make(0.2, 0.3))
    expected = []
    for r, a in zip(ratios(), ADVANTAGE, strict=True):
        free, held = r * a, max(0.8, min(1.3, r)) * a
        expected.append(-0.2 * r * a if free <= held else 0.0)
    assert grad == pytest.approx(expected)
    assert terms.capped == 3  # 0: 1.65 with A > 0; 1: 0.37 with A < 0; 2: 12.2 with A > 0
    _, other = run(make(0.2, 0.3), advantage=[-a for a in ADVANTAGE])
    assert other[2] == pytest.approx(0.2 * ratios()[2] * 0.7)  # the bad side is not clipped


def test_reinforce_ignores_the_ratio():
    _, grad = run(reinforce())
    assert grad == pytest.approx([-0.2 * a for a in ADVANTAGE])


@pytest.mark.parametrize("objective", [cispo(5.0), ppo_clip(0.2, 0.2), grpo(0.2, 0.2)])
def test_all_are_reinforce_where_nothing_has_moved(objective):
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(ADVANTAGE, dtype=torch.float64)
    share = torch.full((5,), 0.2, dtype=torch.float64)
    terms = objective.loss(Tokens(logp, logp.detach().clone(), a, share))
    terms.loss.backward()
    assert torch.allclose(logp.grad, -0.2 * a, atol=1e-15)
    assert (terms.kl_max, terms.weight_sum) == (0.0, 5.0)


def test_ratios_are_bounded_before_exp():
    far = torch.tensor([-500.0], dtype=torch.float64)
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    for objective in (cispo(1e30), ppo_clip(0.2, 0.2)):
        assert objective.loss(Tokens(logp, far, -one, one)).weight_max == pytest.approx(
            math.exp(20)
        )


def test_shares_add_up_to_one_over_any_split():
    lengths = torch.tensor([3, 1, 4])
    whole = shares(lengths, "token", 8, 3)
    assert whole.tolist() == [0.125] * 8
    sequence = shares(lengths, "sequence", 8, 3)
    assert sequence.sum() == pytest.approx(1.0)
    assert sequence.tolist() == pytest.approx([1 / 9] * 3 + [1 / 3] + [1 / 12] * 4)
    parts = [shares(part, "sequence", 8, 3) for part in (lengths[:1], lengths[1:])]
    assert torch.equal(torch.cat(parts), sequence)


def test_the_start_line_names_band_anchor_and_denominator():
    for objective in (cispo(5.0, 0.5, 3.0), ppo_clip(0.2, 0.28), grpo(0.2, 0.2), reinforce()):
        assert objective.text.startswith(objective.name)
        assert "anchor: recorded" in objective.text and "denominator" in objective.text
    assert "[0, 5]" in cispo(5.0).text and "[0.8, 1.28]" in ppo_clip(0.2, 0.28).text


def test_no_tokens_are_no_loss():
    nothing = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.float64)
    terms = cispo(5.0).loss(Tokens(nothing, empty, empty, empty))
    assert terms.loss.item() == 0.0 and terms.tokens == 0
