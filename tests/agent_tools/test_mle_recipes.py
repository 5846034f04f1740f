"""The reference field: tiers, distinctness, and that its scripts run on tasks never seen."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from statistics import median

import pandas as pd
import pytest
from mle_synthetic import facts, make_competition

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.metrics import grade_with
from agent_tools.mle_bench.recipes import SIZES, field_recipes
from agent_tools.mle_bench.registry import COMPETITIONS, competition_ids
from agent_tools.sandbox import Limits, ScriptJob, make_pool

SHAPES: dict[str, TaskFacts] = {
    "text-numbers": facts("regression", "rmse", numeric=0, text=1),
    "text-classes": facts("binary", "auc", numeric=0, text=1),
    "amounts": facts("regression", "rmsle", numeric=4, categorical=2, levels=4),
    "calendar": facts("regression", "mae", numeric=5, time=True),
    "classes": facts("multiclass", "logloss", numeric=8),
    "plain": facts("regression", "rmse", numeric=5, missing=0.1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_field_has_100_distinct_scripts_in_four_tiers(shape: str) -> None:
    recipes = field_recipes(SHAPES[shape])
    assert Counter(recipe.tier for recipe in recipes) == SIZES
    assert len({recipe.id for recipe in recipes}) == 100
    assert len({recipe.script for recipe in recipes}) == 100
    assert recipes == field_recipes(SHAPES[shape])
    assert all("n_jobs" not in recipe.script for recipe in recipes)


def test_a_smaller_field_keeps_the_shares() -> None:
    tiers = Counter(recipe.tier for recipe in field_recipes(SHAPES["amounts"], 20))
    assert tiers == {"trivial": 3, "default": 7, "tuned": 7, "strong": 3}
    with pytest.raises(UserError, match="1 to 100"):
        field_recipes(SHAPES["amounts"], 0)


@pytest.mark.parametrize("shape", ["text-classes", "amounts", "calendar", "classes", "plain"])
def test_recipes_give_valid_submissions_on_made_up_tasks(shape: str, tmp_path: Path) -> None:
    task = SHAPES[shape]
    public = make_competition(task, tmp_path)
    recipes = [
        recipe
        for tier, step in (("trivial", 2), ("default", 6), ("tuned", 7), ("strong", 5))
        for recipe in [r for r in field_recipes(task) if r.tier == tier][::step]
    ]
    limits = Limits(cpu_seconds=20.0, wall_seconds=60.0)
    with make_pool("process", 2) as pool:
        results = pool.run([ScriptJob(r.script, public, limits=limits) for r in recipes])
    answers = pd.read_csv(tmp_path / "private" / "test.csv")
    for recipe, result in zip(recipes, results, strict=True):
        assert result.status == "ok", f"{recipe.id}\n{recipe.script}\n{result.stderr[-400:]}"
        submission = pd.read_csv(io.BytesIO(result.files["submission.csv"]))
        grade_with(task.metric, submission, answers)


@pytest.mark.parametrize("competition", competition_ids())
def test_better_tiers_rank_better_in_the_committed_fields(competition: str) -> None:
    with (COMPETITIONS / competition / "leaderboard.csv").open(newline="") as file:
        tiers = [row["tier"] for row in csv.DictReader(file)]
    places = {t: median(i for i, tier in enumerate(tiers) if tier == t) for t in SIZES}
    assert places["strong"] < places["tuned"] < places["default"] < places["trivial"]
    assert "default" not in tiers[:10] and "trivial" not in tiers[:40]
    assert tiers[:40].count("default") <= 2
