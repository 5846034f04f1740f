"""On a CUDA device: compiled flex attention by our block masks, rings, and both in a model."""

import copy
from dataclasses import replace

import pytest
import torch
from small_model import CONFIG as SMALL
from small_model import make_uneven
from torch.utils.checkpoint import checkpoint
from trees import random_calls, tree_of

from model.config import FULL, WINDOW
from model.generate import Engine, GenRequest, Row
from model.running import RunningBatch
from model.scoring import score_tokens
from model.transformer import Transformer
from model.visible import Visibility, VisibleAttend, row_visibility

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: needs a CUDA device"),
]

HYBRID = replace(SMALL, attn_type_list=(WINDOW, FULL, WINDOW), sliding_window=37, num_sink_tokens=3)
WINDOW_LAYER, FULL_LAYER = 0, 1


def on_gpu(made):
    return Visibility(made.tout_M.cuda(), made.depth_M.cuda())


def qkv(tokens, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]


def with_gradients(attend, layer, inputs):
    """Output and the gradients of a loss in which every number counts."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(layer, *inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    (out * weight.to(out)).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("layer", [FULL_LAYER, WINDOW_LAYER], ids=["full", "window"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("kind", ["tree", "rows", "one"])
def test_flex_equals_the_dense_rule_in_float64(kind, dtype, tolerance, layer):
    made = {
        "tree": tree_of(random_calls(1, 12, 120, 6)).visibility,
        "rows": row_visibility([300, 1, 129, 511, 40]),
        "one": row_visibility([640]),
    }[kind]
    inputs = qkv(len(made), dtype)
    mine = with_gradients(VisibleAttend(on_gpu(made), HYBRID), layer, [x.cuda() for x in inputs])
    wanted = with_gradients(VisibleAttend(made, HYBRID), layer, [x.double() for x in inputs])
    for a, b in zip(mine, wanted, strict=True):
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()


def test_another_length_compiles_nothing():
    for first in (True, False):
        stance = "default" if first else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            for tokens in (512,) if first else (5, 130, 700, 1024, 2048):
                made = row_visibility([tokens // 2, tokens - tokens // 2], "cuda")
                attend = VisibleAttend(made, HYBRID)
                for layer in (FULL_LAYER, WINDOW_LAYER):
                    with_gradients(attend, layer, [x.cuda() for x in qkv(tokens)])


def test_memory_grows_with_the_tokens_alone():
    def peak(tokens):
        attend = VisibleAttend(row_visibility([tokens], "cuda"), HYBRID)
        inputs = [x.cuda() for x in qkv(tokens)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for layer in (FULL_LAYER, WINDOW_LAYER):
            with_gradients(attend, layer, inputs)
        return torch.cuda.max_memory_allocated() - before

    peak(1000)
    small, large = peak(20_000), peak(40_000)
    assert large < 2.3 * small
    assert large < 40_000**2 / 4  # a dense boolean mask alone is four times that


def test_a_model_on_a_tree_equals_the_cpu_with_and_without_checkpoints():
    model = make_uneven(Transformer(HYBRID, seed=0), 0, 0.2)
    made = tree_of(random_calls(3, 8, 40, 5))

    def gradients(policy, remade):
        device = policy.device
        visibility = on_gpu(made.visibility) if device.type == "cuda" else made.visibility
        attend = VisibleAttend(visibility, HYBRID)
        cos, sin = policy.rotary[:, visibility.depth_M].unsqueeze(2)
        x = policy.embed_tokens[made.ids_M.to(device)]
        for layer in policy.layers:
            if remade:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        used = [policy.embed_tokens, *policy.layers.parameters()]
        found = torch.autograd.grad(policy.norm(x).square().sum(), used)
        return [grad.cpu() for grad in found]

    wanted = gradients(model, False)
    policy = copy.deepcopy(model).cuda()
    for remade in (False, True):
        for a, b in zip(gradients(policy, remade), wanted, strict=True):
            assert (a - b).norm() < 1e-3 * b.norm() + 1e-6


def test_scores_of_rows_with_shared_beginnings_equal_the_cpu():
    model = Transformer(HYBRID, seed=0)
    rows = [[1, 2, 3, 4, 5] * 8 + [i] * (5 + i) for i in range(6)] + [[7] * 30]
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    lengths_B = torch.tensor([len(row) for row in rows])
    wanted = score_tokens(model, ids_BT, lengths_B).logp_BT
    policy = copy.deepcopy(model).cuda()
    mine = score_tokens(policy, ids_BT.cuda(), lengths_B.cuda()).logp_BT
    torch.testing.assert_close(mine.detach().cpu(), wanted.detach(), atol=1e-4, rtol=0)


def test_rings_on_the_gpu_equal_rescoring():
    model = Transformer(HYBRID, seed=0)
    policy = copy.deepcopy(model).cuda()
    prompts = [tuple((7 * i + j) % 61 for j in range(n)) for i, n in enumerate((3, 50, 70, 9))]
    asked = [GenRequest(p, 40 + i, seed=i) for i, p in enumerate(prompts * 2)]
    engine = Engine(policy)
    made = [(g.ids, g.logprobs) for g in engine.generate(asked)]
    batch = RunningBatch(engine)
    rows = [Row(request) for request in asked]
    batch.join(rows[:5])
    batch.step()
    batch.join(rows[5:])
    while batch.running:
        batch.step()
    made += [(row.ids, row.logprobs) for row in rows]
    for request, (ids, logprobs) in zip(asked * 2, made, strict=True):
        text = torch.tensor([[*request.prompt_ids, *ids]])
        logp_BT = score_tokens(model, text, torch.tensor([text.shape[1]])).logp_BT
        wanted = logp_BT[0, len(request.prompt_ids) :].detach()
        torch.testing.assert_close(torch.tensor(logprobs), wanted, atol=1e-4, rtol=0)
