"""The command line as a user meets it: exit codes, one-line errors, --json, replay, report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_tools.git_configs import LabRepo
from selfevo import loop
from selfevo.arms import Commands
from selfevo.campaign import RunOptions
from selfevo.lab import init_lab


def selfevo(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "selfevo.cli", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab with one finished campaign by rules, and a hostile word in a digest's way."""
    lab = tmp_path_factory.mktemp("finished") / "lab"
    init_lab(lab)
    double = str(Path(__file__).with_name("selfevo_double.py"))
    commands = Commands(
        (sys.executable, double, "train"), (sys.executable, double, "evaluate"), check_machine=False
    )
    assert loop.start(lab, RunOptions(agent="rules"), lambda line: None, commands)[0] == 0
    return lab


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['selfevo', '--help']\n"
        "from selfevo import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as error:\n    assert not error.code, error.code\n"
        "heavy = {'torch', 'langgraph', 'openai', 'wandb', 'pydantic', 'numpy', 'scipy', 'git',\n"
        "         'jinja2', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("init", "run", "status", "resume", "medals", "pr", "replay", "report"):
        assert re.search(rf"^  {command} ", done.stdout, re.M)


def test_init_makes_a_lab_and_never_overwrites(tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    made = json.loads(selfevo("init", lab, "--json").stdout)
    assert made["commit"] == LabRepo(lab).head().commit
    assert not list(tmp_path.glob(".lab.part*"))
    refused(selfevo("init", lab), 2, "not empty")
    healthy = tmp_path / "healthy"
    selfevo("init", healthy, "--healthy")
    text = (healthy / "configs/train.yaml").read_text()
    assert "lr: 3.0e-4" in text and "#" in text
    ignored = (lab / ".gitignore").read_text().splitlines()
    assert "runs/" in ignored


def test_usage_errors_are_one_line(tmp_path: Path, finished: Path) -> None:
    refused(selfevo("run", finished, "--agent", "modl"), 2, "model, rules, random")
    refused(selfevo("run", finished, "--seeds", "1"), 2, "--seeds")
    refused(selfevo("nonsense"), 2, "nonsense")
    refused(selfevo("pr", "view", "7", finished), 2, "no PR 7; PRs: 1")
    refused(selfevo("pr", "review", "1", finished, "--approve", "--reject"), 2, "exactly one")
    refused(selfevo("pr", "review", "1", finished, "--approve"), 2, "no PR waits")
    refused(selfevo("status", tmp_path), 2, "no campaign here")
    refused(selfevo("status", finished, "-c", "c9"), 2, "known: c1")


def test_bad_labs_are_refused_with_nothing_written(tmp_path: Path) -> None:
    refused(selfevo("run", tmp_path / "none"), 2, "no such folder", "selfevo init")
    plain = tmp_path / "plain"
    plain.mkdir()
    refused(selfevo("run", plain), 2, "git repository")
    lab = tmp_path / "lab"
    init_lab(lab)
    config = lab / "selfevo.yaml"
    good = config.read_text()
    config.write_text(good.replace("rounds: 2", "roundz: 2"))
    refused(selfevo("run", lab), 2, "selfevo.yaml", "unknown key 'roundz'", "'rounds'")
    config.write_text(good.replace("review: auto", "review: [auto"))
    refused(selfevo("run", lab), 2, "selfevo.yaml line ")
    config.write_text(good.replace("rounds: 2", "rounds: 3"))
    refused(selfevo("run", lab), 2, "protected file selfevo.yaml", "uncommitted")
    config.write_text(good)
    train = lab / "configs/train.yaml"
    kept = train.read_text()
    train.write_text(kept.replace("lr: 3.0e-3", "lr: 1.0e-3"))
    refused(selfevo("run", lab), 2, "configs/train.yaml has uncommitted changes")
    train.write_text(kept.replace("optim:", "optym:"))
    refused(selfevo("run", lab), 2, "search_space.yaml", "optim.lr")
    train.write_text(kept + "optimm: {lr: 1}\n")
    LabRepo(lab).commit(["configs/train.yaml"], "typo", worktree=lab)
    done = selfevo("run", lab, "--agent", "rules")
    refused(done, 2, "configs/train.yaml", "optimm", "optim")
    train.write_text(kept)
    LabRepo(lab).commit(["configs/train.yaml"], "mended", worktree=lab)
    head = LabRepo(lab).head().commit
    subprocess.run(["git", "-C", str(lab), "checkout", "-q", "--detach"], check=True)
    refused(selfevo("run", lab), 2, "detached head")
    assert LabRepo(lab).head().commit == head
    assert not list((lab / "runs").glob("c*")) and LabRepo(lab).branches("selfevo/") == []


def test_json_is_alone_on_stdout(finished: Path) -> None:
    def one(*args: str) -> dict[str, Any]:
        done = selfevo(*args, "--json")
        assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
        record: dict[str, Any] = json.loads(done.stdout)
        return record

    status = one("status", str(finished))
    assert status["state"] == "done" and status["verdicts"] == {"1": "accept", "2": "no_proposal"}
    medals = one("medals", str(finished))
    assert [row["incumbent"] for row in medals["rows"]] == [False, True]
    assert medals["suite"] == "offline-small-v0" and medals["rows"][0]["scripts"] == 64
    assert one("pr", "list", str(finished))["state"] == "merged"
    assert one("pr", "view", "1", str(finished))["gate"]["verdict"] == "accept"
    assert "+  lr: 3.0e-4" in one("pr", "diff", "1", str(finished))["diff"]
    assert Path(one("report", str(finished))["html"]).is_file()


def test_text_for_people(finished: Path) -> None:
    assert (
        "accept" in selfevo("medals", finished).stdout
        or "incumbent" in selfevo("medals", finished).stdout
    )
    body = selfevo("pr", "view", "1", finished).stdout
    for part in ("Hypothesis", "Evidence", "Risk and rollback", "Reproduce", "rules", "Cost"):
        assert part in body
    assert selfevo("pr", cwd=finished).stdout == selfevo("pr", "list", finished).stdout
    diff = selfevo("pr", "diff", "1", cwd=finished).stdout
    assert diff.startswith("diff --git") and "\x1b" not in diff


def test_replay_shows_every_round_from_the_folder_alone(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(
        finished / "runs/c1",
        copy,
        ignore=shutil.ignore_patterns("jobs", "evals", "arms", "worktrees", "*.sqlite"),
    )
    shown = selfevo("replay", copy).stdout
    for word in (
        "round 1 of 2",
        "round 2 of 2",
        "valid_frac first",
        "propose_edit(key=optim.lr",
        "+  lr: 3.0e-4",
        "accept",
        "█",
        "memory",
    ):
        assert word in shown, word
    lines = selfevo("replay", copy, "--json").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert {e["round"] for e in events} == {0, 1, 2}
    only = selfevo("replay", copy, "--json", "--round", "1").stdout.splitlines()
    assert 0 < len(only) < len(lines)


def test_report_is_one_offline_page(finished: Path) -> None:
    selfevo("report", finished)
    page = (finished / "runs/c1/report.html").read_text()
    assert not re.search(r"<script|https?://|@import|url\(|<link|<img", page)
    assert page.count("<svg") >= 6 and "prefers-color-scheme: dark" in page
    for part in (
        "Round 1",
        "Round 2",
        "accept",
        "Offline medals",
        "Where the time went",
        "smallest detectable effect",
        "lower optim.lr",
    ):
        assert part in page
    text = (finished / "runs/c1/report.md").read_text()
    assert "| candidate | 0 |" in text and "```diff" in text
