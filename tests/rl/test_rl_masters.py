"""Mixed precision: float32 masters behind bfloat16 weights."""

from pathlib import Path

import torch

from model.transformer import Transformer
from rl.config import OptimSection
from rl.masters import MasterAdamW
from rl.trainer import Sample, Trainer
from tests.rl.test_rl_cispo import CONFIG

NANO = Path(__file__).parents[2] / "model" / "checkpoints" / "nano"
SAMPLES = [
    Sample((5, 6, 7), (8, 9, 10, 11), (-3.0, -3.1, -2.9, -3.0), advantage=1.0),
    Sample((5, 6), (12, 13, 14), (-3.0, -3.2, -3.0), advantage=-0.5),
    Sample((1,), (2, 3), (-3.0, -3.0), advantage=0.25),
]
HOW = {"lr": 1e-5, "is_weight_max": 5.0, "temperature": 1.0}


def short_model():
    return Transformer(CONFIG, seed=0).cast(torch.bfloat16)


def trainer_of(model, micro_batch=8):
    return Trainer(model, OptimSection(warmup_steps=0, micro_batch=micro_batch))


def test_steps_too_small_for_a_bfloat16_weight_still_add_up():
    model = short_model()
    before = model.norm.weight.detach().clone()  # all ones: the next bfloat16 is 2⁻⁷ away
    trainer = trainer_of(model)
    for _ in range(3):
        trainer.cispo_update(SAMPLES, **HOW)
    assert torch.equal(model.norm.weight, before)
    index = [name for name, _ in model.named_parameters()].index("norm.weight")
    moved = trainer._optimizer.masters[index] - 1
    assert moved.abs().max() > 2e-5


def test_weights_are_the_rounded_masters_and_the_router_its_own():
    model = short_model()
    trainer = trainer_of(model)
    trainer.cispo_update(SAMPLES, **HOW | {"lr": 1e-2})
    named = list(model.named_parameters())
    for (name, weight), master in zip(named, trainer._optimizer.masters, strict=True):
        assert master.dtype == torch.float32
        assert (weight is master) == name.endswith("gate_EH")
        assert torch.equal(weight, master.to(weight.dtype))
        assert weight.grad is None and master.grad is None


def test_a_gradient_in_pieces_is_added_up_in_float32():
    ones = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([ones], OptimSection(grad_clip=1e9))
    for factor in (256.0, 1.0):  # 257 is no bfloat16
        (ones * factor).sum().backward()
    assert optimizer.masters[0].grad.tolist() == [257.0] * 3
    assert float(optimizer.clip()) == torch.full((3,), 257.0).norm()


def test_float32_steps_equal_torch_adamw():
    models = [Transformer(CONFIG, seed=0) for _ in range(2)]
    optim = OptimSection(warmup_steps=0, weight_decay=0.1, lr=1e-3)
    ours = MasterAdamW(list(models[0].parameters()), optim)
    groups = [
        {"params": [p for p in models[1].parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in models[1].parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=optim.betas, eps=optim.eps)
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        for model in models:
            model(ids).square().mean().backward()
        ours.clip()
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), optim.grad_clip)
        ours.step(1e-3)
        theirs.step()
        ours.forget()
        theirs.zero_grad()
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_saved_masters_go_on_bit_for_bit(tmp_path):
    trainer = trainer_of(short_model())
    trainer.cispo_update(SAMPLES, **HOW)
    options = {"tokenizer_from": NANO, "with_state": True, "metadata": {}}
    trainer.save(tmp_path, {}, **options)
    other = trainer_of(short_model())
    other.load(tmp_path)
    for each in (trainer, other):
        each.cispo_update(SAMPLES, **HOW)
    for a, b in zip(trainer._optimizer.masters, other._optimizer.masters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
