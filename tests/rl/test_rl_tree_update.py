"""Gradients of one optimiser step over merged, cut and plain packs, against one pass a call that is
written here from the definitions."""

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rl_tree_scores import DENSE, MOE, WINDOWS

from model.moe import RoutingTape
from model.transformer import Transformer
from rl.backward import backward_rows
from rl.config import OptimSection
from rl.objectives import cispo, grpo, ppo_clip, reinforce
from rl.trainer import Sample, Trainer
from rl.tree_update import backward_packs

TEMPERATURE = 0.7
OBJECTIVES = {
    "cispo": (cispo(1.05), lambda r, a, lp: torch.clamp(r.detach(), max=1.05) * a * lp),
    "ppo_clip": (ppo_clip(0.1, 0.2), lambda r, a, lp: torch.min(r * a, r.clamp(0.9, 1.2) * a)),
    "grpo": (grpo(0.1, 0.2), lambda r, a, lp: torch.min(r * a, r.clamp(0.9, 1.2) * a)),
    "reinforce": (reinforce(), lambda r, a, lp: a * lp),
}


@dataclass(frozen=True)
class One:
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    advantage: float


def forest(seed, turns=18):
    """Several trees: dialogues `turns` deep with siblings, equal calls, one call that is a prefix
    of another, forks at the first token of a response, a response of one token and an empty one,
    a token trained in two calls, and calls that share nothing."""
    rng = random.Random(seed)

    def draw(count):
        return tuple(rng.randrange(23) for _ in range(count))

    def call(prompt, response):
        recorded = tuple(rng.uniform(-4.5, -1.5) for _ in response)
        return One(prompt, response, recorded, rng.choice([-1.0, 1.0]) * rng.uniform(0.2, 2.0))

    calls = []
    for tree in range(2):
        history = (tree, *draw(2))
        for turn in range(turns if tree == 0 else 3):
            answer = draw(2)
            calls.append(call(history, answer))
            if turn % 4 == 0:
                calls.append(call(history, draw(3)))  # forks at the first token
                calls.append(call(history, (answer[0], *draw(2))))  # forks at the second
                calls.append(call(history, answer))  # equal ids, other advantage and log-probs
                calls.append(call((*history, *answer[:1]), answer[1:]))  # trained in two calls
            history = history + answer + draw(1)
        calls.append(call(history[:4], history[4:9]))  # a prefix of the calls above
        calls.append(call(history[:-2], ()))
    calls += [call((20 + i, *draw(3)), draw(4)) for i in range(3)]
    rng.shuffle(calls)
    return calls


def one_pass_a_call(model, calls, objective, forced=None):
    """Loss, gradients, entropy and expert load by definition."""
    made, part = OBJECTIVES[objective]
    trained = [[math.isfinite(x) for x in c.logprobs] for c in calls]
    tokens = sum(map(sum, trained))
    used = sum(any(t) for t in trained)
    loss, entropy, load = 0.0, 0.0, 0
    for index, c in enumerate(calls):
        if not c.response_ids:
            continue
        ids = torch.tensor([*c.prompt_ids, *c.response_ids])
        tape = RoutingTape(None if forced is None else forced[index])
        table = F.log_softmax(model(ids[None, :-1], tape=tape)[0] / TEMPERATURE, -1)
        load = load + tape.load_LE
        for t, (target, recorded) in enumerate(zip(c.response_ids, c.logprobs, strict=True)):
            if not trained[index][t]:
                continue
            row = table[len(c.prompt_ids) - 1 + t]
            ratio = (row[target] - recorded).exp()
            share = 1 / tokens
            if made.reduction == "sequence":
                share = 1 / (used * sum(trained[index]))
            loss = loss - share * part(ratio, c.advantage, row[target])
            entropy = entropy - float((row.exp() * row).sum().detach())
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return float(loss.detach()), grads, entropy, load


def check(model, calls, objective, tolerance, forced=None, **how):
    loss, grads, entropy, load = one_pass_a_call(model, calls, objective, forced)
    sums = backward_packs(
        model, calls, OBJECTIVES[objective][0], TEMPERATURE, count_load=True, **how
    )
    assert sums.loss == pytest.approx(loss, rel=tolerance, abs=tolerance)
    assert sums.entropy_sum == pytest.approx(entropy, rel=10 * tolerance)
    assert torch.equal(sums.load_LE, load)
    scale = max(float(g.norm()) for g in grads)
    for (name, p), theirs in zip(model.named_parameters(), grads, strict=True):
        assert p.grad is not None, name
        error = float((p.grad - theirs).norm())
        assert error <= tolerance * max(float(theirs.norm()), 0.01 * scale), name
    model.zero_grad()
    return sums


PLANS = [
    ("always", "carry", 10_000),
    ("always", "carry", 48),
    ("always", "carry", 7),  # shorter than any call: every path is cut, some several times
    ("always", "repeat", 96),
    ("never", "carry", 10_000),
    ("never", "carry", 64),
    ("auto", "auto", 80),
]


@pytest.fixture
def strands_always(monkeypatch):
    """Packs as small as these take a mask; here strands are made to cost nothing."""
    monkeypatch.setattr("model.tree_attend.STRAND_PAIRS", 0)
    monkeypatch.setattr("rl.tree_update.STRAND_PAIRS", 0)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("config", [DENSE, MOE, WINDOWS], ids=["dense", "moe", "windows"])
def test_every_plan_gives_the_gradients_of_one_pass_a_call(config, plan, strands_always):
    merge, split, budget = plan
    model = Transformer(config, seed=1).double()
    calls = forest(budget)
    sums = check(
        model,
        calls,
        "cispo",
        1e-12,
        merge=merge,
        split=split,
        budget=budget,
    )
    assert sums.plan.merged == (merge != "never")
    pieces = [piece for pieces in sums.plan.pieces for piece in pieces]
    assert all(len(piece.own_M) <= budget for piece in pieces)
    if budget <= 48:
        assert sums.plan.open_tokens > 0 and len(pieces) >= 3
    assert sums.capped > 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
def test_random_forests(seed, dtype, tolerance):
    model = Transformer((DENSE, MOE)[seed % 2], seed=seed).cast(dtype)
    name = sorted(OBJECTIVES)[seed % 4]
    budget = random.Random(seed).choice([9, 20, 33, 70, 500])
    merge = "always" if seed % 3 else "auto"
    check(model, forest(seed), name, tolerance, budget=budget, merge=merge)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective(name):
    model = Transformer(DENSE, seed=2).double()
    check(model, forest(5, turns=6), name, 1e-12, budget=40, merge="always")


def test_unusable_log_probs_leave_numerator_and_denominator():
    model = Transformer(MOE, seed=2).double()
    calls = [
        replace(c, logprobs=(math.nan, *c.logprobs[1:])) if i % 7 == 0 and c.logprobs else c
        for i, c in enumerate(forest(4, turns=6))
    ]
    lost = sum(not math.isfinite(x) for c in calls for x in c.logprobs)
    for name in ("cispo", "grpo"):
        sums = check(model, calls, name, 1e-12, budget=50)
        assert sums.nonfinite == lost > 0


def test_parts_of_a_step_add_up():
    model = Transformer(MOE, seed=3).double()
    calls = forest(6, turns=5)
    objective = OBJECTIVES["grpo"][0]
    backward_packs(model, calls, objective, TEMPERATURE, 60)
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    step = {
        "step_tokens": sum(len(c.response_ids) for c in calls),
        "step_calls": sum(bool(c.response_ids) for c in calls),
    }
    for part in (calls[:9], calls[9:]):
        backward_packs(model, part, objective, TEMPERATURE, 60, **step)
    for p, theirs in zip(model.parameters(), whole, strict=True):
        assert (p.grad - theirs).norm() <= 1e-12 * max(1, theirs.norm())


@pytest.mark.parametrize("budget", [12, 500])
def test_replayed_experts_are_part_of_what_is_compared(budget):
    """Calls with equal ids and other recorded experts are different tokens; calls without a record
    choose for themselves, also when their path is computed twice."""
    model = Transformer(MOE, seed=4).double()
    calls = forest(8, turns=6)
    rng = np.random.default_rng(0)
    routed = []
    for index, c in enumerate(calls):
        tokens = len(c.prompt_ids) + len(c.response_ids) - 1
        rows = np.stack([rng.permutation(6)[:2] for _ in range(2 * tokens)]).reshape(tokens, 4)
        if index % 3 == 0:
            rows = np.tile([[0, 1, 2, 3]], (tokens, 1))  # alike in several calls
        routed.append(None if index % 5 == 0 else rows)
    forced = [
        None if r is None else torch.from_numpy(r).view(-1, 2, 2).transpose(0, 1).contiguous()
        for r in routed
    ]
    check(model, calls, "cispo", 1e-12, forced, budget=budget, merge="always", routed=routed)


def test_merging_is_given_up_where_nothing_is_shared():
    model = Transformer(DENSE, seed=2).double()
    calls = [One((i, 1, 2), (3, 4, 5), (-1.0,) * 3, 1.0) for i in range(20)]
    sums = check(model, calls, "cispo", 1e-12, budget=30)
    assert not sums.plan.merged
    assert sums.figures["tree/ratio_vs_calls"] == 1.0


def test_refusals():
    model = Transformer(DENSE, seed=2)
    good = One((1, 2), (3,), (-1.0,), 1.0)
    objective = cispo(5.0)
    with pytest.raises(ValueError, match="call 1: 1 response ids and 0 log-probs"):
        backward_packs(model, [good, replace(good, logprobs=())], objective, 1.0, 10)
    with pytest.raises(ValueError, match="a budget of 0 tokens"):
        backward_packs(model, [good], objective, 1.0, 0)
    with pytest.raises(ValueError, match="call 0: labels of shape"):
        backward_packs(model, [good], objective, 1.0, 10, routed=[np.zeros((1, 2), np.int64)])
    with pytest.raises(ValueError, match="5 numbers a token; the model has 2 layers of 1"):
        backward_packs(model, [good], objective, 1.0, 10, routed=[np.zeros((2, 5), np.int64)])
    empty = backward_packs(model, [replace(good, response_ids=(), logprobs=())], objective, 1.0, 9)
    assert empty.tokens == 0


def test_a_trainer_takes_it_in_the_place_of_rows():
    """Two updates with minibatches of real samples move the weights alike either way."""
    samples = [
        Sample(c.prompt_ids, c.response_ids, c.logprobs, c.advantage)
        for c in forest(3, turns=5)
        if c.response_ids
    ]
    ends = []
    for backward, budget in ((backward_rows, 5), (backward_packs, 60)):
        model = Transformer(MOE, seed=3).double()
        trainer = Trainer(model, OptimSection(updates_per_batch=2), backward, budget)
        stats = trainer.update(samples, cispo(1.05), lr=1e-3, temperature=TEMPERATURE)
        ends.append([p.detach() for p in model.parameters()])
    assert stats.figures["tree/ratio_vs_calls"] > 1
    for mine, theirs in zip(*ends, strict=True):
        assert (mine - theirs).abs().max() < 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [60, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_on_cuda(dtype, budget):
    """Compiled flex attention, with and without carried keys, against float64 on the processor.
    Small models in bfloat16 choose other experts here and there: a dense one bounds it."""
    config = replace(MOE if dtype == torch.float32 else DENSE, head_dim=16, rotary_dim=8)
    calls = forest(2)
    exact = Transformer(config, seed=1).cast(dtype).double()
    loss, grads, _, _ = one_pass_a_call(exact, calls, "cispo")
    model = Transformer(config, seed=1).cast(dtype).to("cuda")
    made, _ = OBJECTIVES["cispo"]
    sums = backward_packs(model, calls, made, TEMPERATURE, budget, merge="always", split="carry")
    assert (sums.plan.open_tokens > 0) == (budget == 60)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert sums.loss == pytest.approx(loss, abs=tolerance)
    scale = max(float(g.norm()) for g in grads)
    for (name, p), theirs in zip(model.named_parameters(), grads, strict=True):
        error = float((p.grad.double().cpu() - theirs).norm())
        assert error <= tolerance * max(float(theirs.norm()), 0.01 * scale), name
