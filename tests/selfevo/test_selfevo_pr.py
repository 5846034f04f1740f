"""`selfevo pr checks | comment | edit | close`: a person's acts on real branches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selfevo_lab import git, point_at, quiet

from agent_tools.errors import UserError
from selfevo import cli, loop, report
from selfevo.agent_prompts import call_message
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.lab import init_lab, locked
from selfevo.store import read_events

EDIT = call_message("propose_edit", {"key": "optim.lr", "direction": "decrease", "why": "falls"})
PASS = call_message("abstain", {"why": "healthy"})
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def selfevo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of the command line, in this process."""
    monkeypatch.setattr("signal.signal", lambda *args: None)

    def run(*args: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["selfevo", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def states(selfevo: Run, number: int, lab: Path) -> tuple[int, dict[str, str]]:
    code, out, _ = selfevo("pr", "checks", str(number), lab, "--json")
    record = json.loads(out)
    assert record["passed"] == (code == 0)
    return code, {row["name"]: row["state"] for row in record["checks"]}


def refused(done: tuple[int, str, str], *words: str) -> None:
    code, out, errors = done
    assert code == 2 and out == "" and errors.count("\n") == 1, done
    for word in words:
        assert word in errors, errors


def test_an_edited_and_commented_pr_is_what_runs_and_what_the_agent_reads(
    lab: Path, commands: Commands, model: Callable[..., Any], selfevo: Run
) -> None:
    endpoint = model(EDIT, PASS)
    point_at(lab, endpoint.url)
    _, folder = loop.start(lab, RunOptions(review="always", rounds=2), quiet, commands)
    assert states(selfevo, 1, lab) == (
        4,
        {"guard": "passed", "review": "pending", "gate": "pending"},
    )
    branch = read_view(folder).prs[1].branch
    first = git(lab, "rev-parse", branch)

    for value, words in (
        ("1e-6", "factor"),
        ("9", "must lie in"),
        ("3e-3", "changes nothing"),
        ("low", "needs a number"),
        ("nan", "nan"),
    ):
        refused(selfevo("pr", "edit", "1", lab, "--value", value), words)
        assert git(lab, "rev-parse", branch) == first
    refused(selfevo("pr", "edit", "1", lab), "--value", "--title")
    assert [e for e in read_events(folder / "events.jsonl")[0] if e.actor == "human"] == []

    code, out, _ = selfevo("pr", "edit", "1", lab, "--value", "4e-4")
    assert code == 0 and "lower optim.lr from 0.003 to 0.0004 (open)" in out
    assert "selfevo pr review 1" in out
    code, out, _ = selfevo("pr", "edit", "1", lab, "--title", "A calmer\x1b[31m rate", "--json")
    assert json.loads(out)["title"] == "A calmer [31m rate"
    code, out, _ = selfevo("pr", "comment", "1", lab, "-b", "warm-up is\x1b[2J fine as it is")
    assert code == 0
    view = read_view(folder)
    pr = view.prs[1]
    assert pr.commits == [first, pr.commit] and git(lab, "rev-parse", branch) == pr.commit
    assert "Selfevo-Actor: human" in git(lab, "log", "-1", "--format=%B", branch)
    assert "+  lr: 4" in selfevo("pr", "diff", "1", lab)[1]
    assert pr.proposal["after"] == 4e-4 and view.human_acts == 3
    shown = selfevo("pr", "view", "1", lab)[1]
    assert "**comment**: warm-up is [2J fine as it is" in shown and "\x1b" not in shown
    assert "**edit**: optim.lr 0.0003 → 4e-4" in shown
    assert view.pending_review() is pr  # neither is an answer

    assert selfevo("pr", "review", "1", lab, "--approve")[0] == 0
    assert loop.resume(lab, None, quiet, commands)[0] == 0
    view = read_view(folder)
    assert view.rounds[1].verdict == "accept" and view.control_commit == pr.commit
    prompt = endpoint.requests[1]["messages"][1]["content"]
    assert "r1 comment : warm-up is [2J fine as it is" in prompt and "r1 edit : optim.lr" in prompt
    assert "warm-up is" in git(lab, "show", "selfevo/c1/incumbent:memory/NOTES.md")
    code, found = states(selfevo, 1, lab)
    assert code == 0
    assert found == dict.fromkeys(("guard", "review", "integrity", "gate"), "passed")
    assert "Person: comment" in report.write(folder)[1].read_text()
    refused(selfevo("pr", "close", "1", lab, "-b", "no"), "merged already")
    refused(selfevo("pr", "edit", "1", lab, "--value", "4e-4"), "only a PR that waits")


def test_a_title_alone_makes_no_commit_and_unsaved_work_is_kept(
    lab: Path, commands: Commands, selfevo: Run
) -> None:
    options = RunOptions(agent="rules", review="always", rounds=1)
    _, folder = loop.start(lab, options, quiet, commands)
    first = read_view(folder).prs[1].commit
    assert selfevo("pr", "edit", "1", lab, "--title", "calm")[0] == 0
    assert read_view(folder).prs[1].commits == [first]
    train = folder / "worktrees/r1-lower-optim-lr/configs/train.yaml"
    mine = train.read_text() + "# mine\n"
    train.write_text(mine)
    refused(selfevo("pr", "edit", "1", lab, "--value", "4e-4"), "uncommitted changes")
    assert train.read_text() == mine


def test_closing_the_pr_that_waits_ends_its_round(
    lab: Path, commands: Commands, selfevo: Run
) -> None:
    options = RunOptions(agent="rules", review="always", rounds=1)
    _, folder = loop.start(lab, options, quiet, commands)
    refused(selfevo("pr", "close", "1", lab), "reason")
    code, out, _ = selfevo("pr", "close", "1", lab, "-b", "not now")
    assert code == 0 and "selfevo resume" in out
    assert loop.resume(lab, None, quiet, commands)[0] == 0
    view = read_view(folder)
    assert view.rounds[1].verdict == "rejected_by_review" and view.rounds[1].note == "not now"
    assert states(selfevo, 1, lab) == (1, {"guard": "passed", "review": "failed"})
    refused(selfevo("pr", "close", "1", lab, "-b", "again"), "rejected already")


def test_an_indecisive_pr_is_left_open_until_a_person_closes_it(
    tmp_path: Path, commands: Commands, selfevo: Run
) -> None:
    lab = tmp_path / "lab"
    init_lab(lab, healthy=True)
    _, folder = loop.start(lab, RunOptions(agent="random", rounds=1, seed=3), quiet, commands)
    view = read_view(folder)
    assert view.rounds[1].verdict == "indecisive" and view.prs[1].state == "open"
    code, found = states(selfevo, 1, lab)
    assert code == 1 and found["gate"] == "failed" and "review" not in found
    code, out, _ = selfevo("pr", "checks", "1", lab)
    assert code == 1 and "smallest detectable effect" in out
    with locked(lab, "selfevo run"):
        refused(selfevo("pr", "close", "1", lab, "-b", "x"), "in use by pid")
    code, out, _ = selfevo("pr", "close", "1", lab, "-b", "not worth more seeds", "--json")
    record = json.loads(out)
    assert code == 0 and record["state"] == "closed"
    assert [words["answer"] for words in record["reviews"]] == ["close"]
    view = read_view(folder)
    assert view.rounds[1].verdict == "indecisive" and view.human_acts == 1
    refused(selfevo("pr", "comment", "1", lab, "-b", " "), "needs words")
    note = tmp_path / "note.md"
    note.write_text("from a file")
    assert selfevo("pr", "comment", "1", lab, "-F", note)[0] == 0
    refused(selfevo("pr", "comment", "1", lab, "-F", tmp_path / "none"), "cannot be read")


def test_a_pr_that_is_being_measured_is_not_closed(
    lab: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, selfevo: Run
) -> None:
    from selfevo.nodes import wait

    options = RunOptions(agent="rules", review="always", rounds=1)
    _, folder = loop.start(lab, options, quiet, commands)
    selfevo("pr", "review", "1", lab, "--approve")

    def stop_here(*args: object) -> None:
        raise UserError("here")

    monkeypatch.setattr(wait, "train", stop_here)
    with pytest.raises(UserError, match="here"):
        loop.resume(lab, None, quiet, commands)
    assert states(selfevo, 1, lab) == (
        1,
        {"guard": "passed", "review": "passed", "gate": "pending"},
    )
    refused(selfevo("pr", "close", "1", lab, "-b", "no"), "under way in round 1")
    monkeypatch.undo()
    assert loop.resume(lab, None, quiet, commands)[0] == 0
    assert read_view(folder).rounds[1].verdict == "accept"
