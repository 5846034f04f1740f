"""Training, measuring and logging of the study, on models of a few thousand parameters."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.errors import ModelError
from model.study.batches import Batches, heldout_rows, repeats, row_starts
from model.study.costs import plan
from model.study.log import append, claim, read_log, recipe_of
from model.study.measure import load_spread, measure
from model.study.run import run_all, run_one
from model.study.train import Masters, losses, new_model, rate_at, stepper, train
from model.study.variants import STUDIES, VARIANTS
from tests.model.study_helpers import TINY, make_corpus

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_trains_and_is_measured(name: str) -> None:
    corpus, planned = make_corpus(), plan(replace(TINY, steps=2), VARIANTS[name])
    trained = train(planned, corpus, 0, CPU)
    found = json.loads(json.dumps(measure(planned, corpus, trained)))
    assert set(found["loss"]) == {"c", "d"}
    targets = sum(sum(part["n"]) for part in found["loss"].values())
    assert targets == len(heldout_rows(TINY, corpus).text) * (TINY.context - 1)
    nats = sum(sum(part["nats"]) for part in found["loss"].values())
    assert 5 < nats / targets < 12
    assert all(sum(part["n"]) > 0 for part in found["probes"].values())
    assert found["load"]["max_violation"] > 0
    assert len(found["modules"]) == planned.variant.mtp


def test_variants_of_a_seed_read_the_same_rows() -> None:
    corpus = make_corpus()
    short, long = (Batches(TINY, corpus, 5, steps, CPU) for steps in (3, 6))
    other = Batches(TINY, corpus, 6, 3, CPU)
    for step in range(3):
        assert torch.equal(short[step].ids_BT, long[step].ids_BT)
        assert torch.equal(short[step].weight_BT, long[step].weight_BT)
        assert not torch.equal(short[step].ids_BT, other[step].ids_BT)


def test_rows_cover_the_text_before_they_come_again() -> None:
    starts = row_starts(1000, 100, 24, seed=0)
    first = np.sort(starts[:9])
    assert (np.diff(first) == 100).all()
    assert starts.min() >= 0 and starts.max() + 100 <= 1000


@pytest.mark.parametrize("step", [0, 1])  # short rows, whole rows
def test_the_loss_counts_text_and_answers_once_each(step: int) -> None:
    planned, corpus = plan(TINY, VARIANTS["base"]), make_corpus()
    model, _ = new_model(planned, 0, CPU)
    batch = Batches(TINY, corpus, 0, 4, CPU)[step]
    rows = (TINY.rows - TINY.probe_rows) * (1 if step else TINY.short_parts)
    assert batch.ids_BT.numel() == TINY.rows * TINY.context and batch.text_rows == rows
    text, answers = losses(model, model.hidden(batch.ids_BT), batch)
    logits_BTV = model(batch.ids_BT).double()
    expected = F.cross_entropy(
        logits_BTV[:rows, :-1].flatten(0, 1), batch.ids_BT[:rows, 1:].flatten()
    )
    assert abs(text.item() - expected.item()) < 1e-5
    row, column = (batch.weight_BT[rows:] > 0).nonzero(as_tuple=True)
    picked = F.cross_entropy(logits_BTV[rows:][row, column - 1], batch.ids_BT[rows:][row, column])
    assert abs(answers.item() - picked.item()) < 1e-5


def test_conversion_starts_from_full_attention() -> None:
    corpus = make_corpus()
    size = replace(TINY, steps=6)
    seen = {}
    for name in ("base", "converted-5to1", "hybrid-5to1"):
        half_way = 0.5 if name == "converted-5to1" else 0.0
        planned = plan(size, replace(VARIANTS[name], convert_at=half_way))
        model, modules = new_model(planned, 0, CPU)
        steps = stepper(planned, Batches(size, corpus, 0, 6, CPU), model, modules)
        seen[name] = [round(text.item(), 5) for text, _ in steps]
    assert seen["converted-5to1"][:3] == seen["base"][:3]
    assert seen["converted-5to1"][3] != seen["base"][3]
    assert seen["hybrid-5to1"][0] != seen["base"][0]


def test_masters_move_where_short_weights_would_round_the_step_away() -> None:
    weight = nn.Parameter(torch.full((4, 4), 1.0, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.full((4, 4), 1.0))
    short, exact = Masters([weight]), Masters([wide])
    for _ in range(8):
        for parameter, masters in ((weight, short), (wide, exact)):
            parameter.grad = torch.ones_like(parameter)
            masters.step(1e-3)
    assert torch.equal(short.masters[0], wide)
    assert torch.equal(weight, wide.bfloat16()) and weight[0, 0] < 1


def test_the_rate_warms_up_stays_and_falls() -> None:
    size = replace(TINY, rate=1.0, warmup=0.1, decay=0.4)
    rates = [rate_at(size, step, 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:60] == [1.0] * 51
    assert rates[61] < 1 and 0.05 < rates[99] < 0.1
    assert rates == sorted(rates[:10]) + rates[10:61] + sorted(rates[61:], reverse=True)


def test_repeats_name_the_last_occurrence() -> None:
    words = [9, 10, 11, 12]
    ids = np.array([*words, *range(20, 30), *words, *range(30, 40)], dtype=np.uint16)
    found = repeats(ids, window=8)
    assert found[17] == 1  # 14 tokens back: over one window, at most two
    assert (np.delete(found, 17) == -1).all()


def test_load_spread_of_known_loads() -> None:
    even, one = [1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]
    assert load_spread(np.array([even])) == {"cv": 0.0, "max_violation": 0.0}
    found = load_spread(np.array([even, one]))
    assert found == {"cv": round(3**0.5 / 2, 4), "max_violation": 1.5}


def test_what_a_log_has_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, corpus, size = tmp_path / "log.jsonl", make_corpus(), replace(TINY, steps=1)
    names = list(STUDIES["granularity"])
    assert run_all(size, corpus, names[:1], [0], CPU, log) == 1
    with log.open("a") as file:
        file.write('{"variant": "fi')  # a writer that was killed
    assert run_all(size, corpus, names, [0, 1], CPU, log) == 3
    lines = read_log([log])
    assert [(line["variant"], line["seed"]) for line in lines] == [
        ("base", 0),
        ("fine", 0),
        ("base", 1),
        ("fine", 1),
    ]
    assert log.read_text().count("\n") == 4
    assert run_all(size, corpus, names, [0, 1], CPU, log) == 0
    assert run_all(replace(size, steps=2), corpus, names[:1], [0], CPU, log) == 1


def test_a_claimed_run_is_left_to_its_process(tmp_path: Path) -> None:
    log, corpus, planned = tmp_path / "log.jsonl", make_corpus(), plan(TINY, VARIANTS["base"])
    with claim(log, recipe_of(planned, corpus), 0) as ours:
        assert ours
        child = os.fork()
        if not child:
            os._exit(int(run_one(planned, corpus, 0, CPU, log)))
        assert os.waitpid(child, 0)[1] == 0
    assert not log.exists()


def test_a_line_in_the_middle_must_be_whole(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append(log, {"recipe": "r", "seed": 0})
    log.write_text('{"broken\n' + log.read_text())
    with pytest.raises(ModelError, match=r"log\.jsonl:1: not a line"):
        read_log([log])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    planned = plan(replace(TINY, rate=1e30, steps=12), VARIANTS["base"])
    with pytest.raises(ModelError, match="lower the size's rate"):
        train(planned, make_corpus(), 0, CPU)
