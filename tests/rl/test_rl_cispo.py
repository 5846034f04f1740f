"""CISPO, the optimiser step and the log-probs on both sides."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from rl_fakes import tiny_checkpoint

from model.checkpoint import load_model
from model.config import ModelConfig
from model.generate import Engine
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from rl import objectives
from rl.config import OptimSection
from rl.engine import Cohort
from rl.errors import DivergedError
from rl.objectives import Tokens
from rl.trainer import Sample, Trainer

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rotary_dim=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.3,
)


def cispo_terms(logp_BT, rollout_BT, advantage_B, mask_BT, ceiling, denominator):  # type: ignore[no-untyped-def]
    """`objectives.cispo` over the masked tokens of rows."""
    logp_n = logp_BT[mask_BT]
    advantage_n = advantage_B[:, None].expand_as(mask_BT)[mask_BT].to(logp_n.dtype)
    share_n = torch.full_like(logp_n, 1 / denominator, requires_grad=False)
    tokens = Tokens(logp_n, rollout_BT[mask_BT], advantage_n, share_n)
    return objectives.cispo(ceiling).loss(tokens)


def terms(logp: torch.Tensor, rollout: torch.Tensor, advantage: torch.Tensor, ceiling: float = 5.0):  # type: ignore[no-untyped-def]
    mask = torch.ones_like(logp, dtype=torch.bool)
    return cispo_terms(logp, rollout, advantage, mask, ceiling, logp.numel())


def test_closed_form_and_gradient_only_through_the_log_prob() -> None:
    logp = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], dtype=torch.float64, requires_grad=True)
    rollout = torch.tensor([[-1.5, -1.0], [-3.0, -3.0]], dtype=torch.float64)
    advantage = torch.tensor([1.5, -2.0], dtype=torch.float64)
    out = terms(logp, rollout, advantage)
    weight = [[math.exp(0.5), math.exp(-1.0)], [5.0, 1.0]]  # exp(2.5) = 12.2 is capped
    value = -sum(
        w * a * lp
        for row, a, lps in zip(weight, (1.5, -2.0), logp.tolist(), strict=True)
        for w, lp in zip(row, lps, strict=True)
    )
    assert out.loss.item() == pytest.approx(value / 4, abs=1e-14)
    out.loss.backward()
    expected = -torch.tensor(weight, dtype=torch.float64) * advantage[:, None] / 4
    assert torch.allclose(logp.grad, expected, atol=1e-15, rtol=0)
    assert out.capped == 1 and out.tokens == 4
    assert out.weight_max == 5.0


def test_tokens_above_the_ceiling_keep_their_gradient() -> None:
    logp = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    terms(logp, torch.tensor([[-9.0]], dtype=torch.float64), torch.tensor([1.0])).loss.backward()
    assert float(logp.grad) == pytest.approx(-5.0)


def test_the_ceiling_is_inclusive() -> None:
    ratio = torch.tensor([[0.0]], dtype=torch.float64)
    assert terms(ratio, ratio.clone(), torch.ones(1), ceiling=1.0).capped == 0


def test_there_is_no_floor() -> None:
    logp = torch.tensor([[-12.0]], dtype=torch.float64, requires_grad=True)
    terms(logp, torch.tensor([[-2.0]], dtype=torch.float64), torch.tensor([1.0])).loss.backward()
    assert float(logp.grad) == pytest.approx(-math.exp(-10.0), rel=1e-12)


def test_ratio_is_bounded_before_exp() -> None:
    out = terms(torch.tensor([[0.0]]), torch.tensor([[-500.0]]), torch.ones(1), ceiling=1e30)
    assert out.weight_max == pytest.approx(math.exp(20.0), rel=1e-5)


def test_masked_tokens_may_hold_nan() -> None:
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    rollout = torch.tensor([[float("nan"), -2.0]])
    mask = torch.tensor([[False, True]])
    out = cispo_terms(logp, rollout, torch.ones(1), mask, 5.0, 1)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(2.0)
    assert logp.grad.tolist() == [[0.0, -1.0]]


def test_description_names_band_anchor_and_denominator() -> None:
    text = objectives.cispo(5.0).text
    assert all(word in text for word in ("[0, 5]", "recorded", "optimiser step", "no floor"))


# ------------------------------------------------------------------ the optimiser step


def samples(model: Transformer, count: int = 7) -> list[Sample]:
    """Rows of different lengths with recorded log-probs that differ from the model's own."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        prompt, response = 2 + i % 3, 3 + (5 * i) % 7
        ids = torch.randint(0, 40, (prompt + response,), generator=generator).tolist()
        noise = torch.randn(response, generator=generator, dtype=torch.float64)
        rows.append(
            Sample(
                tuple(ids[:prompt]),
                tuple(ids[prompt:]),
                tuple((-3.6 + noise).tolist()),
                (-1.0) ** i * (1 + i),
            )
        )
    return rows


def gradient(rows: list[Sample], micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Flat gradient of one step, read where the optimiser would use it."""
    model = Transformer(CONFIG, seed=1).cast(torch.float64)
    trainer = Trainer(model, OptimSection(micro_batch=micro_batch))
    seen: list[torch.Tensor] = []

    def note(loss: float, lr: float) -> float:
        del loss, lr
        seen.extend(p.grad.flatten().clone() for p in model.parameters())
        model.zero_grad()
        return 0.0

    monkeypatch.setattr(trainer, "_step", note)
    trainer.cispo_update(rows, lr=1.0, is_weight_max=2.0, temperature=0.8)
    return torch.cat(seen)


def test_any_micro_batch_split_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samples(Transformer(CONFIG))
    whole = gradient(rows, 100, monkeypatch)
    for size in (1, 2, 3, 5):
        assert (gradient(rows, size, monkeypatch) - whole).abs().max() < 1e-12
    assert whole.abs().max() > 1e-3


def test_gradient_equals_the_naive_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = samples(Transformer(CONFIG))
    model = Transformer(CONFIG, seed=1).cast(torch.float64)
    total = sum(len(s.response_ids) for s in rows)
    loss = torch.zeros((), dtype=torch.float64)
    for s in rows:
        ids = torch.tensor([*s.prompt_ids, *s.response_ids])[None]
        logp = torch.log_softmax(model(ids)[0] / 0.8, dim=-1)
        for t, (token, recorded) in enumerate(zip(s.response_ids, s.logprobs, strict=True)):
            mine = logp[len(s.prompt_ids) + t - 1, token]
            weight = min(math.exp(mine.item() - recorded), 2.0)
            loss = loss - weight * s.advantage * mine / total
    loss.backward()
    naive = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient(rows, 3, monkeypatch) - naive).abs().max() < 1e-12


def test_positive_advantage_makes_its_tokens_likelier() -> None:
    model = Transformer(CONFIG, seed=1)
    trainer = Trainer(model, OptimSection(warmup_steps=0))
    row = samples(model)[0]
    up = Sample(row.prompt_ids, row.response_ids, row.logprobs, 1.0)
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])

    def likelihood() -> float:
        logp = torch.log_softmax(model(ids)[0], dim=-1)
        start = len(row.prompt_ids)
        return float(sum(logp[start + t - 1, token] for t, token in enumerate(row.response_ids)))

    before = likelihood()
    trainer.cispo_update([up], lr=1e-3, is_weight_max=5.0, temperature=1.0)
    assert likelihood() > before


def test_non_finite_recorded_log_probs_are_masked_and_counted() -> None:
    model = Transformer(CONFIG, seed=1)
    trainer = Trainer(model, OptimSection())
    rows = samples(model)
    bad = Sample(rows[0].prompt_ids, rows[0].response_ids, (math.nan, *rows[0].logprobs[1:]), 1.0)
    stats = trainer.cispo_update([bad, *rows[1:]], lr=1e-3, is_weight_max=5.0, temperature=1.0)
    assert stats.nonfinite == 1
    assert stats.tokens == sum(len(s.response_ids) for s in rows) - 1
    assert math.isfinite(stats.loss)
    worse = [Sample(s.prompt_ids, s.response_ids, (math.nan,) * len(s.response_ids)) for s in rows]
    with pytest.raises(DivergedError):
        trainer.cispo_update(worse, lr=1e-3, is_weight_max=5.0, temperature=1.0)


def test_warm_up_is_linear_then_constant() -> None:
    trainer = Trainer(Transformer(CONFIG), OptimSection(warmup_steps=4))
    rates = [trainer.warmup(step, 1.0) for step in (1, 2, 3, 4, 5, 50)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_optimiser_is_as_the_paper_has_it() -> None:
    options = Trainer(Transformer(CONFIG), OptimSection())._optimizer.groups[0]
    assert (options["betas"], options["eps"]) == ((0.9, 0.95), 1e-15)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_sampled_log_probs_agree_with_the_trainers_forward(
    tmp_path: Path, temperature: float
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "start")
    model, tokenizer = load_model(checkpoint), Tokenizer.load(checkpoint)
    cohort = Cohort(Engine(model), tokenizer, 3, lambda: None)
    replies = {}

    def member(i: int) -> None:
        text = "x " * (3 * i + 1)
        replies[i] = cohort.client(i).chat(
            [{"role": "user", "content": text}], temperature=temperature, max_tokens=20, seed=i
        )
        cohort.leave()

    threads = [threading.Thread(target=member, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    cohort.drive()
    rows = [
        Sample(r.prompt_ids, r.response_ids, r.logprobs, 1.0) for _, r in sorted(replies.items())
    ]
    trainer = Trainer(model, OptimSection())
    stats = trainer.cispo_update(rows, lr=1e-9, is_weight_max=5.0, temperature=temperature)
    # k3 = exp(d) − 1 − d ≈ d²/2: a difference of 1e-4 would give 5e-9
    assert stats.kl_max < 5e-9
    assert stats.weight_max == pytest.approx(1.0, abs=1e-4)
    wrong = Trainer(load_model(checkpoint), OptimSection()).cispo_update(
        rows, lr=1e-9, is_weight_max=5.0, temperature=temperature + 0.5
    )
    assert wrong.kl_max > 1e-4
