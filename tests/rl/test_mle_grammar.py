"""The random grammar: valid programs, broad choices, and no trace of the held-out tasks."""

from __future__ import annotations

import ast
import io
import random
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from mle_tasks import facts, make_competition

from agent_tools.mle_bench.catalogue import FAMILIES
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.metrics import InvalidSubmissionError, grade_with
from agent_tools.mle_bench.registry import load_suite
from agent_tools.sandbox import Limits, ScriptJob, make_pool
from rl.envs.mle.grammar import TRAIN_COMPETITIONS, invented_facts, sample_script

TASKS: tuple[TaskFacts, ...] = (
    facts("regression", "rmse", numeric=0, text=1),
    facts("regression", "rmsle", numeric=3, categorical=2, levels=4),
    facts("binary", "auc", numeric=0, text=1),
    facts("regression", "mae", numeric=5, time=True),
    facts("multiclass", "logloss", numeric=6),
    facts("binary", "accuracy", numeric=2, categorical=1, levels=3, missing=0.1),
    facts("binary", "logloss", numeric=2, text=1),
    facts("multiclass", "accuracy", numeric=3, categorical=2, levels=4),
)


def test_a_sample_depends_on_nothing_but_facts_and_seed() -> None:
    for task in TASKS:
        assert sample_script(task, random.Random(5)) == sample_script(task, random.Random(5))
    assert len({sample_script(TASKS[0], random.Random(i)) for i in range(50)}) > 45


def test_nearly_every_sample_gives_a_valid_submission(tmp_path: Path) -> None:
    jobs, answers = [], []
    limits = Limits(cpu_seconds=20.0, wall_seconds=60.0)
    for i, task in enumerate(TASKS):
        public = make_competition(task, tmp_path / str(i))
        answers += [(task, pd.read_csv(tmp_path / str(i) / "private" / "test.csv"))] * 8
        rng = random.Random(i)
        jobs += [ScriptJob(sample_script(task, rng), public, limits=limits) for _ in range(8)]
    with make_pool("process", 2) as pool:
        results = pool.run(jobs)
    valid = 0
    for result, (task, answer) in zip(results, answers, strict=True):
        if result.status != "ok":
            continue
        try:
            grade_with(task.metric, pd.read_csv(io.BytesIO(result.files["submission.csv"])), answer)
        except InvalidSubmissionError:
            continue
        valid += 1
    assert valid >= 0.95 * len(jobs), f"{valid} of {len(jobs)}"


def samples(n: int) -> list[tuple[TaskFacts, str]]:
    rng = random.Random(0)
    drawn = [invented_facts(rng) for _ in range(n)]
    return [(task, sample_script(task, rng)) for task in drawn]


def test_samples_are_short_parseable_and_of_few_words() -> None:
    scripts = [script for _, script in samples(600)]
    lengths = [len(script.split()) for script in scripts]
    assert max(lengths) <= 150
    assert 80 <= sum(lengths) / len(lengths) <= 125
    for script in scripts:
        ast.parse(script)
        assert "  " not in script
        assert "n_jobs" not in script
    # each word can be one token of a vocabulary of 2,048
    assert len({word for script in scripts for word in script.split()}) < 600


def test_every_family_habit_and_mistake_occurs() -> None:
    drawn = samples(1500)
    text = "\n".join(script for _, script in drawn)
    for family in FAMILIES:
        for name in (family.regressor, family.classifier):
            assert name is None or f" {name}(" in text, name
    for habit in (
        "CalibratedClassifierCV(", "TruncatedSVD(", 'analyzer="char', "make_union(", "np.expm1(",
        "PCA(", "PolynomialFeatures(", "SplineTransformer(", "value_counts()", "weights=[",
    ):  # fmt: skip
        assert habit in text, habit
    hard = [
        script
        for task, script in drawn
        if task.kind == "binary" and task.metric == "auc" and ").predict( B )" in script
    ]
    assert hard, "hard labels where probabilities are scored"


def test_scripts_follow_what_the_task_must_have() -> None:
    for task, script in samples(600):
        assert ("Vectorizer(" in script) <= (task.text > 0)
        assert ("Classifier(" in script) <= (task.kind != "regression")
        assert ("np.log1p(" in script) <= (task.kind == "regression")
        wide = "sub[sub.columns[1:]] = pred" in script
        assert wide == (task.kind == "multiclass")
        if task.metric == "accuracy" and task.kind == "binary":
            assert ").predict( B )" in script or "pred > 0.5" in script


def test_invented_tasks_cover_all_kinds_metrics_and_columns() -> None:
    rng = random.Random(1)
    drawn = [invented_facts(rng) for _ in range(2000)]
    pairs = Counter((task.kind, task.metric) for task in drawn)
    assert set(pairs) == {
        ("binary", "auc"), ("binary", "logloss"), ("binary", "accuracy"),
        ("multiclass", "logloss"), ("multiclass", "accuracy"),
        ("regression", "rmse"), ("regression", "mae"), ("regression", "rmsle"),
    }  # fmt: skip
    assert any(task.text and not task.numeric + task.categorical for task in drawn)
    assert any(task.text and task.numeric for task in drawn)
    assert any(task.categorical for task in drawn)
    assert any(task.time for task in drawn)
    assert any(task.missing for task in drawn)
    assert all(task.numeric + task.categorical + task.text > 0 for task in drawn)
    assert all((task.classes == 0) == (task.kind == "regression") for task in drawn)
    assert all((task.levels > 0) == (task.categorical > 0) for task in drawn)


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_train_competitions_are_listed_for_supervision(split: str) -> None:
    ids = load_suite("offline-small-v0").ids(split)  # type: ignore[arg-type]
    assert (set(ids) == set(TRAIN_COMPETITIONS)) == (split == "train")
    assert set(ids).isdisjoint(TRAIN_COMPETITIONS) == (split == "val")
