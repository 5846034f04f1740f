"""Grading as MLE-bench does it: golden reports, JSONL input, graders that fail, hostile files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from agent_tools.errors import UserError
from agent_tools.mle_bench import folders, grade_process, reports
from agent_tools.mle_bench.folders import FolderRegistry, registry_of
from agent_tools.mle_bench.grade_process import score_submission
from agent_tools.mle_bench.reports import CompetitionReport, Graded, GradingLine
from tests.agent_tools.mle_layout import GRADE, Checkout, command, make_checkout, write_jsonl

ID = "some-competition"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv(folders.CHECKOUT_VARIABLE, raising=False)
    return make_checkout(tmp_path)


def registry(checkout: Checkout) -> FolderRegistry:
    return registry_of(checkout=checkout.root, data_dir=checkout.data)


def grade(checkout: Checkout, submission: Path | None, **limits: float) -> Graded:
    competition = registry(checkout).get(ID)
    return reports.grade_submission(competition, submission, competition.board(), **limits)


# --- golden reports ------------------------------------------------------------------------------

# Field by field from the facts page, for 100 teams with scores 1 … 100 (lower is better).
THRESHOLDS = {
    "gold_threshold": 10.0,
    "silver_threshold": 20.0,
    "bronze_threshold": 40.0,
    "median_threshold": 50.5,
}
NOTHING = {
    "any_medal": False,
    "gold_medal": False,
    "silver_medal": False,
    "bronze_medal": False,
    "above_median": False,
    "submission_exists": True,
    "valid_submission": True,
    "is_lower_better": True,
}
GOLDEN: dict[str, tuple[object, dict[str, Any]]] = {
    "gold at the threshold": (
        10.0,
        {"score": 10.0, "any_medal": True, "gold_medal": True, "above_median": True},
    ),
    "gold after rounding to five decimals": (
        10.000004,
        {"score": 10.0, "any_medal": True, "gold_medal": True, "above_median": True},
    ),
    "silver": (10.00001, {"score": 10.00001, "any_medal": True, "silver_medal": True,
                          "above_median": True}),
    "bronze": (40, {"score": 40.0, "any_medal": True, "bronze_medal": True, "above_median": True}),
    "above the median": (50.4, {"score": 50.4, "above_median": True}),
    "at the median": (50.5, {"score": 50.5}),
    "worst": (1e9, {"score": 1e9}),
    "NaN is valid": ("NA", {"score": math.nan}),
    "infinite is valid": ("inf", {"score": math.inf}),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_competition_reports(checkout: Checkout, tmp_path: Path, name: str) -> None:
    checkout.add(ID)
    value, changes = GOLDEN[name]
    path = checkout.submission(tmp_path / "submission.csv", value)
    made = grade(checkout, path).report.to_dict()
    created = made.pop("created_at")
    assert datetime.fromisoformat(created) <= datetime.now()
    want = {"competition_id": ID, "score": None} | THRESHOLDS | NOTHING | changes
    want["submission_path"] = str(path)
    assert list(made) == [*list(want)]
    assert repr(made) == repr(want)  # NaN equals itself here, and 10 is not 10.0


def test_golden_grading_report(checkout: Checkout, tmp_path: Path) -> None:
    """A JSONL file with comments, blanks and null, graded by the command, to the file's text."""
    checkout.add(ID).add("higher-is-better", board=[float(n) for n in range(100, 0, -1)])
    good = checkout.submission(tmp_path / "runs/a/submission.csv", 5)
    poor = checkout.submission(tmp_path / "runs/b/submission.csv", 15)
    broken = tmp_path / "runs/c/submission.csv"
    broken.parent.mkdir()
    broken.write_text("id,z\n1,1\n")
    jsonl = write_jsonl(
        tmp_path / "submission.jsonl",
        [
            "# a comment",
            {"competition_id": ID, "submission_path": str(good), "logs_path": "x.log"},
            "",
            "   // another",
            {"competition_id": "higher-is-better", "submission_path": str(good)},
            {"competition_id": ID, "submission_path": str(poor), "code_path": None},
            {"competition_id": ID, "submission_path": str(broken)},
            "  ",
            {"competition_id": ID, "submission_path": None},
            {"competition_id": "higher-is-better", "submission_path": "no/such/submission.csv"},
        ],
    )
    done = command(
        "grade-jsonl", "--submission", jsonl, "--output-dir", tmp_path / "out",
        "--checkout", checkout.root, "--data-dir", checkout.data, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*_grading_report.json")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-(UTC|GMT)_grading_report.json", path.name)
    made = json.loads(path.read_text())
    for report in made["competition_reports"]:
        report.pop("created_at")
    higher = {"gold_threshold": 91.0, "silver_threshold": 81.0, "bronze_threshold": 61.0,
              "median_threshold": 50.5}  # fmt: skip
    missing = {"submission_exists": False, "valid_submission": False}
    gold = {"any_medal": True, "gold_medal": True, "above_median": True}
    silver = {"any_medal": True, "silver_medal": True, "above_median": True}
    lower = {"competition_id": ID, "score": None} | THRESHOLDS | NOTHING
    upper = {"competition_id": "higher-is-better", "score": None} | higher | NOTHING
    upper["is_lower_better"] = False
    assert made == {
        "total_runs": 6,
        "total_runs_with_submissions": 4,
        "total_valid_submissions": 3,
        "total_medals": 2,
        "total_gold_medals": 1,
        "total_silver_medals": 1,
        "total_bronze_medals": 0,
        "total_above_median": 2,
        "competition_reports": [
            lower | {"score": 5.0, "submission_path": str(good)} | gold,
            upper | {"score": 5.0, "submission_path": str(good)},
            lower | {"score": 15.0, "submission_path": str(poor)} | silver,
            lower | {"valid_submission": False, "submission_path": str(broken)},
            lower | missing | {"submission_path": "None"},
            upper | missing | {"submission_path": "no/such/submission.csv"},
        ],
    }
    totals = {key: value for key, value in made.items() if key.startswith("total_")}
    assert json.loads(done.stdout) == {"report": str(path)} | totals
    (details,) = (tmp_path / "out").glob("*_grading_details.json")
    rows = json.loads(details.read_text())["competitions"]
    assert [row["percentile"] for row in rows] == [95.5, 4.5, 85.5, 0.0, 0.0, 0.0]
    assert rows[3]["error"] == "Submission must have a column y" and not rows[3]["grader_fault"]
    assert rows[4]["error"] == "no submission"
    assert len({row["evaluator_sha256"] for row in rows}) == 2


def test_two_reports_within_a_second_are_two_files(checkout: Checkout, tmp_path: Path) -> None:
    graded: list[Graded] = []
    first = reports.write_reports(graded, tmp_path)
    second = reports.write_reports(graded, tmp_path)
    assert first.report != second.report
    assert len(list(tmp_path.glob("*_grading_report.json"))) == 2


def test_a_report_of_the_other_harness_is_read_back(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add(ID)
    report = grade(checkout, checkout.submission(tmp_path / "submission.csv", 3)).report
    theirs = json.loads(json.dumps(report.to_dict() | {"some_future_field": 1}))
    assert CompetitionReport.from_dict(theirs) == report
    with pytest.raises(UserError, match="median_threshold"):
        CompetitionReport.from_dict({k: v for k, v in theirs.items() if k != "median_threshold"})


# --- CSV and answers -----------------------------------------------------------------------------


def test_na_words_are_missing_on_both_sides_and_floats_are_exact(
    checkout: Checkout, tmp_path: Path
) -> None:
    seen = (
        "def grade(submission, answers):\n"
        "    assert submission['y'].isna().sum() == 3 and answers['y'].isna().sum() == 1\n"
        "    assert submission['x'].tolist() == [0.1, 1.2345678901234567e-300, 3.0]\n"
        "    return 1.0\n"
    )
    checkout.add(ID, grade=seen, answers="id,y\n1,null\n")
    path = tmp_path / "submission.csv"
    path.write_text("x,y\n0.1,NA\n1.2345678901234567e-300,nan\n3.0,null\n")
    assert grade(checkout, path).report.score == 1.0


def test_an_empty_file_is_an_empty_frame_for_the_grader(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add(ID)
    path = tmp_path / "submission.csv"
    path.write_text("")
    graded = grade(checkout, path)
    assert graded.error == "Submission must have a column y"
    assert graded.report.submission_exists and not graded.report.valid_submission


def test_jsonl_answers_are_a_list_of_dictionaries(checkout: Checkout, tmp_path: Path) -> None:
    counting = "def grade(submission, answers):\n    return len(answers) + answers[1]['y']\n"
    checkout.add(ID, grade=counting, answers='{"y": 1}\n{"y": 7}\n', answers_name="answers.jsonl")
    assert grade(checkout, checkout.submission(tmp_path / "s.csv", 0)).report.score == 9.0


def test_answers_of_another_kind_or_unreadable_are_our_error(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.add(ID, answers="x", answers_name="answers.parquet")
    with pytest.raises(UserError, match=r"answers .*answers.parquet cannot be read"):
        grade(checkout, checkout.submission(tmp_path / "s.csv", 0))


def test_a_csv_suffix_may_be_in_capitals(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add(ID)
    assert grade(checkout, checkout.submission(tmp_path / "SUBMISSION.CSV", 1)).report.gold_medal


# --- graders that fail ---------------------------------------------------------------------------

FAILING = {
    "raises": ("raise ValueError('no such label')", "ValueError: no such label"),
    "asserts": ("assert False", "AssertionError"),
    "returns nothing": ("return None", "TypeError"),
    "returns text": ("return 'good'", "TypeError"),
    "exits": ("raise SystemExit(3)", "exit code 3"),
    "aborts": ("import os; os.abort()", "exit code -6"),
    "needs too much memory": ("return len(bytearray(1 << 42))", "MemoryError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_grader_that_fails_is_no_score_and_the_reason_is_kept(
    checkout: Checkout, tmp_path: Path, name: str
) -> None:
    body, reason = FAILING[name]
    checkout.add(ID, grade=f"def grade(submission, answers):\n    {body}\n")
    graded = grade(checkout, checkout.submission(tmp_path / "submission.csv", 1))
    assert graded.report.score is None and not graded.report.valid_submission
    assert graded.report.submission_exists and not graded.report.any_medal
    assert graded.grader_fault and graded.error is not None and reason in graded.error
    assert graded.report.gold_threshold == 10.0


def test_a_grader_that_hangs_is_stopped(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add(ID, grade="def grade(submission, answers):\n    while True: pass\n")
    path = checkout.submission(tmp_path / "submission.csv", 1)
    graded = grade(checkout, path, timeout=3.0)
    assert graded.report.score is None and "longer than 3 s" in str(graded.error)


def test_what_a_grader_prints_does_not_disturb(checkout: Checkout, tmp_path: Path) -> None:
    noisy = GRADE.replace("    if", '    print("noise"); import os; os.write(1, b"{}")\n    if', 1)
    checkout.add(ID, grade=noisy)
    assert grade(checkout, checkout.submission(tmp_path / "s.csv", 2)).report.score == 2.0


def test_grading_runs_in_another_process(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add(ID, grade="import os\n\ndef grade(submission, answers):\n    return os.getpid()\n")
    import os

    score = grade(checkout, checkout.submission(tmp_path / "s.csv", 2)).report.score
    assert score is not None and int(score) != os.getpid()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("import a_package_nobody_has\n", "a_package_nobody_has"),
        ("x = 1\n", "grade"),
        ("def grade(:\n", "SyntaxError"),
    ],
)
def test_a_grader_that_cannot_be_loaded_is_an_error_and_no_bad_submission(
    checkout: Checkout, tmp_path: Path, source: str, word: str
) -> None:
    checkout.add(ID, grade=source)
    with pytest.raises(UserError, match=word) as caught:
        grade(checkout, checkout.submission(tmp_path / "submission.csv", 1))
    assert "--python" in str(caught.value)


def test_an_interpreter_that_does_not_start_is_named(checkout: Checkout, tmp_path: Path) -> None:
    checkout.add(ID)
    made = registry_of(
        checkout=checkout.root, data_dir=checkout.data, python=tmp_path / "no-python"
    )
    path = checkout.submission(tmp_path / "submission.csv", 1)
    competition = made.get(ID)
    with pytest.raises(UserError, match=r"no-python cannot be started.*--python"):
        reports.grade_submission(competition, path, competition.board())


# --- files that are no submission ----------------------------------------------------------------


def bad(checkout: Checkout, path: Path) -> Graded:
    checkout.add(ID)
    graded = grade(checkout, path)
    assert graded.report.score is None and not graded.report.any_medal
    assert graded.error is not None and graded.error.replace("\n", "").isprintable()
    return graded


def test_an_xlsx_file_is_no_submission_whatever_it_is_called(
    checkout: Checkout, tmp_path: Path
) -> None:
    data = b"PK\x03\x04\x14\x00\x06\x00\x08\x00" + bytes(range(256)) * 40
    (tmp_path / "submission.xlsx").write_bytes(data)
    graded = bad(checkout, tmp_path / "submission.xlsx")
    assert not graded.report.submission_exists and ".csv" in str(graded.error)
    (tmp_path / "submission.csv").write_bytes(data)
    graded = grade(checkout, tmp_path / "submission.csv")
    assert graded.report.submission_exists and "is not a CSV file" in str(graded.error)


def test_a_file_of_two_gigabytes_is_refused_unread(checkout: Checkout, tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    with path.open("wb") as file:
        file.truncate(2 << 30)  # sparse
    graded = bad(checkout, path)
    assert "2,147,483,648 bytes" in str(graded.error) and graded.report.submission_exists


def test_the_size_limit_grows_with_the_answers(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grade_process, "SIZE_FREE", 10)
    checkout.add(ID)
    spec = registry(checkout).get(ID).spec
    path = checkout.submission(tmp_path / "submission.csv", 1)
    with path.open("a") as file:
        file.write("\n" * (10 + 16 * spec.answers.stat().st_size - path.stat().st_size))
    assert score_submission(spec, path).score == 1.0
    with path.open("a") as file:
        file.write("\n")
    assert score_submission(spec, path).score is None


@pytest.mark.parametrize("name", ["missing", "folder", "link to the answers", "text"])
def test_what_is_no_file_of_its_own_is_no_submission(
    checkout: Checkout, tmp_path: Path, name: str
) -> None:
    path = tmp_path / ("submission.txt" if name == "text" else "submission.csv")
    if name == "folder":
        path.mkdir()
    elif name == "link to the answers":
        path.symlink_to(checkout.private(ID) / "test.csv")
    elif name == "text":
        path.write_text("id,y\n1,1\n")
    assert not bad(checkout, path).report.submission_exists


def test_a_wide_file_ends_at_the_memory_limit_and_not_the_machines(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grade_process, "MEMORY_FREE", 1 << 30)
    path = tmp_path / "submission.csv"
    path.write_bytes(b"," * (40 << 20))
    assert "Memory" in str(bad(checkout, path).error) or "memory" in str(
        grade(checkout, path).error
    )


# --- the JSONL file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "is not JSON"),
        ("[]", "needs a text competition_id"),
        ('{"submission_path": null}', "needs a text competition_id"),
        ('{"competition_id": 3, "submission_path": null}', "needs a text competition_id"),
        ('{"competition_id": "a"}', "needs submission_path"),
        ('{"competition_id": "a", "submission_path": 3}', "needs submission_path"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, line: str, word: str) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", ["# comment", "", line])
    with pytest.raises(UserError, match=f"line 3: {word}"):
        reports.read_grading_lines(path)


def test_a_missing_or_binary_jsonl_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        reports.read_grading_lines(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        reports.read_grading_lines(tmp_path / "b.jsonl")


def lines(*ids: str) -> Sequence[GradingLine]:
    return [GradingLine(id_, None) for id_ in ids]


def test_nothing_is_graded_or_made_if_something_later_would_stop_it(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.add(ID).add("not-prepared", answers=None).add("no-board", board=None)
    out = tmp_path / "out"
    for other, word in (
        ("not-prepared", "not prepared"),
        ("no-board", "no leaderboard"),
        ("unknown", "no competition"),
        ("some_competition", "underscore"),
    ):
        with pytest.raises(UserError, match=word):
            reports.grade_jsonl(lines(ID, other), out, registry(checkout))
    assert not out.exists()
    with pytest.raises(UserError, match="does not exist"):
        reports.grade_jsonl(lines(ID), tmp_path / "a" / "b", registry(checkout))


def test_reported_thresholds_make_a_marked_file_and_no_grading_report(tmp_path: Path) -> None:
    id_ = "spooky-author-identification"
    private = tmp_path / "data" / id_ / "prepared" / "private"
    private.mkdir(parents=True)
    (private / "test.csv").write_text("id,EAP,HPL,MWS\na,1,0,0\nb,0,1,0\n")
    submission = tmp_path / "submission.csv"
    submission.write_text("id,EAP,HPL,MWS\na,0.8,0.1,0.1\nb,0.1,0.8,0.1\n")
    made = reports.grade_jsonl(
        [GradingLine(id_, submission)],
        tmp_path / "out",
        FolderRegistry((), lite_data=tmp_path / "data"),
        reported=True,
    )
    assert made.details is None and made.report.name.endswith("_reported_thresholds.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [made.report.name]
    data = json.loads(made.report.read_text())
    assert next(iter(data)) == "reported_thresholds" and "never" in data["reported_thresholds"]
    (report,) = data["competition_reports"]
    assert report["score"] == 0.22314 and report["silver_medal"] and report["is_lower_better"]
    assert report["reported_thresholds"] == data["reported_thresholds"]
    assert data["details"]["competitions"][0]["percentile"] is None


# --- commands ------------------------------------------------------------------------------------


def test_grade_sample_prints_the_report_and_exits_1_when_invalid(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.add(ID)
    path = checkout.submission(tmp_path / "submission.csv", 12)
    where = ("--checkout", checkout.root, "--data-dir", checkout.data)
    done = command("grade-sample", path, ID, *where)
    assert done.returncode == 0, done.stderr
    assert CompetitionReport.from_dict(json.loads(done.stdout)).silver_medal
    path.write_text("id,z\n")
    done = command("grade-sample", path, ID, *where)
    assert done.returncode == 1 and "must have a column y" in done.stderr
    assert not json.loads(done.stdout)["valid_submission"]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("s.csv", "my_task"), "underscore"),
        (("s.csv", "nope"), "no competition 'nope'"),
        (("s.csv", "leaf-classification"), "kaggle.com/c/leaf-classification/rules"),
        (("s.csv", ID, "--graders", "both"), "choose ours or theirs"),
        (("s.csv", ID, "--engine", "other"), "choose selfevo or mlebench"),
        (("s.csv", ID, "--reported"), "22 competitions"),
        (("s.csv", ID, "--reported", "--engine", "mlebench"), "our own engine"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    checkout: Checkout, tmp_path: Path, args: tuple[str, ...], word: str
) -> None:
    checkout.add(ID)
    (checkout.folder(ID).parent / "my_task").mkdir()
    where = ("--checkout", checkout.root, "--data-dir", checkout.data)
    done = command("grade-sample", *args, *where, cwd=tmp_path)
    if args[1] == "leaf-classification":  # the data is missed before the leaderboard
        done = command("grade-sample", *args, *where, "--reported", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert word in done.stderr
