"""``--engine mlebench``, against a stand-in program that follows MLE-bench's command line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.mlebench_engine import PROGRAM_VARIABLE, MlebenchEngine, find_engine
from agent_tools.mle_bench.reports import CompetitionReport
from tests.agent_tools.mle_layout import command, write_jsonl

REPORT = {
    "competition_id": "a-task",
    "score": 0.5,
    "gold_threshold": 0.1,
    "silver_threshold": 0.2,
    "bronze_threshold": 0.6,
    "median_threshold": 0.7,
    "any_medal": True,
    "gold_medal": False,
    "silver_medal": False,
    "bronze_medal": True,
    "above_median": True,
    "submission_exists": True,
    "valid_submission": True,
    "is_lower_better": True,
    "created_at": "2026-02-26T12:00:00.123456",
    "submission_path": "s.csv",
}

# Its log lines carry a prefix, and the report's first line stands behind one.
STAND_IN = """\
#!{python}
import argparse, json, sys, time
from pathlib import Path

report = json.loads({report!r})
parser = argparse.ArgumentParser()
commands = parser.add_subparsers(dest="command")
grade = commands.add_parser("grade")
grade.add_argument("--submission", required=True)
grade.add_argument("--output-dir", required=True)
sample = commands.add_parser("grade-sample")
sample.add_argument("submission")
sample.add_argument("competition_id")
prepare = commands.add_parser("prepare")
prepare.add_argument("-c", "--competition-id")
for one in (grade, sample, prepare):
    one.add_argument("--data-dir", default="default")
args = parser.parse_args()
note = Path(__file__).with_name("called.json")
note.write_text(json.dumps(vars(args)))
mode = Path(__file__).with_name("mode").read_text()
if mode == "fails":
    sys.exit("ValueError: Dataset is not prepared!")
if mode == "hangs":
    time.sleep(600)
prefix = "[2026-02-26 12:00:00,000] [cli.py:1] "
if args.command == "grade" and mode != "silent":
    rows = [json.loads(line) for line in Path(args.submission).read_text().splitlines()]
    Path(args.output_dir).mkdir(exist_ok=True)
    done = {{"total_runs": len(rows), "total_medals": 1, "competition_reports": [report]}}
    name = "2026-02-26T12-00-00-GMT_grading_report.json"
    (Path(args.output_dir) / name).write_text(json.dumps(done))
if args.command == "grade-sample" and mode != "silent":
    print(prefix + "Competition report:", file=sys.stderr)
    print(prefix + json.dumps(report | {{"competition_id": args.competition_id}}, indent=4),
          file=sys.stderr)
    print(prefix + "bye", file=sys.stderr)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "mlebench"
    path.parent.mkdir()
    path.write_text(STAND_IN.format(python=sys.executable, report=json.dumps(REPORT)))
    path.chmod(0o755)
    mode(path, "works")
    monkeypatch.setenv(PROGRAM_VARIABLE, str(path))
    return path


def mode(program: Path, text: str) -> None:
    program.with_name("mode").write_text(text)


def called(program: Path) -> dict[str, str]:
    data: dict[str, str] = json.loads(program.with_name("called.json").read_text())
    return data


def test_grading_returns_the_report_that_the_program_wrote(program: Path, tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "s.jsonl", [{"competition_id": "a", "submission_path": None}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "2025_grading_report.json").write_text("{}")  # an older one
    made = find_engine(tmp_path / "data").grade_jsonl(jsonl, tmp_path / "out")
    assert made.name == "2026-02-26T12-00-00-GMT_grading_report.json"
    assert json.loads(made.read_text())["total_runs"] == 1
    assert called(program)["data_dir"] == str(tmp_path / "data")
    with pytest.raises(InfraError, match="wrote 0 reports"):  # the same name again
        find_engine().grade_jsonl(jsonl, tmp_path / "out")


def test_a_sample_report_is_read_from_the_log(program: Path, tmp_path: Path) -> None:
    report = find_engine().grade_sample(tmp_path / "s.csv", "b-task")
    assert report == CompetitionReport.from_dict(REPORT | {"competition_id": "b-task"})
    assert called(program)["data_dir"] == "default"


def test_preparation_keeps_the_terminal(program: Path) -> None:
    find_engine().prepare("a-task")
    assert called(program)["command"] == "prepare"
    assert called(program)["competition_id"] == "a-task"


def test_a_program_that_fails_prints_nothing_or_hangs_is_an_infrastructure_error(
    program: Path, tmp_path: Path
) -> None:
    engine = find_engine()
    mode(program, "fails")
    with pytest.raises(InfraError, match=r"exit code 1 \(ValueError: Dataset is not prepared!\)"):
        engine.grade_sample(tmp_path / "s.csv", "a")
    mode(program, "silent")
    with pytest.raises(InfraError, match="printed no report"):
        engine.grade_sample(tmp_path / "s.csv", "a")
    mode(program, "hangs")
    start = time.monotonic()
    with pytest.raises(InfraError, match="longer than 1 s"):
        engine.grade_sample(tmp_path / "s.csv", "a", timeout=1.0)
    assert time.monotonic() - start < 30


def test_without_the_program_it_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PROGRAM_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"mlebench is no program.*pip install -e"):
        find_engine()
    monkeypatch.setenv(PROGRAM_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(UserError, match=f"{PROGRAM_VARIABLE}="):
        find_engine()
    with pytest.raises(UserError, match="cannot be started"):
        MlebenchEngine(tmp_path / "none").grade_sample(tmp_path / "s.csv", "a")


def test_the_commands_take_the_engine(program: Path, tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "s.jsonl", [{"competition_id": "a", "submission_path": None}])
    done = command(
        "grade-jsonl", "--submission", jsonl, "--output-dir", tmp_path / "out",
        "--engine", "mlebench", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_medals"] == 1
    done = command("grade-sample", tmp_path / "s.csv", "a-task", "--engine", "mlebench")
    assert json.loads(done.stdout) == REPORT
    done = command("lite-prepare", "a-task", "--engine", "mlebench")
    assert done.returncode == 0 and called(program)["command"] == "prepare"
    mode(program, "fails")
    done = command("grade-sample", tmp_path / "s.csv", "a-task", "--engine", "mlebench")
    assert done.returncode == 5 and done.stderr.count("\n") == 1
