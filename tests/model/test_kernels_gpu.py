"""On a CUDA device: the fused passes between products against plain torch in float32."""

import pytest
import torch
import torch.nn.functional as F

from model import attention_kernels, loss_kernels
from model.attention import rms_norm, rotate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: needs a CUDA device"),
]


def close(got, expected, tolerance):
    assert (got.float() - expected.float()).norm() <= tolerance * expected.float().norm() + 1e-6


@pytest.mark.parametrize("tokens", [1, 77, 3000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("heads", "keys", "size", "half"), [(24, 4, 128, 32), (3, 1, 24, 12)])
def test_norms_and_rotation(tokens, dtype, tolerance, heads, keys, size, half):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    columns = (heads + 2 * keys) * size
    made = [draw(tokens, columns), draw(heads * size), draw(keys * size)]
    qkv, q_weight, k_weight = (x.to(dtype).requires_grad_() for x in made)
    angle = draw(tokens, half)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    assert attention_kernels.suits(qkv)
    got = attention_kernels.norm_rotate(qkv, q_weight, k_weight, cos, sin, size, 1e-6)
    wide = [x.detach().float().requires_grad_() for x in (qkv, q_weight, k_weight)]
    q, k, v = torch.split(wide[0], [heads * size, keys * size, keys * size], -1)
    turn = (cos.float()[:, None], sin.float()[:, None])
    expected = (
        rotate(rms_norm(q, wide[1], 1e-6).view(tokens, heads, size), *turn).flatten(1),
        rotate(rms_norm(k, wide[2], 1e-6).view(tokens, keys, size), *turn).flatten(1),
        v,
    )
    grads = [draw(*x.shape).to(dtype) for x in got]
    mine = torch.autograd.grad(got, (qkv, q_weight, k_weight), grads)
    theirs = torch.autograd.grad(expected, wide, [g.float() for g in grads])
    for a, b in zip((*got, *mine), (*expected, *theirs), strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("piece", [7, 1000])
@pytest.mark.parametrize("vocabulary", [61, 9000])
def test_scores_of_the_output_head(piece, vocabulary):
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(40, 64, generator=generator, device="cuda").bfloat16().requires_grad_()
    head = torch.randn(vocabulary, 64, generator=generator, device="cuda")
    head = (head * 0.3).bfloat16().requires_grad_()
    target = torch.randint(vocabulary, (40,), generator=generator, device="cuda")
    scale = torch.rand(40, generator=generator, device="cuda") + 0.5
    assert loss_kernels.suits(x, head)
    logp, entropy = loss_kernels.head_scores(x, head, target, scale, piece)
    table = F.log_softmax(x.float() @ head.float().t() / scale[:, None], -1)
    expected = table.gather(1, target[:, None])[:, 0]
    close(logp, expected.detach(), 1e-5)
    close(entropy, -(table.exp() * table).sum(-1).detach(), 1e-4)
    grad = torch.randn(40, generator=generator, device="cuda")
    mine = torch.autograd.grad(logp, (x, head), grad)
    theirs = torch.autograd.grad(expected, (x, head), grad)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 1e-2)
