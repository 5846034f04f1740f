"""The fit driver: resumable, all or nothing; and when a field's ranks may be called medals."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench import field_checks, fields, registry
from agent_tools.mle_bench.facts import TaskFacts
from agent_tools.mle_bench.medals import medal_thresholds
from agent_tools.mle_bench.prepare import prepare_competition
from agent_tools.mle_bench.recipes import Recipe, field_recipes
from agent_tools.sandbox import ScriptJob, ScriptPool, ScriptResult, make_pool

SUITE = registry.load_suite()
BOARDS = [(competition_id, "private") for competition_id in SUITE.ids()] + [
    (competition_id, "dev") for competition_id in SUITE.ids("train")
]


@pytest.fixture(scope="module")
def pool() -> Iterator[ScriptPool]:
    with make_pool("process", workers=1) as made:
        yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for competition_id in SUITE.ids():
        prepare_competition(competition_id, folder)
    return folder


class CountingPool:
    """Passes jobs on and counts them; ``broken`` scripts meet a sandbox that fails."""

    missing: tuple[str, ...] = ()

    def __init__(self, inner: ScriptPool, broken: str = "\0") -> None:
        self.inner, self.broken, self.jobs = inner, broken, 0

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        self.jobs += 1
        if self.broken in job.code:
            failed: Future[ScriptResult] = Future()
            failed.set_result(ScriptResult("infra", None, "", "fork failed", {}, 0.0, 0.0))
            return failed
        return self.inner.submit(job)

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]:
        return [self.submit(job).result() for job in jobs]

    def close(self) -> None:
        pass

    def __enter__(self) -> CountingPool:
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def small(tmp_path: Path) -> registry.Competition:
    """Predict 0, 1, …, 9 from nothing."""
    public, private = tmp_path / "c/public", tmp_path / "c/private"
    public.mkdir(parents=True)
    private.mkdir()
    (public / "train.csv").write_text("id,x,target\n" + "".join(f"{n},1,{n}\n" for n in range(9)))
    (public / "test.csv").write_text("id,x\n" + "".join(f"{n},1\n" for n in range(10)))
    (private / "test.csv").write_text("id,target\n" + "".join(f"{n},{n}\n" for n in range(10)))
    return registry.Competition(
        id="small",
        split="val",
        strata="table",
        metric="rmse",
        lower_is_better=True,
        grade_fn="agent_tools.mle_bench.competitions.tweet-sentiment.grade:grade",
        public_dir=public,
        private_dir=private,
        dev_public_dir=None,
        dev_private_dir=None,
        leaderboard=(),
        dev_leaderboard=None,
        description="",
        facts=TaskFacts("regression", "rmse", 9, 1, 0, 0, 0, 0.0, 0, 0.0, False),
    )


def constant(name: str, value: str) -> Recipe:
    script = (
        "import pandas as pd\nt = pd.read_csv('test.csv')\n"
        f"t['target'] = {value}\nt[['id', 'target']].to_csv('submission.csv', index=False)\n"
    )
    return Recipe(id=name, tier="trivial", seed=0, script=script)


RECIPES = [
    constant("middle", "4.5"),
    constant("zero", "0.0"),
    constant("fails", "undefined_name"),
    constant("nan", "float('nan')"),
    Recipe(id="silent", tier="trivial", seed=0, script="pass\n"),
]


# --- fitting -------------------------------------------------------------------------------------


def test_scripts_are_run_graded_and_kept_in_a_journal(
    tmp_path: Path, small: registry.Competition, pool: ScriptPool
) -> None:
    counting = CountingPool(pool)
    entries = fields.fit_field(small, "private", RECIPES, counting, data_dir=tmp_path)
    assert [entry.recipe for entry in entries] == [recipe.id for recipe in RECIPES]
    middle, zero, fails, nan, silent = entries
    assert middle.score == round(float(np.std(np.arange(10))), 5)
    assert zero.score == round(float(np.sqrt(np.mean(np.arange(10) ** 2))), 5)
    assert fails.score is None and "undefined_name" in str(fails.error)
    assert nan.score is None and "NaN" in str(nan.error)
    assert silent.score is None
    assert counting.jobs == len(RECIPES)

    again = CountingPool(pool)
    assert fields.fit_field(small, "private", RECIPES, again, data_dir=tmp_path) == entries
    assert again.jobs == 0


def test_a_killed_fit_goes_on_and_a_changed_script_or_answer_is_run_again(
    tmp_path: Path, small: registry.Competition, pool: ScriptPool
) -> None:
    two = RECIPES[:2]
    first = fields.fit_field(small, "private", two, pool, data_dir=tmp_path)
    journal = fields.work_dir(small, "private", tmp_path) / "rows.jsonl"
    journal.write_text(journal.read_text()[:-20])  # a kill in the middle of the last line
    counting = CountingPool(pool)
    assert [
        (entry.recipe, entry.score)
        for entry in fields.fit_field(small, "private", two, counting, data_dir=tmp_path)
    ] == [(entry.recipe, entry.score) for entry in first]
    assert counting.jobs == 1

    changed = [two[0], constant("zero", "9.0")]
    counting = CountingPool(pool)
    entries = fields.fit_field(small, "private", changed, counting, data_dir=tmp_path)
    assert counting.jobs == 1 and entries[1].score == first[1].score

    answers = small.private_dir / "test.csv"
    answers.write_text(answers.read_text().replace("9,9", "9,8"))
    counting = CountingPool(pool)
    fields.fit_field(small, "private", changed, counting, data_dir=tmp_path)
    assert counting.jobs == 2


def test_a_sandbox_fault_is_no_score_and_the_next_run_tries_only_that_script(
    tmp_path: Path, small: registry.Competition, pool: ScriptPool
) -> None:
    broken = CountingPool(pool, broken="0.0")
    with pytest.raises(InfraError, match=r"1 scripts \(zero: fork failed\)"):
        fields.fit_field(small, "private", RECIPES[:2], broken, data_dir=tmp_path)
    counting = CountingPool(pool)
    entries = fields.fit_field(small, "private", RECIPES[:2], counting, data_dir=tmp_path)
    assert counting.jobs == 1 and all(entry.score is not None for entry in entries)


def made_entries(scores: Sequence[float]) -> list[fields.Entry]:
    return [
        fields.Entry(f"r{n:03}", "default", n, "0" * 16, "1" * 16, "ok", score, None, 0.5, 0.6)
        for n, score in enumerate(scores)
    ]


def test_leaderboards_are_best_first_in_both_directions(
    tmp_path: Path, small: registry.Competition
) -> None:
    scores = [float(n % 40) for n in range(100)]
    for lower in (True, False):
        competition = replace(small, lower_is_better=lower)
        path = fields.write_leaderboard(competition, "private", made_entries(scores), tmp_path)
        assert path.name == "leaderboard.csv"
        assert registry.read_leaderboard(path, lower) == tuple(sorted(scores, reverse=not lower))
        row = next(csv.DictReader(path.open()))
        assert {"score", "recipe", "tier", "seed", "cpu_s", "python", "scikit-learn"} <= set(row)


def test_a_field_that_is_not_whole_writes_nothing(
    tmp_path: Path, small: registry.Competition
) -> None:
    entries = made_entries([float(n) for n in range(100)])
    failed = replace(entries[7], score=None, error="timeout")
    for broken in (entries[:99], [*entries[:7], failed, *entries[8:]]):
        with pytest.raises(UserError, match="99 of 100"):
            fields.write_leaderboard(small, "private", broken, tmp_path)
    assert not list(tmp_path.glob("*.csv"))


# --- checks --------------------------------------------------------------------------------------


def test_beat_probabilities_tell_a_real_lead_from_a_tie() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(800, 1))
    good, fair = true + rng.normal(size=(800, 1)), true + 1.3 * rng.normal(size=(800, 1))
    lead, tie, behind = field_checks.beat_probabilities(
        "rmse", true, [good, fair, fair, good], samples=200
    )
    assert lead > 0.99 and tie == 0.5 and behind < 0.01
    labels = (true > 0).astype(float)
    (lead,) = field_checks.beat_probabilities("auc", labels, [good, fair], samples=200)
    assert lead > 0.99  # higher is better here


def test_a_field_of_near_equal_entries_fails_its_check(
    tmp_path: Path, small: registry.Competition, pool: ScriptPool
) -> None:
    spread = [constant(f"r{n:03}", f"4.5 + {n}") for n in range(10)]
    entries = fields.fit_field(small, "private", spread, pool, data_dir=tmp_path)
    check = field_checks.check_field(small, "private", entries, data_dir=tmp_path, samples=300)
    assert check.p_gold_bronze > 0.95 and check.entries == 10
    assert not check.passed  # ten test rows are too few
    crowd = [constant(f"s{n:03}", f"4.5 + {n} / 1000") for n in range(10)]
    entries = fields.fit_field(small, "private", crowd, pool, data_dir=tmp_path)
    check = field_checks.check_field(small, "private", entries, data_dir=tmp_path, samples=300)
    assert check.p_gold_bronze < 0.95 and not check.passed


# --- the committed fields ------------------------------------------------------------------------


def board(competition_id: str, which: str) -> Path:
    name = "leaderboard.csv" if which == "private" else "dev_leaderboard.csv"
    return registry.COMPETITIONS / competition_id / name


@pytest.mark.parametrize(("competition_id", "which"), BOARDS)
def test_committed_fields_hold_100_fitted_scripts_of_this_data(
    competition_id: str, which: registry.Which, data: Path
) -> None:
    competition = registry.load_competition(competition_id, data)
    path = board(competition_id, which)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 100 and len({row["recipe"] for row in rows}) == 100
    assert Counter(row["tier"] for row in rows) == {
        "trivial": 15,
        "default": 35,
        "tuned": 35,
        "strong": 15,
    }
    scores = competition.field(which)
    assert scores[0] != scores[-1]
    assert list(scores) == sorted(scores, reverse=not competition.lower_is_better)
    assert {row["data"] for row in rows} == {fields.data_digest(competition, which)}
    assert {row["pandas"] for row in rows} == {"2.3.3"}
    assert path.stat().st_size < 200_000
    scripts = {
        recipe.id: fields.script_digest(recipe.script)
        for recipe in field_recipes(competition.facts, fields.FIELD_SIZE)
    }
    assert {row["recipe"]: row["script"] for row in rows} == scripts


def test_three_committed_entries_come_out_again(data: Path, pool: ScriptPool) -> None:
    competition = registry.load_competition("electricity-demand", data)
    refits = field_checks.refit_entries(
        competition,
        "private",
        board("electricity-demand", "private"),
        field_recipes(competition.facts, fields.FIELD_SIZE),
        pool,
    )
    assert [refit.rank for refit in refits] == [10, 40, 50]
    assert all(refit.passed for refit in refits), refits


@pytest.mark.parametrize("competition_id", SUITE.ids())
def test_there_is_headroom_above_gold_and_a_default_misses_bronze(
    competition_id: str, data: Path, pool: ScriptPool
) -> None:
    competition = registry.load_competition(competition_id, data)
    outside = field_checks.run_outside(competition, pool)
    check = field_checks.check_headroom(competition, outside, competition.leaderboard)
    limits = medal_thresholds(competition.leaderboard, competition.lower_is_better)
    assert check.passed, (check, limits)
