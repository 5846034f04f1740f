"""Parameters and FLOPs of the study against real modules and a count of pairs."""

from dataclasses import replace

import pytest
import torch

from model.errors import ModelError
from model.mtp import MTP
from model.study.costs import module_parameters, parameters, plan, row_flops, visible_pairs
from model.study.variants import SIZES, STUDIES, VARIANTS, layer_kinds
from model.transformer import Transformer
from model.window import reach_of
from tests.model.study_helpers import TINY


@pytest.mark.parametrize("name", ["base", "fine-shared", "hybrid-5to1-sink", "mtp-3"])
def test_parameters_are_those_of_the_modules(name: str) -> None:
    planned = plan(TINY, VARIANTS[name])
    model = Transformer(planned.config)
    total = sum(p.numel() for p in model.parameters())
    assert parameters(planned.config, active=False) == total
    if planned.variant.mtp:
        modules = MTP(planned.config, planned.variant.mtp)
        more = sum(p.numel() for p in modules.parameters())
        assert planned.variant.mtp * module_parameters(planned.config, active=False) == more
        total += more
    assert planned.parameters == total


def test_pairs_are_those_that_attention_sees() -> None:
    config = plan(TINY, VARIANTS["hybrid-5to1-sink"]).config
    place = torch.arange(TINY.context)
    causal = place <= place[:, None]
    for layer in range(TINY.layers):
        seen = causal & reach_of(config, layer).sees(place[:, None], place)
        assert visible_pairs(config, layer, TINY.context) == int(seen.sum())


def test_flops_of_a_small_model_by_hand() -> None:
    config = plan(TINY, VARIANTS["base"]).config
    d, time = TINY.hidden, TINY.context
    attention = d * (2 * 32 + 2 * 16) + 32 + 16
    block = attention + 2 * d + 4 * d + 2 * 3 * d * 16
    linear = 6 * block + d + 2048 * d
    assert row_flops(config, time) == 6 * linear * time + 6 * 12 * 32 * time * (time + 1) // 2


def test_flops_of_a_run_are_those_of_its_steps() -> None:
    half = replace(VARIANTS["converted-5to1"], convert_at=0.5)
    planned = plan(replace(TINY, steps=8), half)
    rows, time, full = TINY.rows, TINY.context, plan(TINY, VARIANTS["base"]).config
    short = 2 * 2 * rows * row_flops(full, time // 2)  # two steps, rows cut in two
    before, after = 2 * rows * row_flops(full, time), 4 * rows * row_flops(planned.config, time)
    assert planned.flops == pytest.approx(short + before + after, rel=1e-12)


def test_matched_variants_cost_the_same() -> None:
    size = SIZES["gpu"]
    full = plan(size, VARIANTS["base"])
    wide = plan(size, VARIANTS["hybrid-5to1-wide"])
    assert wide.tokens == full.tokens and abs(wide.flops / full.flops - 1) < 0.01
    module, longer = (plan(size, VARIANTS[name]) for name in ("mtp-1", "base-longer"))
    assert abs(longer.flops / module.flops - 1) < 0.01 and longer.config == full.config
    for coarse, fine in (("base", "fine"), ("fine", "fine-shared")):
        a, b = plan(size, VARIANTS[coarse]), plan(size, VARIANTS[fine])
        assert a.tokens == b.tokens and abs(a.flops / b.flops - 1) < 0.03  # a wider router
        assert abs(a.parameters / b.parameters - 1) < 0.01


def test_layouts_end_with_full_attention() -> None:
    assert layer_kinds("5:1", 6) == (2, 2, 2, 2, 2, 1)
    assert layer_kinds("1:1", 6) == (2, 1, 2, 1, 2, 1)
    with pytest.raises(ModelError, match="does not divide"):
        layer_kinds("3:1", 6)


def test_every_study_compares_variants_that_exist() -> None:
    assert {name for names in STUDIES.values() for name in names} == set(VARIANTS)
    with pytest.raises(ModelError, match="16 windows"):
        replace(TINY, window=9)
