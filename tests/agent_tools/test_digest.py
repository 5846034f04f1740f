"""The digest's text, scale and size."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_tools.wandb_logs import DEFAULT_KEYS, RunHistory, digest
from agent_tools.wandb_logs.digest import level, number, short_names, spark

NAMES = {
    "reward", "valid_frac", "truncated_frac", "timeout_frac", "entropy", "grad_norm", "weight_max",
    "lr",
}  # fmt: skip
KEYWORDS = {"run", "steps", "done", "first", "last", "best", "peak", "spark", "mark", "also"}


def history(columns: dict[str, list[float]], state: str = "done") -> RunHistory:
    length = max(len(values) for values in columns.values())
    rows = [
        {"step": i + 1, **{key: values[i] for key, values in columns.items() if i < len(values)}}
        for i in range(length)
    ]
    return RunHistory(rows, state=state)


def tokens(text: str) -> int:
    """An upper bound: a known word or digit is one token, others two, a number one a character
    pair (the bundled tokenizer splits at white space and has seen digests)."""
    count = text.count("\n")
    for word in text.split():
        if word in NAMES | KEYWORDS or re.fullmatch(r"[0-9x-]", word):
            count += 1
        elif re.fullmatch(r"[-0-9.e@]+", word):
            count += math.ceil(len(word) / 2) + 1
        else:
            count += 3
    return count


BAD_RUN = {
    "reward/mle/mean": [0.404, 0.431, 0.25, 0.1, 0.0612],
    "rollout/valid_frac": [0.833, 0.875, 0.5, 0.17, 0.125],
    "rollout/truncated_frac": [0, 0, 0.04, 0.1, 0.208],
    "rollout/timeout_frac": [0.0, 0.0, 0.0, 0.0, 0.0],
    "policy/entropy": [0.195, 0.2, 0.35, 0.5, 0.611],
    "policy/grad_norm": [0.088, 0.09, 0.7, 1.2, 3.1],
    "loss/cispo/weight_max": [1.0, 1.0 + 1e-6, 1 - 1e-6, 1.0, 1.0],
    "optim/lr": [3e-3] * 5,
}


def test_the_text_of_a_bad_run():
    assert digest(history(BAD_RUN)).text == (
        "run done steps 5\n"
        "reward first 0.404 last 0.0612 best 0.431@2 spark 4 4 2 1 0 mark reward_falling\n"
        "valid_frac first 0.833 last 0.125 best 0.875@2 spark 8 8 5 1 1 mark valid_falling\n"
        "truncated_frac first 0 last 0.208 spark 0 0 0 1 2\n"
        "timeout_frac first 0 last 0 spark 0 0 0 0 0\n"
        "entropy first 0.195 last 0.611 spark 4 4 5 5 5 mark entropy_rising\n"
        "grad_norm first 0.0880 last 3.10 peak 3.10@5 spark 2 2 4 5 6 mark grad_high\n"
        "weight_max first 1.00 last 1.00 peak 1.00@2 spark 5 5 5 5 5\n"
        "lr first 0.00300 last 0.00300 spark 7 7 7 7 7 mark lr_high"
    )


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.4123, "0.412"), (0.9996, "1.00"), (1.0, "1.00"), (12.34, "12.3"), (123.4, "123"),
        (999.9, "1.00e3"), (1234.0, "1.23e3"), (3e-4, "3.00e-4"), (0.001, "0.00100"),
        (0.0009999, "0.00100"), (-0.05, "-0.0500"), (0.0, "0"), (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value, word):
    assert number(value) == word


@given(st.floats(-1e307, 1e307))
def test_a_number_word_reads_back_to_three_digits(value):
    assert float(number(value)) == pytest.approx(value, rel=0.00501, abs=0)


@pytest.mark.parametrize(
    ("key", "value", "digit"),
    [
        ("optim/lr", 1e-5, "2"), ("optim/lr", 1e-4, "4"), ("optim/lr", 3e-4, "5"),
        ("optim/lr", 1e-3, "6"), ("optim/lr", 3e-3, "7"), ("optim/lr", 1e-2, "8"),
        ("loss/cispo/weight_max", 1.0 - 1e-6, "5"), ("loss/cispo/weight_max", 1.0 + 1e-6, "5"),
        ("loss/cispo/weight_max", 0.9, "4"), ("loss/cispo/weight_max", 5.0, "8"),
        ("rollout/valid_frac", 0.0, "0"), ("rollout/valid_frac", 1.0, "9"),
        ("rollout/valid_frac", 0.8, "8"), ("policy/entropy", 0.2, "4"),
        ("policy/entropy", 0.0, "0"),
        ("policy/grad_norm", 1e9, "9"), ("policy/grad_norm", -1.0, "0"),
        ("perf/step_s", 5.0, "5"), ("perf/step_s", math.nan, "x"), ("perf/step_s", math.inf, "x"),
    ],
)  # fmt: skip
def test_the_sparks_scale_is_fixed(key, value, digit):
    assert level(key, value, 0.0, 10.0) == digit


def test_a_long_run_has_ten_digits_and_shows_a_late_divergence():
    run = history({
        "policy/grad_norm": [0.08] * 996 + [90.0] + [0.08] * 3,
        "policy/entropy": [0.2] * 500 + [math.nan] + [0.2] * 499,
        "rollout/valid_frac": [0.85] * 400,
    })  # fmt: skip
    assert spark(run, "policy/grad_norm") == list("2222222229")
    assert spark(run, "policy/entropy") == list("44444x4444")
    assert spark(run, "rollout/valid_frac") == list("8888------")


def test_a_key_that_was_not_logged_is_left_out_and_hidden_findings_are_named():
    run = history({"rollout/valid_frac": [0.9] * 4, "group/zero_std_frac": [0.8] * 4})
    assert digest(run).text == (
        "run done steps 4\n"
        "valid_frac first 0.900 last 0.900 best 0.900@1 spark 9 9 9 9\n"
        "also zero_groups"
    )


def test_an_empty_run_and_too_many_keys():
    assert digest(RunHistory([], state="failed")).text == "run failed steps 0"
    with pytest.raises(ValueError, match="at most 8"):
        digest(RunHistory([]), keys=[f"k{i}" for i in range(9)])


def test_names_are_short_unless_two_keys_share_one():
    assert short_names(["a/x", "b/x", "optim/lr"]) == {
        "a/x": "a/x", "b/x": "b/x", "optim/lr": "lr",
    }  # fmt: skip


VALUES = st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 1e-300, -1e308, 1e308]))


@given(
    st.dictionaries(
        st.sampled_from([*DEFAULT_KEYS, "group/zero_std_frac", "mismatch_kl/mean", "other"]),
        st.lists(VALUES, min_size=1, max_size=25),
        min_size=1,
    ),
    st.randoms(use_true_random=False),
)
def test_any_series_gives_a_small_digest_that_ignores_the_order_of_keys(columns, random):
    result = digest(history(columns))
    shuffled = list(columns)
    random.shuffle(shuffled)
    assert digest(history({key: columns[key] for key in shuffled})) == result
    assert tokens(result.text) <= 300
    assert len(result.text.splitlines()) <= 10
    assert all(line == " ".join(line.split()) for line in result.text.splitlines())
