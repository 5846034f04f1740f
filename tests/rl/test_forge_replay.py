"""Routing replay: the engine's experts, repeated by the trainer through merged calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rl_fakes import tiny_checkpoint

from model.checkpoint import load_model
from model.moe import RoutingTape
from model.transformer import Transformer
from rl.errors import RecordError
from rl.forge.replay import ReplayedPacks, experts_of
from rl.objectives import cispo
from rl.samples import Sample
from rl.types import CallRecord


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    path = tiny_checkpoint(tmp_path_factory.mktemp("replay") / "start")
    return load_model(path, dtype=torch.float64)


def record(number: int, experts: object = None) -> CallRecord:
    prompt, response = (3, 20, 21, 22), (30 + number, 31, 32, 33, 34)
    return CallRecord(
        f"g0-{number}.0", 0, 0, prompt, response, (-1.0,) * 5, ((0, 5, 0),), "stop", 0.0, 1.0,
        routed_experts=experts,  # type: ignore[arg-type]
    )  # fmt: skip


def choices(model: Transformer, call: CallRecord) -> tuple[tuple[int, ...], ...]:
    """The experts that the model itself would take, a row of layers × k a token but the last."""
    from model.attention import CausalAttend

    ids = torch.tensor(call.prompt_ids + call.response_ids)[:-1]
    tape = RoutingTape(keep_choices=True)
    position = torch.arange(len(ids))
    with torch.no_grad():
        model.run(ids, position, CausalAttend(model.config, 1, len(ids)), tape)
    rows_LMk = torch.stack([torch.as_tensor(x) for x in tape.choices]).long()
    return tuple(map(tuple, rows_LMk.transpose(0, 1).flatten(1).tolist()))


def gradients(model: Transformer, calls: list[CallRecord]) -> dict[str, torch.Tensor]:
    packs = ReplayedPacks(model.config)
    packs.remember(calls)
    samples = [
        Sample(c.prompt_ids, c.response_ids, c.logprobs, 1.0 - i) for i, c in enumerate(calls)
    ]
    model.zero_grad()
    packs(model, samples, cispo(5.0), 1.0, 64)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_choice_that_the_trainer_would_make_changes_nothing(model: Transformer) -> None:
    calls = [record(0), record(1)]
    free = gradients(model, calls)
    whole = [replace(c, routed_experts=choices(model, c)) for c in calls]
    answer_only = [replace(c, routed_experts=choices(model, c)[3:]) for c in calls]
    for forced in (gradients(model, whole), gradients(model, answer_only)):
        for name, gradient in free.items():
            assert torch.allclose(forced[name], gradient, rtol=0, atol=1e-12), name


def test_another_choice_is_repeated_and_the_router_keeps_its_gradient(model: Transformer) -> None:
    calls = [record(0), record(1)]
    experts = model.config.num_local_experts
    other = [
        replace(c, routed_experts=tuple(
            tuple((e + 1) % experts for e in row) for row in choices(model, c)))
        for c in calls
    ]  # fmt: skip
    free, forced = gradients(model, calls), gradients(model, other)
    router = [n for n in free if n.endswith("gate_EH")]
    assert router and all(bool(forced[n].abs().max() > 0) for n in router)
    assert any(not torch.allclose(forced[n], free[n], rtol=1e-3) for n in router)


def test_experts_that_do_not_fit_are_refused(model: Transformer) -> None:
    width = model.config.num_hidden_layers * model.config.num_experts_per_tok
    rows = ((0,) * width,) * 9
    assert experts_of(record(0, rows), model.config).shape == (8, width)
    assert (experts_of(record(0, rows[:4]), model.config)[:4] == -1).all()
    for wrong in (((0,) * (width + 1),) * 8, ((0,) * width,) * 10, ((99,) * width,) * 8):
        with pytest.raises(RecordError, match=r"call 0 of episode g0-0\.0: its experts"):
            experts_of(record(0, wrong), model.config)
    packs = ReplayedPacks(model.config)
    assert packs.remember([record(0, rows), record(1)]) == 0.5
    assert packs.remember([]) == 0.0
