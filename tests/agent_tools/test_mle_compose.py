"""The script language: exact text, and every choice run for real in the sandbox."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mle_synthetic import facts, make_competition
from sklearn.linear_model import Ridge

from agent_tools.errors import UserError
from agent_tools.mle_bench.catalogue import (
    CALENDAR,
    ENCODERS,
    FAMILIES,
    MODULE_OF,
    ONE_HOT,
    TREATMENTS,
    Call,
    Keyword,
    call,
    char_vectoriser,
    word_vectoriser,
)
from agent_tools.mle_bench.compose import Choices, bagged, calibrated, compose
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.metrics import grade_with
from agent_tools.sandbox import Limits, ScriptJob, ScriptPool, make_pool

RIDGE = call("Ridge", "alpha=1.0")
LOGISTIC = call("LogisticRegression", "C=1.0", "max_iter=200")
LIMITS = Limits(cpu_seconds=20.0, wall_seconds=60.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[ScriptPool]:
    with make_pool("process", 2) as pool:
        yield pool


def run(
    pool: ScriptPool, folder: Path, pairs: list[tuple[TaskFacts, Choices]]
) -> list[pd.DataFrame]:
    """Submissions of composed scripts, each graded (so valid) on its own made-up competition."""
    jobs = []
    for i, (task, choices) in enumerate(pairs):
        public = make_competition(task, folder / str(i))
        jobs.append(ScriptJob(code=compose(task, choices), inputs=public, limits=LIMITS))
    submissions = []
    for i, ((task, choices), job, result) in enumerate(
        zip(pairs, jobs, pool.run(jobs), strict=True)
    ):
        assert result.status == "ok", f"{choices}\n{job.code}\n{result.stderr[-500:]}"
        submission = pd.read_csv(io.BytesIO(result.files["submission.csv"]))
        answers = pd.read_csv(folder / str(i) / "private" / "test.csv")
        grade_with(task.metric, submission, answers)
        submissions.append(submission)
    return submissions


def test_a_script_is_legible_python_with_words_split_by_single_spaces() -> None:
    task = facts("regression", "rmsle", categorical=1, levels=3)
    choices = Choices(
        models=(RIDGE, call("ExtraTreesRegressor", "n_estimators=50", "random_state=0")),
        numeric=(call("StandardScaler"),),
        log_target=True,
        floor=True,
        weights=(1, 2),
    )
    assert compose(task, choices).split("\n") == [
        "import numpy as np",
        "import pandas as pd",
        "from sklearn.compose import make_column_transformer",
        "from sklearn.ensemble import ExtraTreesRegressor",
        "from sklearn.impute import SimpleImputer",
        "from sklearn.linear_model import Ridge",
        "from sklearn.pipeline import make_pipeline",
        "from sklearn.preprocessing import OneHotEncoder, StandardScaler",
        'train = pd.read_csv("train.csv")',
        'test = pd.read_csv("test.csv")',
        'sub = pd.read_csv("sample_submission.csv")',
        'X, Z, y = train[test.columns[1:]], test.iloc[:, 1:], np.log1p( train["target"] )',
        'category = X.select_dtypes("object").columns',
        'numeric = X.select_dtypes("number").columns',
        "num = make_pipeline( SimpleImputer(), StandardScaler() )",
        'cat = OneHotEncoder( handle_unknown="ignore" )',
        "prep = make_column_transformer( (num, numeric), (cat, category), sparse_threshold=0 )",
        "A, B = prep.fit_transform( X, y ), prep.transform( Z )",
        "m1 = Ridge( alpha=1.0 )",
        "m2 = ExtraTreesRegressor( n_estimators=50, random_state=0 )",
        "pred = np.average( [ m.fit( A, y ).predict( B ) for m in (m1, m2) ], "
        "axis=0, weights=[ 1, 2 ] )",
        "pred = np.expm1( pred )",
        "pred = np.clip( pred, 0, None )",
        "sub[sub.columns[1]] = pred",
        'sub.to_csv("submission.csv", index=False)',
    ]


def test_only_kind_metric_and_column_types_shape_the_text() -> None:
    small = facts(numeric=2, categorical=1, levels=3)
    large = facts(numeric=40, categorical=9, levels=30, rows=5000, skew_or_balance=3.0, time=True)
    assert compose(small, Choices((RIDGE,))) == compose(large, Choices((RIDGE,)))
    assert compose(small, Choices((RIDGE,))) != compose(facts(), Choices((RIDGE,)))


TABLE = facts("regression", "rmse", categorical=2, levels=4, missing=0.1)


def test_every_encoder_treatment_and_calendar_runs(pool: ScriptPool, tmp_path: Path) -> None:
    pairs = [(TABLE, Choices((RIDGE,), category=encoder)) for encoder, _ in ENCODERS]
    pairs += [(TABLE, Choices((RIDGE,), numeric=steps)) for steps, _ in TREATMENTS]
    pairs += [(TABLE, Choices((RIDGE,), calendar=step)) for step in CALENDAR]
    pairs += [(facts(numeric=0, categorical=2, levels=3), Choices((RIDGE,), category="drop"))]
    pairs += [(facts(), Choices((RIDGE,), impute=None))]
    run(pool, tmp_path, pairs)


def test_every_family_runs_on_a_table(pool: ScriptPool, tmp_path: Path) -> None:
    pairs = []
    for family in FAMILIES:
        if family.name == "text-bayes":
            continue  # counts only: run below, on text
        if family.regressor:
            model = family.sample(True, lambda row: row[0])
            pairs.append((facts("regression", "mae"), Choices((model,))))
        if family.classifier:
            model = family.sample(False, lambda row: row[-1])
            pairs.append((facts("multiclass", "logloss"), Choices((model,))))
    run(pool, tmp_path, pairs)


def test_every_kind_of_output_is_a_valid_submission(pool: ScriptPool, tmp_path: Path) -> None:
    svc, bayes = call("LinearSVC", "C=1.0"), call("GaussianNB")
    pairs = [
        (facts("binary", "auc"), Choices((LOGISTIC,))),
        (facts("binary", "auc"), Choices((svc,), output="score")),
        (facts("binary", "auc"), Choices((svc,))),
        (facts("binary", "logloss"), Choices((LOGISTIC, bayes))),
        (facts("binary", "accuracy"), Choices((LOGISTIC,))),
        (facts("binary", "accuracy"), Choices((LOGISTIC, bayes), weights=(2, 1))),
        (facts("multiclass", "logloss"), Choices((LOGISTIC, bayes))),
        (facts("multiclass", "logloss"), Choices((LOGISTIC,), output="label")),
        (facts("multiclass", "accuracy"), Choices((svc,))),
        (facts("multiclass", "logloss"), Choices((calibrated(svc, "isotonic"),))),
        (facts("multiclass", "logloss"), Choices((bagged(bayes, False, 3),))),
    ]
    results = run(pool, tmp_path, pairs)
    labels = results[7].iloc[:, 1:].to_numpy()
    assert set(np.unique(labels)) == {0.0, 1.0}
    assert (labels.sum(axis=1) == 1).all()
    assert set(results[4]["target"]) <= {0, 1}
    assert set(results[2]["target"]) <= {0, 1}
    assert results[1]["target"].nunique() > 10


def test_text_features_alone_joined_reduced_and_beside_a_table(
    pool: ScriptPool, tmp_path: Path
) -> None:
    text = facts("regression", "rmse", numeric=0, text=1)
    mixed = facts("binary", "auc", text=2, numeric=2, categorical=1, levels=3, missing=0.05)
    words, chars = word_vectoriser("ngram_range=(1, 2)"), char_vectoriser(2, 3, "min_df=2")
    topics = (call("TruncatedSVD", "5", "random_state=0"),)
    pairs = [
        (text, Choices((RIDGE,), vectorisers=(words,))),
        (text, Choices((RIDGE,), vectorisers=(words, chars))),
        (text, Choices((call("GaussianNB"),), vectorisers=(words,), reduce=topics)),
        (mixed, Choices((LOGISTIC,), vectorisers=(words,))),
        (mixed, Choices((LOGISTIC,), vectorisers=(words,), category="drop", impute="median")),
        (mixed, Choices((LOGISTIC,), vectorisers=(chars,), category="frequency")),
        (mixed, Choices((LOGISTIC,), vectorisers=(words,), calendar=ONE_HOT)),
        (replace(mixed, numeric=0), Choices((LOGISTIC,), vectorisers=(words,), category="drop")),
        (
            facts("multiclass", "logloss", numeric=0, text=1),
            Choices((call("MultinomialNB", "alpha=0.3"),), vectorisers=(words,)),
        ),
    ]
    pairs[2] = (replace(text, kind="binary", metric="auc", classes=2), pairs[2][1])
    run(pool, tmp_path, pairs)


def test_log_target_floor_and_weights_are_what_numpy_says(pool: ScriptPool, tmp_path: Path) -> None:
    task = facts("regression", "rmsle")
    other = call("Ridge", "alpha=100.0")
    single, both = run(
        pool,
        tmp_path,
        [
            (task, Choices((RIDGE,), log_target=True, floor=True)),
            (task, Choices((RIDGE, other), floor=True, weights=(1, 3))),
        ],
    )
    public = tmp_path / "0" / "public"
    train, test = pd.read_csv(public / "train.csv"), pd.read_csv(public / "test.csv")
    x, z, y = train[test.columns[1:]], test[test.columns[1:]], train["target"]
    logs = np.expm1(Ridge(alpha=1.0).fit(x, np.log1p(y)).predict(z))
    assert np.allclose(single["target"], np.clip(logs, 0, None), atol=1e-9)
    plain = [Ridge(alpha=a).fit(x, y).predict(z) for a in (1.0, 100.0)]
    expected = np.clip(np.average(plain, axis=0, weights=[1, 3]), 0, None)
    assert np.allclose(both["target"], expected, atol=1e-9)


def test_a_target_encoder_takes_whole_numbers_for_amounts(pool: ScriptPool, tmp_path: Path) -> None:
    task = facts("regression", "rmse", categorical=1, levels=3)
    choices = Choices((RIDGE,), category=call("TargetEncoder", "random_state=0"))
    public = make_competition(task, tmp_path)
    table = pd.read_csv(public / "train.csv")
    table["target"] = np.arange(len(table)) * 7
    table.to_csv(public / "train.csv", index=False)
    (result,) = pool.run([ScriptJob(compose(task, choices), public, limits=LIMITS)])
    assert result.status == "ok", result.stderr[-300:]


def test_a_call_prints_and_lists_its_whole_tree() -> None:
    tree = Call("BaggingRegressor", (Keyword("estimator", RIDGE), "n_estimators=3"))
    assert str(tree) == "BaggingRegressor( estimator=Ridge( alpha=1.0 ), n_estimators=3 )"
    assert list(tree.names()) == ["BaggingRegressor", "Ridge"]
    assert {"Ridge", "OneHotEncoder"} <= set(MODULE_OF)


def test_choices_that_make_no_script_are_refused() -> None:
    task = facts()
    for choices, words in (
        (Choices(()), "at least one estimator"),
        (Choices((RIDGE,), weights=(1, 2)), "one a model"),
        (Choices((call("Rigde"),)), "Rigde"),
    ):
        with pytest.raises(UserError, match=words):
            compose(task, choices)
    with pytest.raises(UserError, match="needs a regression"):
        compose(facts("binary", "auc"), Choices((LOGISTIC,), log_target=True))
    knn = next(family for family in FAMILIES if family.name == "text-bayes")
    with pytest.raises(ValueError, match="text-bayes"):
        knn.sample(True, lambda row: row[0])
