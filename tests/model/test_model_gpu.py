"""On a CUDA device: captured steps, grouped products and training scores agree with a CPU."""

import copy

import pytest
import torch

from model.config import PRESETS
from model.experts import loop_experts, sorted_experts
from model.generate import Engine, GenRequest, Row
from model.running import RunningBatch
from model.scoring import score_tokens, token_logprobs
from model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: needs a CUDA device"),
]


@pytest.fixture(scope="module")
def policy():
    return Transformer(PRESETS["nano"], seed=0)


def requests(count=19):
    generator = torch.Generator().manual_seed(5)
    prompts = [
        tuple(torch.randint(0, 2048, (n,), generator=generator).tolist()) for n in (9, 3, 14)
    ]
    return [
        GenRequest(prompts[i % 3], 30 + i, seed=i, stop_ids=frozenset(range(i)))
        for i in range(count)
    ]


def batch_of(asked, generated):
    rows = [[*r.prompt_ids, *g.ids] for r, g in zip(asked, generated, strict=True)]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return ids_BT, torch.tensor([len(row) for row in rows])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_captured_generation_equals_rescoring(policy, dtype, tolerance):
    model = copy.deepcopy(policy).cast(dtype).cuda()
    engine, asked = Engine(model), requests()
    first, second = engine.generate(asked), engine.generate(asked)
    assert [g.ids for g in first] == [g.ids for g in second]
    assert len(engine._graphs) == 1
    ids_BT, lengths_B = batch_of(asked, first)
    with torch.no_grad():
        logp_BT = token_logprobs(model, ids_BT.cuda(), lengths_B.cuda()).cpu()
    for i, (request, generation) in enumerate(zip(asked, first, strict=True)):
        start = len(request.prompt_ids)
        expected = logp_BT[i, start : start + len(generation.ids)]
        got = torch.tensor(generation.logprobs)
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_weights_changed_in_place_are_seen_by_a_captured_step(policy):
    model = copy.deepcopy(policy).cuda()
    engine, asked = Engine(model), requests()
    before = engine.generate(asked)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    after = engine.generate(asked)
    fresh = Engine(model).generate(asked)
    assert [g.ids for g in after] == [g.ids for g in fresh] != [g.ids for g in before]


def test_scores_and_gradients_equal_the_cpu(policy):
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 2048, (4, 60), generator=generator)
    lengths_B = torch.tensor([60, 33, 5, 48])
    grads = []
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(policy).to(device)
        scores = score_tokens(model, ids_BT.to(device), lengths_B.to(device))
        scores.logp_BT.sum().backward()
        grads.append([p.grad.cpu() for p in model.parameters()])
    for cpu, cuda in zip(*grads, strict=True):
        assert (cpu - cuda).norm() < 1e-3 * cpu.norm() + 1e-6


@pytest.mark.parametrize("kind", ["padded", "grouped"])
def test_experts_on_the_gpu(kind):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind == "grouped" else torch.float32
    shapes = [(300, 64), (300, 2), (8, 64, 64), (8, 32, 64)]
    made = [torch.randn(s, generator=generator) * 0.3 for s in shapes]
    x, weights, w13, w2 = (t.to("cuda", dtype).requires_grad_() for t in made)
    ids = torch.stack([torch.randperm(7, generator=generator)[:2] for _ in range(300)]).cuda()
    out = sorted_experts(x, weights, ids, w13, w2, kind)
    wide = [t.detach().double().requires_grad_() for t in (x, weights, w13, w2)]
    expected = loop_experts(wide[0], wide[1], ids, wide[2], wide[3])
    tolerance = 0.05 if kind == "grouped" else 1e-4
    assert (out - expected).norm() < tolerance * expected.norm()
    mine = torch.autograd.grad(out.square().sum(), (x, weights, w13, w2))
    theirs = torch.autograd.grad(expected.square().sum(), wide)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() < tolerance * b.norm()


def test_a_running_batch_on_the_gpu_equals_rescoring(policy):
    model = copy.deepcopy(policy).cuda()
    batch = RunningBatch(Engine(model))
    rows = [Row(request) for request in requests()]
    waiting, steps = list(rows), 0
    while waiting or batch.running:
        batch.join(waiting[:5] if steps % 7 == 0 else [])
        waiting = waiting[5:] if steps % 7 == 0 else waiting
        batch.step()
        steps += 1
    for row in rows:
        ids = torch.tensor([[*row.request.prompt_ids, *row.ids]])
        with torch.no_grad():
            logp_BT = token_logprobs(model, ids.cuda(), torch.tensor([ids.shape[1]]).cuda()).cpu()
        expected = logp_BT[0, len(row.request.prompt_ids) :]
        torch.testing.assert_close(torch.tensor(row.logprobs), expected, atol=1e-4, rtol=0)
