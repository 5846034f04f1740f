"""Metrics against scikit-learn, the medal rule for every N, and hostile submissions."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from agent_tools.mle_bench import grading, medals
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.metrics import METRICS, InvalidSubmissionError, grade_with
from agent_tools.mle_bench.registry import Competition

FACTS = TaskFacts("regression", "rmse", 3, 1, 0, 0, 0, 0.0, 0, 0.0, False)
SPEECH = "agent_tools.mle_bench.competitions.vowel-speaker.grade:grade"
TWEETS = "agent_tools.mle_bench.competitions.tweet-sentiment.grade:grade"
REVIEWS = "agent_tools.mle_bench.competitions.food-reviews.grade:grade"


def competition(
    folder: Path, answers: str, grade_fn: str = TWEETS, board: tuple[float, ...] = ()
) -> Competition:
    """A competition whose private answers are the given CSV text."""
    private = folder / "private"
    private.mkdir(parents=True, exist_ok=True)
    (private / "test.csv").write_text(answers)
    lower = grade_fn != REVIEWS
    return Competition(
        id="made-up",
        split="val",
        strata="table",
        metric="rmse",
        lower_is_better=lower,
        grade_fn=grade_fn,
        public_dir=folder / "public",
        private_dir=private,
        dev_public_dir=None,
        dev_private_dir=None,
        leaderboard=board
        or tuple(float(n) for n in (range(1, 101) if lower else range(100, 0, -1))),
        dev_leaderboard=None,
        description="",
        facts=FACTS,
    )


# --- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_regression_metrics_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true, predicted = rng.gamma(2, 3, (200, 1)), rng.gamma(2, 3, (200, 1))
    assert METRICS["rmse"](true, predicted) == pytest.approx(
        sk.root_mean_squared_error(true, predicted), abs=1e-12
    )
    assert METRICS["mae"](true, predicted) == pytest.approx(
        sk.mean_absolute_error(true, predicted), abs=1e-12
    )
    assert METRICS["rmsle"](true, predicted) == pytest.approx(
        sk.root_mean_squared_log_error(true, predicted), abs=1e-12
    )


@pytest.mark.parametrize("decimals", [1, 2, 9])
def test_auc_equals_scikit_learn_with_and_without_ties(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    true = rng.integers(0, 2, (300, 1)).astype(float)
    predicted = np.round(rng.random((300, 1)), decimals)
    assert METRICS["auc"](true, predicted) == pytest.approx(
        sk.roc_auc_score(true, predicted), abs=1e-12
    )


def test_log_loss_equals_scikit_learn_for_one_and_many_columns_and_at_the_clip() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 150)
    true = np.eye(4)[labels]
    predicted = rng.dirichlet(np.ones(4), 150)
    predicted[0] = np.eye(4)[(labels[0] + 1) % 4]  # certain and wrong
    assert METRICS["logloss"](true, predicted) == pytest.approx(
        sk.log_loss(labels, predicted), abs=1e-12
    )
    binary, share = (labels > 1).astype(float)[:, None], rng.random((150, 1))
    assert METRICS["logloss"](binary, share) == pytest.approx(sk.log_loss(binary, share), abs=1e-12)
    assert METRICS["accuracy"](true, predicted) == pytest.approx(
        sk.accuracy_score(labels, predicted.argmax(axis=1))
    )


# --- medal rule ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teams", "ranks"),
    [
        (1, (1, 1, 1)), (2, (1, 1, 1)), (5, (1, 1, 2)), (9, (1, 1, 3)), (10, (1, 2, 4)),
        (50, (5, 10, 20)), (60, (6, 12, 24)), (99, (9, 19, 39)), (100, (10, 20, 40)),
        (249, (10, 49, 99)), (250, (10, 50, 100)), (500, (11, 50, 100)), (999, (11, 50, 100)),
        (1000, (12, 50, 100)), (1314, (12, 65, 131)), (4551, (19, 227, 455)),
    ],
)  # fmt: skip
def test_medal_ranks_at_the_documented_team_counts(teams: int, ranks: tuple[int, int, int]) -> None:
    assert medals.medal_ranks(teams) == ranks


def test_medal_ranks_follow_the_table_for_every_count() -> None:
    for n in range(1, 5000):
        if n < 100:
            want = (max(1, math.floor(n / 10)), max(1, math.floor(n / 5)), max(1, 2 * n // 5))
        elif n < 250:
            want = (10, math.floor(n / 5), 2 * n // 5)
        elif n < 1000:
            want = (10 + math.floor(n / 500), 50, 100)
        else:
            want = (10 + math.floor(n / 500), math.floor(n / 20), math.floor(n / 10))
        assert medals.medal_ranks(n) == want, n
        gold, silver, bronze = want
        assert gold <= silver <= bronze <= n


def test_thresholds_do_not_depend_on_the_order_given_and_use_the_plain_median() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 99, 100, 251):
        scores = [float(x) for x in rng.normal(size=n)]
        for lower in (True, False):
            best_first = sorted(scores, reverse=not lower)
            limits = medals.medal_thresholds(scores, lower)
            gold, silver, bronze = medals.medal_ranks(n)
            assert limits.gold == best_first[gold - 1]
            assert limits.silver == best_first[silver - 1]
            assert limits.bronze == best_first[bronze - 1]
            assert limits.median == median(scores)


def test_direction_is_read_from_the_first_and_last_score() -> None:
    assert medals.is_lower_better([0.1, 0.3, 0.2])
    assert not medals.is_lower_better([0.9, 0.1])
    with pytest.warns(UserWarning, match="equal"):
        assert not medals.is_lower_better([0.5, 0.7, 0.5])
    with pytest.raises(ValueError, match="at least one"):
        medals.is_lower_better([])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        medals.is_lower_better([0.1, 0.2])


def test_percentile_counts_worse_entries_and_half_of_the_equal_ones() -> None:
    field = [1.0, 2.0, 2.0, 4.0]
    assert medals.percentile(0.5, field, True) == 100
    assert medals.percentile(2.0, field, True) == 100 * (1 + 1) / 4
    assert medals.percentile(2.0, field, False) == 100 * (1 + 1) / 4
    assert medals.percentile(4.0, field, True) == 12.5
    assert medals.percentile(4.0, field, False) == 87.5
    assert medals.percentile(9.0, field, True) == 0


# --- reports -------------------------------------------------------------------------------------


def rmse_report(tmp_path: Path, error: float) -> grading.GradeReport:
    """A submission whose RMSE is ``error``, in a field of 1, 2, …, 100 (lower is better)."""
    made = competition(tmp_path, "id,target\n1,0.0\n2,0.0\n")
    return grading.grade(made, f"id,target\n2,{error!r}\n1,{error!r}\n".encode())


@pytest.mark.parametrize(
    ("error", "medal"),
    [(0.5, "gold"), (10.0, "gold"), (10.00001, "silver"), (20.0, "silver"), (40.0, "bronze"),
     (40.00001, None), (100.0, None)],
)  # fmt: skip
def test_a_score_equal_to_a_threshold_earns_the_medal(
    tmp_path: Path, error: float, medal: str | None
) -> None:
    report = rmse_report(tmp_path, error)
    flags = {name for name in ("gold", "silver", "bronze") if getattr(report, name)}
    assert flags == ({medal} if medal else set())
    assert report.any_medal == (medal is not None)
    assert report.valid and report.score == error


def test_ties_at_a_threshold_all_earn_the_medal(tmp_path: Path) -> None:
    board = (1.0,) * 30 + tuple(float(n) for n in range(2, 72))
    made = competition(tmp_path, "id,target\n1,0.0\n", board=board)
    report = grading.grade(made, b"id,target\n1,1.0\n")
    assert report.gold and report.percentile == 85.0


def test_above_median_is_strict(tmp_path: Path) -> None:
    assert rmse_report(tmp_path, 50.4).above_median
    assert not rmse_report(tmp_path, 50.5).above_median


def test_scores_are_rounded_to_five_decimals_before_ranking(tmp_path: Path) -> None:
    report = rmse_report(tmp_path, 10.000004)
    assert report.score == 10.0 and report.gold


def test_higher_is_better_competitions_rank_the_other_way(tmp_path: Path) -> None:
    board = tuple(1 - n / 200 for n in range(100))
    answers = "id,target\n" + "".join(f"{n},{n % 2}\n" for n in range(10))
    made = competition(tmp_path, answers, REVIEWS, board)
    perfect = grading.grade(made, answers.encode())
    assert perfect.gold and perfect.score == 1.0 and perfect.percentile == 99.5
    flat = grading.grade(made, answers.replace(",1", ",0").encode())
    assert flat.score == 0.5 and not flat.any_medal and flat.percentile == 0.0


def test_rows_may_come_in_any_order_and_whole_float_ids_count(tmp_path: Path) -> None:
    made = competition(tmp_path, "id,target\n1,1.0\n2,2.0\n3,3.0\n")
    assert grading.grade(made, b"id,target\n3.0,3\n1.0,1\n2.0,2\n").score == 0.0


# --- invalid submissions -------------------------------------------------------------------------

GOOD = "id,target\n1,0.5\n2,0.5\n3,0.5\n"
BAD = {
    "empty": ("", "empty"),
    "blank": (" \n\n", "empty"),
    "header only": ("id,target\n", "0 rows"),
    "missing column": ("id,value\n1,0\n2,0\n3,0\n", "missing column 'target'"),
    "extra column": ("id,target,x\n1,0,0\n2,0,0\n3,0,0\n", "unknown column 'x'"),
    "index column": (",id,target\n0,1,0\n1,2,0\n2,3,0\n", "unknown column"),
    "too few rows": ("id,target\n1,0\n2,0\n", "2 rows, expected 3"),
    "too many rows": (GOOD + "4,0\n", "4 rows, expected 3"),
    "duplicate id": ("id,target\n1,0\n2,0\n2,0\n", "duplicate"),
    "other ids": ("id,target\n1,0\n2,0\n4,0\n", "differ"),
    "fractional id": ("id,target\n1.5,0\n2,0\n3,0\n", "differ"),
    "missing id": ("id,target\n1,0\n2,0\n,0\n", "differ"),
    "nan": ("id,target\n1,0\n2,nan\n3,0\n", "missing values"),
    "NA token": ("id,target\n1,0\n2,NA\n3,0\n", "missing values"),
    "empty cell": ("id,target\n1,0\n2,\n3,0\n", "missing values"),
    "inf": ("id,target\n1,0\n2,inf\n3,0\n", "infinite"),
    "huge number": ("id,target\n1,0\n2,1e999\n3,0\n", "no number"),
    "overflowing score": ("id,target\n1,0\n2,1e308\n3,0\n", "finite"),
    "text": ("id,target\n1,0\n2,good\n3,0\n", "no number"),
    "hex": ("id,target\n1,0\n2,0x10\n3,0\n", "no number"),
    "ragged": ("id,target\n1,0\n2,0,0,0\n3,0\n", "not a CSV"),
    "open quote": ('id,target\n1,"0\n2,0\n3,0\n', "not a CSV"),
    "latin-1": ("id,target\n1,\xe9\n2,0\n3,0\n".encode("latin-1"), "not a CSV"),
    "zero bytes": (b"\x00" * 50, "missing column"),
    "binary": (bytes(range(1, 256)) * 4, ""),
    "repeated header": ("id,target,target\n1,0,0\n2,0,0\n3,0,0\n", "unknown column"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_submission_is_invalid_with_a_reason(tmp_path: Path, name: str) -> None:
    text, reason = BAD[name]
    made = competition(tmp_path, GOOD)
    report = grading.grade(made, text.encode() if isinstance(text, str) else text)
    assert not report.valid and report.score is None
    assert report.percentile == 0.0 and not report.any_medal and not report.above_median
    assert report.error is not None and reason in report.error
    assert report.error.isprintable() and report.submission_exists


def test_the_good_submission_of_these_cases_is_valid(tmp_path: Path) -> None:
    assert grading.grade(competition(tmp_path, GOOD), GOOD.encode()).score == 0.0


def test_a_huge_file_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    with path.open("wb") as file:
        file.truncate(50 * 2**30)  # sparse: 50 GiB that would not fit in memory
    report = grading.grade(competition(tmp_path, GOOD), path)
    assert not report.valid and report.error is not None and "larger than" in report.error


def test_a_missing_file_is_no_submission_and_other_names_are_refused(tmp_path: Path) -> None:
    made = competition(tmp_path, GOOD)
    missing = grading.grade(made, tmp_path / "submission.csv")
    assert not missing.valid and not missing.submission_exists
    other = tmp_path / "submission.txt"
    other.write_text(GOOD)
    report = grading.grade(made, other)
    assert not report.valid and report.error is not None and ".csv" in report.error


@pytest.mark.parametrize("value", ["1.0000001", "-0.1"])
def test_probabilities_outside_zero_and_one_are_invalid(tmp_path: Path, value: str) -> None:
    answers = "id,target\n1,1\n2,0\n"
    made = competition(tmp_path, answers, REVIEWS)
    report = grading.grade(made, f"id,target\n1,{value}\n2,0\n".encode())
    assert report.error is not None and "between 0 and 1" in report.error


def test_rows_of_probabilities_must_sum_to_one(tmp_path: Path) -> None:
    answers = "id,a,b\n1,1,0\n2,0,1\n"
    made = competition(tmp_path, answers, SPEECH)
    assert grading.grade(made, b"id,b,a\n1,0.5,0.5\n2,0.5000001,0.5\n").valid
    report = grading.grade(made, b"id,b,a\n1,0.5,0.5\n2,0.50001,0.5\n")
    assert report.error is not None and "sum to 1" in report.error


def test_negative_values_are_invalid_for_rmsle() -> None:
    answers = pd.DataFrame({"id": [1], "target": [3.0]})
    with pytest.raises(InvalidSubmissionError, match="negative"):
        grade_with("rmsle", pd.DataFrame({"id": [1], "target": [-0.1]}), answers)


def test_error_text_never_quotes_control_characters(tmp_path: Path) -> None:
    report = grading.grade(
        competition(tmp_path, GOOD), b"id,target,\x1b[31mred\n1,0,0\n2,0,0\n3,0,0\n"
    )
    assert report.error is not None and "\x1b" not in report.error


def test_grade_command_prints_json_only_and_exits_1_when_invalid(
    tmp_path: Path, prepared_tweets: Path
) -> None:
    path = tmp_path / "submission.csv"
    answers = prepared_tweets / "competitions/tweet-sentiment/prepared/private/test.csv"
    path.write_bytes(answers.read_bytes())
    argv = [
        *(sys.executable, "-m", "agent_tools.mle_bench", "grade", "--json", "--submission"),
        *(str(path), "--competition", "tweet-sentiment", "--data-dir", str(prepared_tweets)),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["valid"] and report["score"] == 0.0 and report["gold"]
    path.write_text("id,target\n")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and not json.loads(done.stdout)["valid"]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def prepared_tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with tweet-sentiment prepared in it."""
    from agent_tools.mle_bench.prepare import prepare_competition

    data = tmp_path_factory.mktemp("data")
    prepare_competition("tweet-sentiment", data)
    return data
