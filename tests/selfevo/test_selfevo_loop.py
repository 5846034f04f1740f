"""Whole campaigns: real git, real LangGraph with SQLite, real jobs; a fast compute plane."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selfevo_lab import git, point_at, quiet

from agent_tools.errors import InfraError, UserError
from agent_tools.git_configs import LabRepo
from selfevo import loop, proposals
from selfevo.agent_prompts import call_message
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.events import Event
from selfevo.state import MAX_STATE_BYTES
from selfevo.store import read_blob, read_events

EDIT = call_message("propose_edit", {"key": "optim.lr", "direction": "decrease", "why": "falls"})
LOOK = call_message("run_digest", {"run": "control-s0"})
PASS = call_message("abstain", {"why": "healthy"})


def kinds(folder: Path, kind: str) -> list[Event]:
    return [e for e in read_events(folder / "events.jsonl")[0] if e.kind == kind]


def say(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# ------------------------------------------------------------------ rules agent, end to end


def test_a_campaign_mends_the_bad_setting(lab: Path, commands: Commands) -> None:
    before = git(lab, "rev-parse", "HEAD"), git(lab, "status", "--porcelain")
    lines: list[str] = []
    code, folder = loop.start(lab, RunOptions(agent="rules"), lines.append, commands)
    view = read_view(folder)
    assert code == 0 and view.state == "done"
    assert [view.rounds[n].verdict for n in (1, 2)] == ["accept", "no_proposal"]
    pr = view.prs[1]
    assert pr.state == "merged" and pr.proposal["agent"] == "rules"
    assert (pr.proposal["before"], pr.proposal["after"]) == (3e-3, 3e-4)
    gate = pr.gate
    assert gate is not None and gate["df"] == 2 and gate["smallest_effect"] > 0
    assert gate["budget_ratio"] == 1.0 and gate["alpha_round"] == 0.025
    # the user's branch, checkout and index never moved
    assert (git(lab, "rev-parse", "HEAD"), git(lab, "status", "--porcelain")) == before
    assert git(lab, "branch", "--show-current") == "main"
    # branches, trailers, memory on the incumbent, once a round
    branches = git(lab, "branch", "--format=%(refname:short)").splitlines()
    assert branches == ["main", "selfevo/c1/incumbent", "selfevo/c1/r1-lower-optim-lr"]
    log = git(lab, "log", "--format=%B", "selfevo/c1/incumbent")
    assert log.count("Selfevo-Gate: accept") == 1 and "Selfevo-Cost:" in log
    notes = git(lab, "show", "selfevo/c1/incumbent:memory/NOTES.md")
    assert notes.count("## c1 r1:") == 1 and notes.count("## c1 r2:") == 1
    assert "r1-candidate-s0" in notes
    assert "lr: 3.0e-4" in git(lab, "show", "selfevo/c1/incumbent:configs/train.yaml")
    # a kept candidate's runs are the next control: nothing is trained twice
    trained = [e.data["job"] for e in kinds(folder, "job.submit") if e.data["kind"] == "train"]
    assert trained == ["r0-control-s0", "r0-control-s1", "r1-candidate-s0", "r1-candidate-s1"]
    assert any("accept" in line for line in lines) and not any("\x1b" in line for line in lines)


def test_both_arms_share_parent_seeds_and_budget(lab: Path, commands: Commands) -> None:
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1, seed=3), quiet, commands)
    from agent_tools.config_text import parse_yaml

    runs = {p.stem: parse_yaml(p.read_text(), p.name) for p in folder.glob("arms/*/r*-s*.yaml")}
    for index in (0, 1):
        control, candidate = runs[f"r0-control-s{index}"], runs[f"r1-candidate-s{index}"]
        assert control["seed"] == candidate["seed"] == 3000 + index
        assert control["budget"] == candidate["budget"] and control["model"] == candidate["model"]
        assert control["optim"]["lr"] != candidate["optim"]["lr"]


def test_state_is_small_and_a_missing_checkpoint_is_no_loss(lab: Path, commands: Commands) -> None:
    from langgraph.checkpoint.sqlite import SqliteSaver

    _, folder = loop.start(lab, RunOptions(agent="rules"), quiet, commands)
    with SqliteSaver.from_conn_string(str(folder / "checkpoints.sqlite")) as saver:
        states = [c.checkpoint["channel_values"] for c in saver.list(None)]
    assert 4 <= len(states) < 20  # old ones are dropped: a thousand rounds stay small
    assert max(len(json.dumps(state, default=str)) for state in states) < MAX_STATE_BYTES
    events = len(read_events(folder / "events.jsonl")[0])
    (folder / "checkpoints.sqlite").unlink()
    code, _ = loop.resume(lab, None, quiet, commands)  # a finished campaign stays finished
    assert code == 0 and len(read_events(folder / "events.jsonl")[0]) == events


def test_an_edit_without_effect_is_indecisive_and_pooled(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    """weight_decay does nothing in the double: a real no-op through the whole loop."""
    edit = call_message(
        "propose_edit", {"key": "optim.weight_decay", "direction": "increase", "why": "try"}
    )
    point_at(lab, model(edit).url)
    _, folder = loop.start(lab, RunOptions(rounds=2), quiet, commands)
    view = read_view(folder)
    assert [view.rounds[n].verdict for n in (1, 2)] == ["indecisive", "indecisive"]
    assert [pr.state for pr in view.prs.values()] == ["open", "open"]
    assert view.control_commit == view.info["commit"]
    # the second try used fresh seeds on both arms, and the gate saw all of them
    gate = view.prs[2].gate
    assert gate is not None and (gate["control_seeds"], gate["candidate_seeds"]) == (4, 4)
    assert {job.index for job in view.jobs.values()} == {0, 1, 2, 3}
    assert len(git(lab, "branch", "--list", "selfevo/c1/r*").splitlines()) == 2


def test_a_worse_edit_is_rejected_and_its_branch_stays(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    text = (lab / "configs/train.yaml").read_text()
    (lab / "configs/train.yaml").write_text(text.replace("lr: 3.0e-3", "lr: 3.0e-4"))
    LabRepo(lab).commit(["configs/train.yaml"], "healthy", worktree=lab)
    worse = call_message("propose_edit", {"key": "optim.lr", "direction": "increase", "why": "go"})
    endpoint = model(worse)
    point_at(lab, endpoint.url)
    _, folder = loop.start(lab, RunOptions(rounds=2), quiet, commands)
    view = read_view(folder)
    assert view.rounds[1].verdict == "reject" and view.prs[1].state == "rejected"
    assert "selfevo/c1/r1-raise-optim-lr" in git(lab, "branch", "--list", "selfevo/*")
    # the same edit again is refused until three strikes; memory told the model
    assert view.rounds[2].verdict == "no_proposal" and view.rounds[2].strikes == 3
    assert "r1 optim.lr increase reject diff -" in json.dumps(endpoint.requests[-1]["messages"])


def test_a_diverged_arm_scores_zero(lab: Path, commands: Commands) -> None:
    text = (lab / "configs/train.yaml").read_text()
    (lab / "configs/train.yaml").write_text(text.replace("lr: 3.0e-3", "lr: 9.0e-2"))
    LabRepo(lab).commit(["configs/train.yaml"], "diverges", worktree=lab)
    _, folder = loop.start(lab, RunOptions(agent="random", rounds=1), quiet, commands)
    view = read_view(folder)
    control = view.arm_scores(view.rounds[0].control_arm)
    assert [s.diverged for s in control] == [True, True] and control[0].score.score == 0.0


def test_a_failing_control_stops_the_loop_and_resume_tries_again(
    lab: Path, commands: Commands
) -> None:
    (lab / "break").write_text("r0-control-s0")
    with pytest.raises(InfraError, match=r"control run r0-control-s0-2 failed .*stderr\.log"):
        loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, commands)
    (lab / "break").unlink()
    code, folder = loop.resume(lab, None, quiet, commands)
    view = read_view(folder)
    assert code == 0 and view.rounds[1].verdict == "accept"
    states = {job.id: job.state for job in view.jobs.values() if job.kind == "train"}
    assert states["r0-control-s0"] == states["r0-control-s0-2"] == "failed"  # one retry a session
    assert states["r0-control-s0-3"] == "done"


def test_a_failing_candidate_is_indecisive_not_zero(lab: Path, commands: Commands) -> None:
    (lab / "break").write_text("r1-candidate")
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, commands)
    view = read_view(folder)
    assert view.rounds[1].verdict == "indecisive" and view.prs[1].state == "open"
    assert "failed" in view.prs[1].gate["reason"]  # type: ignore[index]


def test_hours_used_up_end_the_campaign_with_exit_3(lab: Path, commands: Commands) -> None:
    point_at(lab, "auto", campaign_hours="1.0e-6")
    code, folder = loop.start(lab, RunOptions(agent="rules"), quiet, commands)
    view = read_view(folder)
    assert code == 3 and view.stop_reason == "budget" and view.round == 0
    assert loop.resume(lab, None, quiet, commands)[0] == 3


def test_parent_incumbent_carries_on_from_the_first_seed(lab: Path, commands: Commands) -> None:
    point_at(lab, "auto", parent="incumbent")
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, commands)
    view = read_view(folder)
    assert view.rounds[1].verdict == "accept"
    assert view.control_parent == str(folder / "jobs/r1-candidate-s0/checkpoints/step-5")


def test_wandb_files_and_side_cars_are_named_as_the_source(lab: Path, commands: Commands) -> None:
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, commands)
    digests = kinds(folder, "digest")
    assert [e.data["run"] for e in digests] == ["control-s0", "control-s1"]
    assert {e.data["source"] for e in digests} == {"sidecar"}  # the double writes no .wandb file
    assert "valid_falling" in [f["name"] for f in digests[0].data["findings"]]


# ------------------------------------------------------------------ the model as agent


def test_the_model_reads_a_digest_and_its_words_are_recorded(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    endpoint = model(LOOK, EDIT, PASS)
    point_at(lab, endpoint.url)
    code, folder = loop.start(lab, RunOptions(), quiet, commands)
    view = read_view(folder)
    assert code == 0 and view.rounds[1].verdict == "accept"
    assert view.rounds[2].note == "abstained: healthy"
    second = endpoint.requests[1]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "tool"]
    assert "valid_frac" in second["messages"][-1]["content"]
    assert "lr 0.003" not in json.dumps(endpoint.requests[0])  # a digest carries the evidence
    # what was sent is what was recorded, byte for byte in meaning
    asked = kinds(folder, "agent.request")
    for event, sent in zip(asked, endpoint.requests, strict=True):
        assert json.loads(read_blob(folder, event.data["blob"])) == sent
    assert "r1 optim.lr decrease accept diff +" in endpoint.requests[2]["messages"][1]["content"]


def test_malformed_calls_are_answered_and_three_strikes_end_the_step(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    cut = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "a",
                "type": "function",
                "function": {"name": "propose_edit", "arguments": '{"key": "optim.lr", "dire'},
            }
        ],
    }
    endpoint = model(say("let me think"), cut, call_message("run_digest", {"run": "nope"}), PASS)
    point_at(lab, endpoint.url)
    _, folder = loop.start(lab, RunOptions(rounds=2), quiet, commands)
    view = read_view(folder)
    first = view.rounds[1]
    assert first.verdict == "no_proposal" and first.strikes == 3
    assert "no such run" in first.note
    answers = [m["content"] for m in endpoint.requests[2]["messages"] if m["role"] == "user"]
    assert any(
        "no tool call" in a and "propose_edit ( key , direction , why )" in a for a in answers
    )
    assert view.rounds[2].note == "abstained: healthy"  # strikes do not carry over


def test_a_repeated_look_is_a_strike_and_the_calls_are_bounded(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    point_at(lab, model(LOOK).url)
    _, folder = loop.start(lab, RunOptions(rounds=1), quiet, commands)
    first = read_view(folder).rounds[1]
    assert first.verdict == "no_proposal" and "asked twice" in first.note and first.calls == 4


def test_a_refused_edit_is_an_event_and_goes_back_to_the_model(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    far = call_message(
        "propose_edit", {"key": "optim.lr", "direction": "decrease", "why": "far", "value": 1e-6}
    )
    wrong = call_message(
        "propose_edit",
        {"key": "optim.lr", "direction": "decrease", "why": "wrong way", "value": 0.01},
    )
    endpoint = model(far, wrong, EDIT, PASS)
    point_at(lab, endpoint.url)
    _, folder = loop.start(lab, RunOptions(rounds=1), quiet, commands)
    view = read_view(folder)
    guards = kinds(folder, "guard")
    assert [e.data["ok"] for e in guards] == [False, True]
    assert "largest step" in guards[0].data["reasons"][0]
    assert "largest step" in endpoint.requests[1]["messages"][-1]["content"]
    assert "does not decrease" in endpoint.requests[2]["messages"][-1]["content"]
    assert view.rounds[1].verdict == "accept" and len(view.prs) == 1


def test_looking_tools_answer_from_the_lab(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    endpoint = model(
        call_message("config_get", {"key": "optim.lr"}),
        call_message("memory_read", {}),
        call_message("skill_read", {"name": "job-debug"}),
        call_message("skill_read", {"name": "../../selfevo.yaml"}),
        PASS,
    )
    point_at(lab, endpoint.url)
    loop.start(lab, RunOptions(rounds=1), quiet, commands)
    results = [m["content"] for m in endpoint.requests[-1]["messages"] if m["role"] == "tool"]
    assert results[0] == "optim.lr 0.003" and "Notes" in results[1]
    assert "marks" in results[2] and "no such skill" in results[3]


@pytest.mark.parametrize("garbage", [b"<html>", b"{}", b'{"choices": []}', 500, 404])
def test_garbage_from_the_endpoint_ends_with_exit_5_and_resume_goes_on(
    lab: Path, commands: Commands, model: Callable[..., Any], garbage: object
) -> None:
    endpoint = model(garbage)
    point_at(lab, endpoint.url)
    with pytest.raises(InfraError, match=r"model endpoint http://.*selfevo resume"):
        loop.start(lab, RunOptions(rounds=1), quiet, commands)
    endpoint.replies[:] = [PASS]
    code, folder = loop.resume(lab, None, quiet, commands)
    view = read_view(folder)
    assert code == 0 and view.rounds[1].verdict == "no_proposal"
    assert sum(1 for job in view.jobs.values() if job.kind == "train") == 2


def test_an_endpoint_that_is_down_is_found_before_anything_is_trained(
    lab: Path, commands: Commands
) -> None:
    point_at(lab, "http://127.0.0.1:9/v1")
    with pytest.raises(InfraError, match="no connection"):
        loop.start(lab, RunOptions(), quiet, commands)
    assert not list((lab / "runs/c1/jobs").glob("r*"))


def test_the_key_reaches_the_endpoint_and_no_file(
    lab: Path, commands: Commands, model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-value")
    endpoint = model(PASS)
    point_at(lab, endpoint.url)
    loop.start(lab, RunOptions(rounds=1), quiet, commands)
    assert endpoint.keys == ["Bearer sk-secret-value"]
    files = [path for path in lab.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"sk-secret-value" in path.read_bytes()]


# ------------------------------------------------------------------ review


def test_review_always_waits_and_the_words_reach_the_next_prompt(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    endpoint = model(
        EDIT,
        call_message(
            "propose_edit", {"key": "optim.warmup_steps", "direction": "increase", "why": "softer"}
        ),
        PASS,
    )
    point_at(lab, endpoint.url)
    options = RunOptions(review="always", rounds=2)
    code, folder = loop.start(lab, options, quiet, commands)
    assert code == 4 and read_view(folder).state == "waiting"
    assert loop.resume(lab, None, quiet, commands)[0] == 4  # still nobody has answered
    assert len(endpoint.requests) == 1

    with loop.opened(lab, "c1") as c:
        with pytest.raises(UserError, match="needs a reason"):
            proposals.answer(c, 1, "reject", " ")
        proposals.answer(c, 1, "request_changes", "try the warm-up\x1b[31m instead")
        with pytest.raises(UserError, match="answered already"):
            proposals.answer(c, 1, "approve", "")
    code, _ = loop.resume(lab, None, quiet, commands)
    assert code == 4
    prompt = endpoint.requests[1]["messages"][1]["content"]
    assert "try the warm-up" in prompt and "revise optim.lr decrease" in prompt
    assert "\x1b" not in prompt
    view = read_view(folder)
    pr = view.prs[1]
    assert len(view.prs) == 1 and len(set(pr.commits)) == 2 and view.round == 1
    assert pr.proposal["key"] == "optim.warmup_steps"
    assert git(lab, "rev-list", "--count", f"main..{pr.branch}") == "2"

    with loop.opened(lab, "c1") as c:
        proposals.answer(c, 1, "reject", "keep the warm-up as it is")
    code, _ = loop.resume(lab, None, quiet, commands)
    view = read_view(folder)
    assert code == 0 and view.rounds[1].verdict == "rejected_by_review"
    assert view.rounds[2].verdict == "no_proposal"
    assert "keep the warm-up as it is" in endpoint.requests[2]["messages"][1]["content"]
    notes = git(lab, "show", "selfevo/c1/incumbent:memory/NOTES.md")
    assert "keep the warm-up as it is" in notes and view.human_acts == 2
    trained = [e for e in kinds(folder, "job.submit") if e.data["role"] == "candidate"]
    assert trained == []  # what nobody approved was never run


def test_changes_may_be_asked_for_twice_and_approve_runs_it(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    edits = [
        call_message("propose_edit", {"key": key, "direction": "increase", "why": "x"})
        for key in ("optim.warmup_steps", "optim.weight_decay")
    ]
    point_at(lab, model(*edits, EDIT).url)
    _, folder = loop.start(lab, RunOptions(review="always", rounds=1), quiet, commands)
    for _ in range(2):
        with loop.opened(lab, "c1") as c:
            proposals.answer(c, 1, "request_changes", "another one")
        assert loop.resume(lab, None, quiet, commands)[0] == 4
    with loop.opened(lab, "c1") as c:
        with pytest.raises(UserError, match="approve or reject"):
            proposals.answer(c, 1, "request_changes", "again")
        proposals.answer(c, 1, "approve", "")
    code, _ = loop.resume(lab, None, quiet, commands)
    view = read_view(folder)
    assert code == 0 and view.rounds[1].verdict == "accept" and len(view.prs[1].commits) == 3
    diff = read_blob(folder, view.prs[1].diff).decode()
    assert "+  lr: 3.0e-4" in diff and "warmup" not in [
        x[3:9] for x in diff.splitlines() if x.startswith("+ ")
    ]


def test_a_person_may_edit_the_branch_but_not_past_the_guard(lab: Path, commands: Commands) -> None:
    _, folder = loop.start(
        lab, RunOptions(agent="rules", review="always", rounds=1), quiet, commands
    )
    tree = folder / "worktrees" / "r1-lower-optim-lr"
    train = tree / "configs/train.yaml"
    repo = LabRepo(lab)
    train.write_text(train.read_text().replace("lr: 3.0e-4", "lr: 6.0e-4"))
    edited = repo.commit(["configs/train.yaml"], "a little more", worktree=tree)
    with loop.opened(lab, "c1") as c:
        proposals.answer(c, 1, "approve", "edited")
    assert loop.resume(lab, None, quiet, commands)[0] == 0
    view = read_view(folder)
    assert view.prs[1].commit == edited and view.rounds[1].verdict == "accept"

    _, folder = loop.start(
        lab, RunOptions(agent="rules", review="always", rounds=1), quiet, commands
    )
    tree = folder / "worktrees" / "r1-lower-optim-lr"
    (tree / "selfevo.yaml").write_text("rounds: 9\n")
    repo.commit(["selfevo.yaml"], "sneak", worktree=tree)
    with loop.opened(lab, "c2") as c, pytest.raises(UserError, match="protected"):
        proposals.answer(c, 1, "approve", "")


# ------------------------------------------------------------------ merge, integrity


def test_merge_into_moves_only_the_named_branch(lab: Path, commands: Commands) -> None:
    _, _ = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, commands)
    git(lab, "branch", "release")
    with loop.opened(lab, "c1") as c:
        first = proposals.merge_into(c, 1, "release")
        assert proposals.merge_into(c, 1, "release") == first  # once
        with pytest.raises(UserError, match="belongs to the loop"):
            proposals.merge_into(c, 1, "selfevo/c1/incumbent")
        with pytest.raises(UserError, match="no branch"):
            proposals.merge_into(c, 1, "nowhere")
    assert git(lab, "rev-parse", "release") == first != git(lab, "rev-parse", "main")
    assert "lr: 3.0e-3" in (lab / "configs/train.yaml").read_text()
    with loop.opened(lab, "c1") as c:
        proposals.merge_into(c, 1, "main")
    assert "lr: 3.0e-4" in (lab / "configs/train.yaml").read_text()
    assert git(lab, "status", "--porcelain") == ""


def test_tampering_with_an_arm_voids_the_score(
    lab: Path, commands: Commands, tmp_path: Path
) -> None:
    import sys

    script = tmp_path / "tamper.py"
    double = Path(__file__).with_name("selfevo_double.py")
    script.write_text(
        "import runpy, sys, pathlib\n"
        "for p in pathlib.Path.cwd().glob('arms/*/scaffold/system.md'): p.write_text('cheat')\n"
        f"sys.argv[0] = {str(double)!r}\n"
        f"runpy.run_path({str(double)!r}, run_name='__main__')\n"
    )
    bad = replace(commands, evaluate=(sys.executable, str(script), "evaluate"))
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, bad)
    view = read_view(folder)
    assert view.rounds[1].verdict == "void" and view.prs[1].state == "rejected"
    assert view.control_arm == view.rounds[0].control_arm
