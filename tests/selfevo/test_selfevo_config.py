"""Configuration: errors that name key, line and nearest known key; steps inside their range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfevo.config import (
    ConfigError,
    KeySpec,
    edit_fault,
    load_eval,
    load_lab_config,
    load_space,
    one_step,
)
from selfevo.lab import TEMPLATE, parse_lab, read_lab

SPACE = load_space((TEMPLATE / "search_space.yaml").read_text())


def test_template_is_valid_and_its_run_has_every_key() -> None:
    files = read_lab(TEMPLATE)
    assert files.lab.agent.kind == "model" and files.evaluation.train_seeds == 2


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("agent: {knd: model}", "agent.kind"),
        ("roundz: 3", "rounds"),
        ("budget: {step: 4}", "budget.steps"),
    ],
)
def test_unknown_key_names_the_nearest(text: str, known: str) -> None:
    with pytest.raises(ConfigError, match="nearest known key is '" + known + "'"):
        load_lab_config(text)


def test_unknown_key_of_a_search_space_entry_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'keys\.a\.stepp'.*'keys\.a\.step'"):
        load_space("keys: {a: {type: float, min: 0, max: 1, stepp: 2}}")


def test_yaml_syntax_error_names_the_line() -> None:
    with pytest.raises(ConfigError, match=r"selfevo\.yaml line 4"):
        load_lab_config("rounds: 2\nreview: auto\nagent: {kind: model\n  x: [\n")


def test_space_key_that_the_run_lacks_is_refused() -> None:
    space = "keys: {optim.lrr: {type: float, min: 0, max: 1}}"
    with pytest.raises(Exception, match=r"optim\.lrr is not in .*nearest there is optim\.lr"):
        parse_lab("{}", space, "{}", "optim: {lr: 0.1}")


def test_one_seed_an_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_seeds"):
        load_eval("train_seeds: 1")


def test_one_step_mends_the_documented_bad_setting() -> None:
    for bad in (1e-3, 3e-3):
        assert one_step(SPACE.keys["optim.lr"], bad, "decrease") == pytest.approx(bad / 10)


def test_choice_moves_one_place_and_stops_at_the_ends() -> None:
    spec = SPACE.keys["rollout.group_size"]
    assert one_step(spec, 8, "increase") == 12
    assert one_step(spec, 12, "increase") == 12
    assert one_step(spec, 4, "decrease") == 4


@given(
    st.sampled_from([k for k, s in SPACE.keys.items() if s.type != "choice"]),
    st.floats(0, 1),
    st.sampled_from(["increase", "decrease"]),
)
def test_one_step_is_always_an_allowed_edit(key: str, place: float, direction: str) -> None:
    spec = SPACE.keys[key]
    assert spec.min is not None and spec.max is not None
    value: float = spec.min + place * (spec.max - spec.min)
    if spec.type == "int":
        value = round(value)
    after = one_step(spec, value, direction)
    assert edit_fault(spec, value, after) is None
    assert after >= value if direction == "increase" else after <= value


@pytest.mark.parametrize(
    ("key", "before", "after", "word"),
    [
        ("optim.lr", 3e-3, 1e-5, "largest step"),
        ("optim.lr", 3e-3, 0.5, "must lie in"),
        ("optim.lr", 3e-3, float("nan"), "finite"),
        ("optim.lr", 3e-3, True, "number"),
        ("optim.lr", 3e-3, "3e-4", "number"),
        ("optim.warmup_steps", 1, 2.5, "whole number"),
        ("optim.warmup_steps", 1, 50, "largest step"),
        ("rollout.group_size", 8, 10, "one of"),
        ("rollout.temperature", 1.0, 0.3, "largest step"),
    ],
)
def test_edit_outside_type_range_or_step_is_refused(
    key: str, before: float, after: object, word: str
) -> None:
    assert word in (edit_fault(SPACE.keys[key], before, after) or "")


def test_incomplete_key_specs_are_refused() -> None:
    for bad in (
        {"type": "float"},
        {"type": "choice", "values": [1]},
        {"type": "float", "min": 1, "max": 2, "scale": "log", "step": 1},
    ):
        with pytest.raises(ValueError, match=r"needs"):
            KeySpec.model_validate(bad)
