"""Run groups and their JSONL, and aggregation over seeds by MLE-bench's rules."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from agent_tools.errors import UserError
from agent_tools.mle_bench import aggregate, run_groups
from agent_tools.mle_bench.aggregate import Outcome, complete_seeds, read_outcomes, split_ids
from agent_tools.mle_bench.leaderboards import lite_boards
from agent_tools.mle_bench.reports import read_grading_lines
from tests.agent_tools.mle_layout import Checkout, command, make_checkout

# --- run groups ----------------------------------------------------------------------------------


def test_a_run_group_has_mle_benchs_layout(tmp_path: Path) -> None:
    group = run_groups.new_run_group(tmp_path / "runs", "my-agent")
    name = group.path.name
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-(UTC|GMT)_run-group_my-agent", name)
    runs = [group.add("spooky-author-identification") for _ in range(2)]
    assert runs[0].id != runs[1].id
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert re.fullmatch(f"spooky-author-identification_{uuid}", runs[0].id)
    assert sorted(path.name for path in runs[0].path.iterdir()) == ["code", "logs", "submission"]
    path = group.finish({runs[1].id: {"success": True, "seed": 1}, runs[0].id: {"success": False}})
    data = json.loads(path.read_text())
    assert list(data) == ["run_group", "created_at", "runs"] and data["run_group"] == name
    assert data["runs"][runs[1].id] == {"success": True, "seed": 1}
    assert [run.id for run in run_groups.read_run_group(group.path)] == [runs[1].id, runs[0].id]


def test_a_run_group_becomes_the_jsonl_that_grading_reads(tmp_path: Path) -> None:
    group = run_groups.new_run_group(tmp_path, "agent_with_underscores")
    first, second = group.add("a-task"), group.add("b-task")
    first.submission.write_text("id\n")
    (first.path / "logs" / "agent.log").write_text("")
    (second.path / "code" / "solve.py").write_text("")
    group.finish({first.id: {}, second.id: {}})
    output = tmp_path / "submission.jsonl"
    done = command(
        "make-submission", group.path, "--output", output, "--rel-code-path", "code/solve.py"
    )
    assert done.returncode == 0 and "2 runs, 1 with a submission" in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [
        {
            "competition_id": "a-task",
            "submission_path": str(first.submission),
            "logs_path": str(first.path / "logs/agent.log"),
            "code_path": None,
        },
        {
            "competition_id": "b-task",
            "submission_path": None,
            "logs_path": None,
            "code_path": str(second.path / "code/solve.py"),
        },
    ]
    lines = read_grading_lines(output)
    assert [line.submission for line in lines] == [first.submission, None]


@pytest.mark.parametrize("where", ["submission/submission.csv", "submission"])
def test_a_submission_that_is_a_link_out_of_its_run_counts_as_none(
    tmp_path: Path, where: str
) -> None:
    outside = tmp_path / "answers"
    outside.mkdir()
    (outside / "submission.csv").write_text("id,y\n")
    group = run_groups.new_run_group(tmp_path / "runs", "agent")
    run = group.add("a-task")
    link = run.path / where
    if where == "submission":
        link.rmdir()
        link.symlink_to(outside)
    else:
        link.symlink_to(outside / "submission.csv")
    assert run_groups.grading_lines([run])[0]["submission_path"] is None


def test_what_is_no_run_group_is_a_user_error(tmp_path: Path) -> None:
    group = run_groups.new_run_group(tmp_path, "agent")
    with pytest.raises(UserError, match="underscore"):
        group.add("my_task")
    with pytest.raises(UserError, match="holds no run"):
        group.finish({"a-task_1": {}})
    with pytest.raises(UserError, match=r"no .*metadata.json"):
        run_groups.read_run_group(group.path)
    for text, word in (("[", "no run group's metadata"), ("{}", "metadata"), ("[]", "metadata")):
        (group.path / "metadata.json").write_text(text)
        with pytest.raises(UserError, match=word):
            run_groups.read_run_group(group.path)
    for name in ("a-task_1", "../agent", "."):
        (group.path / "metadata.json").write_text(json.dumps({"runs": {name: {}}}))
        with pytest.raises(UserError, match="has no folder"):
            run_groups.read_run_group(group.path)
    with pytest.raises(UserError, match="agent name"):
        run_groups.new_run_group(tmp_path, "a/b")


# --- aggregation ---------------------------------------------------------------------------------

IDS = ["a", "b", "c", "d"]


def outcome(id_: str, medal: str | None = None, **flags: bool) -> Outcome:
    return Outcome(
        id_,
        **({f"{medal}_medal": True} if medal else {}),
        **flags,  # type: ignore[arg-type]
    )


def seed(*medals: str | None) -> list[Outcome]:
    return [outcome(id_, medal) for id_, medal in zip(IDS, medals, strict=True)]


def test_headline_is_the_mean_over_seeds_with_the_standard_error() -> None:
    seeds = [
        seed("gold", "silver", "bronze", None),
        seed(None, "gold", None, None),
        seed("bronze", "bronze", None, None),
    ]
    made = aggregate.aggregate(seeds)
    shares = [75.0, 25.0, 50.0]
    figure = made.metrics["any_medal_percentage"]
    error = float(np.std(shares, ddof=1) / np.sqrt(3))
    assert made.per_seed == tuple(shares) and figure.mean == mean(shares)
    assert figure.standard_error == pytest.approx(error, abs=1e-12)
    assert figure.ci_lower == pytest.approx(50 - 1.96 * error, abs=1e-12)
    assert figure.ci_upper == pytest.approx(50 + 1.96 * error, abs=1e-12)
    assert made.metrics["gold_medal_percentage"].mean == pytest.approx(50 / 3)
    assert made.num_seeds_averaged == 3 and made.num_competitions_per_seed == 4
    assert made.metrics["total_competitions"].mean == 4.0


def test_the_standard_error_of_one_seed_is_zero() -> None:
    figure = aggregate.aggregate([seed("gold", None, None, None)]).metrics["any_medal_percentage"]
    assert (figure.mean, figure.standard_error) == (25.0, 0.0)
    assert figure.ci_lower == figure.ci_upper == 25.0


def test_one_medal_on_lite_is_4_545_points_a_seed() -> None:
    ids = list(lite_boards())
    one = [outcome(id_, "gold" if id_ == ids[0] else None) for id_ in ids]
    none = [outcome(id_) for id_ in ids]
    figure = aggregate.aggregate([one, none, none]).metrics["any_medal_percentage"]
    assert figure.mean == pytest.approx(1.515, abs=5e-4)
    assert aggregate.aggregate([one]).per_seed[0] == pytest.approx(4.545, abs=5e-4)


def test_the_kth_report_of_each_competition_forms_seed_k() -> None:
    rows = [
        *(outcome("a", "gold"), outcome("b"), outcome("c"), outcome("d"), outcome("b", "gold")),
        *(outcome("d", "silver"), outcome("a"), outcome("c"), outcome("other", "gold")),
        outcome("a", "bronze"),  # surplus: no third report of the others
    ]
    made = complete_seeds(rows, IDS)
    assert [[one.competition_id for one in row] for row in made] == [IDS, IDS]
    assert [one.any_medal for one in made[0]] == [True, False, False, False]
    assert [one.any_medal for one in made[1]] == [False, True, False, True]


def test_incomplete_seeds_are_dropped_or_padded_with_failures() -> None:
    rows = [*seed(*["gold"] * 4), *seed(*["gold"] * 4)[:3], outcome("a", "gold")]
    assert len(complete_seeds(rows, IDS)) == 1
    padded = complete_seeds(rows, IDS, pad_missing=True)
    assert aggregate.aggregate(padded).per_seed == (100.0, 75.0, 25.0)
    assert padded[2][3] == Outcome("d") and not padded[2][3].submission_exists


def test_a_competition_without_any_report_needs_padding() -> None:
    rows = seed("gold", None, None, None)[:3]
    with pytest.raises(UserError, match=r"no complete seed: no report of d.*--pad-missing"):
        complete_seeds(rows, IDS)
    assert len(complete_seeds(rows, IDS, pad_missing=True)) == 1
    with pytest.raises(UserError, match="no complete seed"):
        complete_seeds([], IDS, pad_missing=True)


def test_a_number_of_seeds_takes_the_first_and_must_be_there() -> None:
    rows = [*seed("gold", None, None, None), *seed(None, None, None, None)]
    assert len(complete_seeds(rows, IDS, seeds=1)) == 1
    for wrong in (0, 3):
        with pytest.raises(UserError, match="2 complete"):
            complete_seeds(rows, IDS, seeds=wrong)
    with pytest.raises(UserError, match="empty or names"):
        complete_seeds(rows, ["a", "a"])


def write_report(path: Path, outcomes: list[Outcome], **extra: object) -> Path:
    rows = [vars(one) | {"score": None, "any_medal": "not read"} for one in outcomes]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(extra | {"competition_reports": rows}))
    return path


def test_reports_are_read_in_path_order_whatever_the_order_of_arguments(tmp_path: Path) -> None:
    late = write_report(tmp_path / "2/x_grading_report.json", seed(None, None, None, None))
    early = write_report(tmp_path / "1/x_grading_report.json", seed("gold", None, None, None)[::-1])
    rows = read_outcomes([late, early])
    assert [one.competition_id for one in rows] == IDS * 2  # by id inside a report
    assert rows[0].gold_medal and not rows[4].gold_medal


def test_reported_thresholds_never_reach_an_aggregate_unasked(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.json", seed(None, None, None, None), reported_thresholds="x")
    with pytest.raises(UserError, match="never for a claim"):
        read_outcomes([path])
    assert len(read_outcomes([path], allow_reported=True)) == 4


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"competition_reports": [{"competition_id": "a"}]}', "\xff"]
)
def test_what_is_no_grading_report_is_a_user_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="no grading report"):
        read_outcomes([path])
    with pytest.raises(UserError, match="cannot be read"):
        read_outcomes([tmp_path / "none.json"])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        read_outcomes([path])


# --- splits and experiments ----------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path)


def test_splits_come_from_the_list_a_suite_a_file_or_the_checkout(
    checkout: Checkout, tmp_path: Path
) -> None:
    assert split_ids("lite") == split_ids("low") == list(lite_boards())
    assert split_ids("offline-small-v0")[0] == "tweet-sentiment"
    (tmp_path / "mine.txt").write_text("a\n\n b \n")
    assert split_ids(str(tmp_path / "mine.txt")) == ["a", "b"]
    folder = checkout.root / "experiments" / "splits"
    folder.mkdir(parents=True)
    (folder / "medium.txt").write_text("x\ny")
    assert split_ids("medium", checkout.root) == ["x", "y"]
    with pytest.raises(UserError, match=r"no split 'medium'.*offline-small-v0"):
        split_ids("medium")
    with pytest.raises(UserError, match="no split list"):
        split_ids("high", checkout.root)


def test_the_reports_of_an_experiment_are_those_of_its_run_groups(tmp_path: Path) -> None:
    (tmp_path / "run_group_experiments.csv").write_text(
        "experiment_id,run_group\nmine,group-2\nmine,group-1\nother,group-3\nmine,group-4\n\n"
    )
    wanted = [
        write_report(tmp_path / f"group-{n}" / "t_grading_report.json", seed(*[None] * 4))
        for n in (1, 2)
    ]
    write_report(tmp_path / "group-3" / "t_grading_report.json", seed(*[None] * 4))
    assert aggregate.experiment_reports("mine", tmp_path) == wanted
    with pytest.raises(UserError, match="no grading report of experiment"):
        aggregate.experiment_reports("nobody", tmp_path)
    write_report(tmp_path / "group-1" / "u_grading_report.json", seed(*[None] * 4))
    with pytest.raises(UserError, match="2 grading reports: keep one"):
        aggregate.experiment_reports("mine", tmp_path)
    with pytest.raises(UserError, match=r"no .*run_group_experiments.csv"):
        aggregate.experiment_reports("mine", tmp_path / "nowhere")


def test_the_aggregate_command_prints_mle_benchs_object(tmp_path: Path) -> None:
    (tmp_path / "split.txt").write_text("\n".join(IDS))
    paths = [
        write_report(tmp_path / f"{n}.json", seed("gold", *[None] * n, *["silver"] * (3 - n)))
        for n in range(3)
    ]
    split = ("--split", tmp_path / "split.txt")
    done = command("aggregate", *paths, *split, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["num_seeds_averaged"] == 3 and data["num_competitions_per_seed"] == 4
    assert data["metrics"]["any_medal_percentage"]["mean"] == 75.0
    assert set(data["metrics"]["any_medal_percentage"]) == {
        *("mean", "ci_lower", "ci_upper", "standard_error")
    }
    done = command("aggregate", paths[0], *split)
    assert "any medal          100.00 ± 0.00 %" in done.stdout
    assert "asks for at least 3" in done.stderr
    done = command("aggregate", *split)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
