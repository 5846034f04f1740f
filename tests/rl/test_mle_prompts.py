"""What the policy reads: descriptions, scaffolds, results, and the script in its reply."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mle_tasks import facts

from agent_tools.errors import UserError
from rl.envs.mle.prompts import (
    Scaffold,
    describe,
    extract_script,
    load_scaffold,
    one_line,
    result_text,
    task_messages,
    turn_message,
)


def test_a_description_is_short_words_about_kind_metric_and_columns() -> None:
    task = facts("regression", "rmsle", rows=1000, numeric=6, categorical=3, levels=8)
    assert describe(replace(task, skew_or_balance=1.61)) == (
        "task regression metric rmsle lower is better rows 1000 numeric 6 categorical 3 text 0 "
        "levels 8 missing 0.00 skew 1.5 time no"
    )
    classes = facts("multiclass", "accuracy", rows=384, classes=9, missing=0.12, time=True)
    assert describe(replace(classes, skew_or_balance=0.09)) == (
        "task multiclass metric accuracy higher is better rows 400 numeric 3 categorical 0 text 0 "
        "levels 0 missing 0.10 classes 9 balance 0.10 time yes"
    )


@pytest.mark.parametrize(
    ("metric", "word"),
    [("auc", "higher"), ("accuracy", "higher"), ("logloss", "lower"), ("mae", "lower")],
)
def test_a_description_says_which_way_is_better(metric: str, word: str) -> None:
    assert f"metric {metric} {word} is better" in describe(facts("binary", metric))


def test_near_tasks_read_alike_and_extremes_stay_short() -> None:
    one = facts(rows=960, missing=0.01, skew_or_balance=-0.1)
    assert describe(one) == describe(facts(rows=1040, missing=0.0, skew_or_balance=0.1))
    assert "skew 5.0" in describe(facts(skew_or_balance=80.0))
    assert "skew 0.0" in describe(facts(skew_or_balance=-0.2))


def test_messages_are_the_scaffold_and_the_description() -> None:
    messages = task_messages(facts(), Scaffold(system="Be brief ."))
    assert messages == [
        {"role": "system", "content": "Be brief ."},
        {"role": "user", "content": describe(facts())},
    ]
    assert len(task_messages(facts())[0]["content"].split()) < 20


def test_a_scaffold_folder_is_read_and_its_absence_is_the_default(tmp_path: Path) -> None:
    assert load_scaffold(None) == Scaffold()
    (tmp_path / "system.md").write_text("Write python .\n")
    assert load_scaffold(tmp_path) == Scaffold(system="Write python .")
    (tmp_path / "turns.md").write_text("got {result}\n")
    (tmp_path / "sampling.yaml").write_text("temperature: 0.6\nturns: 2\n")
    scaffold = load_scaffold(tmp_path)
    assert scaffold == Scaffold("Write python .", "got {result}", 0.6, 2)
    message = turn_message(scaffold, "error: {braces} stay")
    assert message == {"role": "user", "content": "got error: {braces} stay"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("system.md", "  \n", "missing or empty"),
        ("system.md", "x" * 5000, "below 4000"),
        ("turns.md", "no place", "lacks {result}"),
        ("sampling.yaml", "temperatur: 1", "unknown key 'temperatur'"),
        ("sampling.yaml", "temperature: 3", "from 0.0 to 2.0"),
        ("sampling.yaml", "temperature: yes please", "from 0.0 to 2.0"),
        ("sampling.yaml", "turns: 0", "1 to 16"),
        ("sampling.yaml", "turns: 1.5", "1 to 16"),
        ("sampling.yaml", "- 1", "not a mapping"),
        ("sampling.yaml", "a: 1\nb: [", "line"),
    ],
)
def test_a_broken_scaffold_names_file_and_repair(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / "system.md").write_text("Write python .")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        load_scaffold(tmp_path)
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_scaffold_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_scaffold(tmp_path / "none")


def test_a_result_is_a_score_or_the_last_line_of_the_fault() -> None:
    assert result_text(0.41234, 36.6, "") == "score 0.412 percentile 37"
    fault = "Traceback\n  File x\nValueError: bad \x1b[31mred\n\n"
    assert result_text(None, 0.0, fault) == "error: ValueError: bad [31mred"
    assert result_text(None, 0.0, "") == "error: no valid submission.csv"
    assert len(one_line("y" * 999)) == 160


@pytest.mark.parametrize(
    "reply",
    [
        "x = 1\ny = 2",
        "\n\nx = 1\ny = 2\n",
        "Here it is:\n```python\nx = 1\ny = 2\n```\nDone.",
        "```\nx = 1\ny = 2\n```",
        "```py\nfirst = 0\n```\nbetter:\n```Python\nx = 1\ny = 2\n```",
        "```python\nx = 1\ny = 2",
    ],
)
def test_the_script_is_found_in_plain_and_fenced_replies(reply: str) -> None:
    assert extract_script(reply) == "x = 1\ny = 2"
