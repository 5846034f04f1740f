"""The pure parts of the competition agent: measures, tree, journal, memory, folds, table."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mle_synthetic import facts, make_competition

from agent_tools.errors import UserError
from agent_tools.mle_agent import memory
from agent_tools.mle_agent.folds import (
    can_split,
    check_form,
    make_folds,
    public_view,
    split_rule,
)
from agent_tools.mle_agent.journal import (
    Journal,
    Measure,
    Move,
    Node,
    Reply,
    best_of,
    next_move,
)
from agent_tools.mle_agent.settings import NANO, PRESETS, REAL, make_settings
from agent_tools.mle_agent.table import mean_sem, show, summarise
from agent_tools.mle_bench.grading import grade, score
from agent_tools.mle_bench.registry import Competition

GRADES = "agent_tools.mle_bench.competitions.{}.grade:grade"


def competition(folder: Path, kind: str = "regression", **changes: object) -> Competition:
    metric, grader = {
        "regression": ("rmse", "tweet-sentiment"),
        "binary": ("auc", "food-reviews"),
        "multiclass": ("logloss", "vowel-speaker"),
    }[kind]
    task = facts(kind, metric, **changes)
    public = make_competition(task, folder)
    return Competition(
        id="made-up", split="train", strata="table", metric=metric,
        lower_is_better=metric != "auc", grade_fn=GRADES.format(grader), public_dir=public,
        private_dir=folder / "private", dev_public_dir=None, dev_private_dir=None,
        leaderboard=tuple(n / 20 for n in range(100)), dev_leaderboard=None,
        description="Predict it.", facts=task,
    )  # fmt: skip


def node(id_: int, cv: float | None = None, **changes: Any) -> Node:
    values = {
        "id": id_, "stage": "draft", "parent": None, "plan": f"plan {id_}", "code": f"code {id_}",
        "status": "ok" if cv is not None else "error", "error": "" if cv is not None else "broke",
        "cv": cv, "folds": (cv, cv, cv) if cv is not None else (), "submission": cv is not None,
        "cpu_s": 1.0, "wall_s": 1.0, "scripts": 4, "tokens": 5,
    }  # fmt: skip
    return Node(**{**values, **changes})


def test_a_measure_knows_its_direction() -> None:
    assert Measure(0.2, True).better_than(Measure(0.3, True))
    assert Measure(0.3, False).better_than(Measure(0.2, False))
    assert not Measure(0.2, True).better_than(Measure(0.2, True))
    assert Measure(9.0, True).better_than(None)
    assert not Measure(math.nan, True).better_than(None)
    assert not Measure(math.nan, True).better_than(Measure(1.0, True))
    with pytest.raises(ValueError, match="different directions"):
        Measure(0.2, True).better_than(Measure(0.3, False))


def test_the_best_node_follows_the_metric_and_needs_the_most_folds() -> None:
    nodes = [node(0, 0.5), node(1, 0.4), node(2, 0.4), node(3), node(4, 0.1, folds=(0.1,))]
    assert best_of(nodes, True) == nodes[1]  # the earlier of two equal ones
    assert best_of(nodes, False) == nodes[0]
    assert best_of([node(3)], True) is None
    assert best_of([node(3), nodes[4]], True) == nodes[4]


def test_drafts_come_first_then_repairs_and_improvements() -> None:
    settings = replace(REAL, drafts=2, debug_share=1.0, debug_depth=2)
    rng = random.Random(0)
    assert next_move([], settings, True, rng) == Move("draft")
    assert next_move([node(0, 0.5)], settings, True, rng) == Move("draft")
    broken = [node(0, 0.5), node(1)]
    assert next_move(broken, settings, True, rng) == Move("debug", 1)
    again = [*broken, node(2, stage="debug", parent=1)]
    assert next_move(again, settings, True, rng) == Move("debug", 2)
    given_up = [*again, node(3, stage="debug", parent=2)]
    assert next_move(given_up, settings, True, rng) == Move("improve", 0)
    never = replace(settings, debug_share=0.0)
    assert next_move(broken, never, True, rng) == Move("improve", 0)
    # nothing works and no repair is left: a new draft
    none_good = [node(0, status="repeat"), node(1, status="repeat")]
    assert next_move(none_good, settings, True, rng) == Move("draft")


def test_a_journal_is_the_same_after_it_was_read_again(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "journal.jsonl"
    journal = Journal(path, True)
    said = Reply(0, "draft", None, "text \udc80 ü\u2028", "plan", "code", 7)
    journal.keep_replies([said, replace(said, id=1)])
    journal.keep_nodes([node(0, 0.5)])
    journal.keep_feedback(0, "more trees", 11)
    journal.clock(3.5)
    again = Journal(path, True)
    assert again.nodes == journal.nodes
    assert again.nodes[0].feedback == "more trees"
    assert again.nodes[0].tokens == 16
    assert list(again.replies) == [1]
    assert (again.spent_s, again.ended, again.criticised) == (3.5, None, {0})
    again.end(0, "steps")
    assert Journal(path, True).ended == {"selected": 0, "reason": "steps"}


def test_what_a_kill_left_of_a_line_is_dropped_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, True)
    journal.keep_nodes([node(0, 0.5)])
    first = path.stat().st_size
    journal.keep_nodes([node(1, 0.4), node(2, 0.3)])
    whole = path.read_bytes()
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        assert list(Journal(path, True).nodes) == [0]
        assert path.read_bytes() == whole[:first]
    path.write_bytes(whole)
    assert list(Journal(path, True).nodes) == [0, 1, 2]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"kind": "odd"}', '{"kind": "nodes"}'])
def test_a_file_that_is_no_journal_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"journal\.jsonl line 1"):
        Journal(path, True)


def test_memory_grows_by_a_part_a_step_and_keeps_the_chain(tmp_path: Path) -> None:
    nodes = [
        node(0, 0.5, feedback="too simple"),
        node(1, stage="debug", parent=0),
        node(2, 0.4, stage="improve", parent=0, feedback="trees help"),
        node(3, 0.45),
    ]
    memory.write(tmp_path / "memory.md", nodes, True)
    text = (tmp_path / "memory.md").read_text()
    assert text.startswith("# Memory\n")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Step 0: draft: cross-validation score 0.50000",
        "## Step 1: debug of step 0: failed (error)",
        "## Step 2: improve of step 0: cross-validation score 0.40000",
        "## Step 3: draft: cross-validation score 0.45000",
    ]
    assert text.index("too simple") < text.index("trees help")
    assert "Better than the best before (0.50000)" in text
    assert "Not better than the best so far (0.40000)" in text
    assert "Error: broke" in text


def test_a_long_memory_keeps_the_newest_part_whole_and_fits() -> None:
    nodes = [node(i, 0.5, feedback=f"criticism {i} " + "x" * 300) for i in range(50)]
    whole = memory.for_prompt(nodes, True, 10**6)
    assert all(f"criticism {i} " in whole for i in range(50))
    for most in (500, 2_000, 8_000):
        text = memory.for_prompt(nodes, True, most)
        assert len(text) <= most
        assert "criticism 49 " in text
        assert "criticism 0 " not in text
    assert "## Step 47" in memory.for_prompt(nodes, True, 2_000)  # as a heading


def test_settings_can_be_changed_and_name_the_nearest_key() -> None:
    assert PRESETS["nano"] is NANO
    changed = make_settings("real", {"steps": "7", "feedback": "false", "time_limit_s": "60"})
    assert (changed.steps, changed.feedback, changed.time_limit_s) == (7, False, 60.0)
    for key, text, message in (
        ("step", "3", "did you mean steps"),
        ("steps", "many", "needs a number"),
        ("steps", "0", "out of range"),
        ("folds", "1", "out of range"),
        ("feedback", "maybe", "true or false"),
        ("name", "x", "no such setting"),
    ):
        with pytest.raises(UserError, match=message):
            make_settings("real", {key: text})
    with pytest.raises(UserError, match="choose real, nano"):
        make_settings("best", {})


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass"])
def test_folds_cover_the_public_rows_once_and_their_answers_score_best(
    tmp_path: Path, kind: str
) -> None:
    made = competition(tmp_path, kind, categorical=1, levels=3)
    (made.public_dir / "images").mkdir()
    (made.public_dir / "images" / "1.txt").write_text("pixel")
    train = pd.read_csv(made.public_dir / "train.csv")
    folds = make_folds(public_view(made), 3, 0, tmp_path / "folds")
    held: list[int] = []
    for fold in folds:
        fit = pd.read_csv(fold.public_dir / "train.csv")
        test = pd.read_csv(fold.public_dir / "test.csv")
        assert "target" not in test
        assert set(fit["id"]) | set(test["id"]) == set(train["id"])
        assert not set(fit["id"]) & set(test["id"])
        assert (fold.public_dir / "images" / "1.txt").read_text() == "pixel"
        held += list(test["id"])
        best, _ = score(fold, (fold.private_dir / "test.csv").read_bytes())
        plain, error = score(fold, (fold.public_dir / "sample_submission.csv").read_bytes())
        assert (best, error) == (1.0 if kind == "binary" else 0.0, None)
        assert plain != best
        if kind != "regression":
            shares = train["target"].value_counts(normalize=True)
            part = train[train["id"].isin(test["id"])]["target"].value_counts(normalize=True)
            assert (shares - part).abs().max() < 0.05
    assert sorted(held) == sorted(train["id"])
    again = make_folds(public_view(made), 3, 0, tmp_path / "again")
    other = make_folds(public_view(made), 3, 1, tmp_path / "other")
    files = [[f.private_dir.joinpath("test.csv").read_text() for f in x] for x in (folds, again)]
    assert files[0] == files[1]
    assert files[0][0] != other[0].private_dir.joinpath("test.csv").read_text()


def test_folds_in_time_hold_out_what_comes_later(tmp_path: Path) -> None:
    made = competition(tmp_path, time=True)
    for name, first in (("train", 0), ("test", 500)):
        table = pd.read_csv(made.public_dir / f"{name}.csv")
        table.insert(1, "day", [first + (7 * i) % 80 for i in range(len(table))])
        table.to_csv(made.public_dir / f"{name}.csv", index=False)
    assert split_rule(made.public_dir, time=True) == ("time", "day")
    assert split_rule(made.public_dir, time=False)[0] == "random"
    ends = []
    for fold in make_folds(public_view(made), 3, 0, tmp_path / "folds"):
        fit = pd.read_csv(fold.public_dir / "train.csv")["day"]
        test = pd.read_csv(fold.public_dir / "test.csv")["day"]
        assert fit.max() < test.min()
        assert len(test) == 16
        ends.append(test.max())
    assert ends == sorted(ends, reverse=True)


def test_folds_keep_groups_whole_where_the_test_has_other_groups(tmp_path: Path) -> None:
    made = competition(tmp_path)
    for name, first in (("train", 0), ("test", 100)):
        table = pd.read_csv(made.public_dir / f"{name}.csv")
        table.insert(1, "patient", [f"p{first + i // 4}" for i in range(len(table))])
        table.to_csv(made.public_dir / f"{name}.csv", index=False)
    assert split_rule(made.public_dir, time=False) == ("group", "patient")
    for fold in make_folds(public_view(made), 3, 0, tmp_path / "folds"):
        fit = pd.read_csv(fold.public_dir / "train.csv")["patient"]
        test = pd.read_csv(fold.public_dir / "test.csv")["patient"]
        assert not set(fit) & set(test)
        assert len(test) >= 20


def test_a_view_has_no_way_to_answers_and_says_when_it_cannot_be_split(tmp_path: Path) -> None:
    made = competition(tmp_path)
    view = public_view(made)
    sample = (made.public_dir / "sample_submission.csv").read_bytes()
    assert grade(made, sample).valid
    with pytest.raises(UserError, match="no answers"):
        grade(view, sample)
    assert view.leaderboard == ()
    assert can_split(view.public_dir)
    (made.public_dir / "test.csv").unlink()
    assert not can_split(view.public_dir)
    with pytest.raises(UserError, match="folds=0"):
        make_folds(view, 3, 0, tmp_path / "folds")
    with pytest.raises(UserError, match="too few"):
        make_folds(public_view(competition(tmp_path / "b")), 21, 0, tmp_path / "folds")


def test_the_form_of_a_submission_is_checked_without_answers(tmp_path: Path) -> None:
    public = competition(tmp_path).public_dir
    sample = pd.read_csv(public / "sample_submission.csv")

    def text(table: pd.DataFrame) -> bytes:
        return table.to_csv(index=False).encode()

    assert check_form(public, text(sample)) is None
    assert check_form(public, text(sample.sample(frac=1, random_state=0))) is None
    assert check_form(public, text(sample.astype({"id": float}))) is None
    wrong = {
        b"": "no CSV",
        b"\xff\xfe\x00": "no CSV",
        text(sample.rename(columns={"target": "y"})): "columns",
        text(sample[:-1]): "rows",
        text(sample.assign(id=sample["id"] + 1)): "other values",
        text(sample.assign(target=None)): "missing values",
    }
    for data, message in wrong.items():
        found = check_form(public, data)
        assert found is not None
        assert message.split()[-1] in found


def row(name: str, seed: int, medal: str | None, percentile: float, valid: bool = True) -> Any:
    return {
        "competition": name, "seed": seed, "fold": None, "medal": medal, "valid": valid,
        "percentile": percentile, "above_median": percentile > 50,
    }  # fmt: skip


def test_the_table_is_mean_and_sem_over_seeds() -> None:
    values = {("a", 0): 90.0, ("a", 1): 40.0, ("a", 2): 70.0, ("b", 0): 10.0, ("b", 1): 0.0,
              ("b", 2): 80.0}  # fmt: skip
    rows = [row(n, s, "gold" if p >= 70 else None, p, p > 0) for (n, s), p in values.items()]
    made = summarise([*rows, {**rows[0], "fold": 1, "percentile": 0.0}])
    by_seed = [(values["a", s] + values["b", s]) / 2 for s in range(3)]
    assert made.total.percentile.value == pytest.approx(statistics.mean(by_seed))
    assert made.total.percentile.sem == pytest.approx(statistics.stdev(by_seed) / math.sqrt(3))
    medals = [50.0, 0.0, 100.0]
    assert made.total.any_medal.value == pytest.approx(statistics.mean(medals))
    assert made.total.any_medal.sem == pytest.approx(statistics.stdev(medals) / math.sqrt(3))
    assert made.lines[0].any_medal.value == pytest.approx(200 / 3)
    assert made.lines[1].valid.value == pytest.approx(200 / 3)
    assert mean_sem([5.0]).sem == 0.0
    part = summarise(rows[:-1])
    assert (part.seeds, part.incomplete) == ((0, 1, 2), (2,))
    assert part.total.percentile.value == pytest.approx(statistics.mean(by_seed[:2]))
    assert "incomplete seeds, not counted under all: 2" in show(part, title="t")
    assert "best-on-test" in show(made, title="t", best_on_test=made)
    with pytest.raises(ValueError, match="two rows"):
        summarise([rows[0], rows[0]])
    with pytest.raises(ValueError, match="no rows"):
        summarise([])
    json.dumps(made.total.any_medal.value)
