"""Kept changes are measured again with fresh seeds; what fails is taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from selfevo_lab import git, point_at, quiet

from agent_tools.config_text import ConfigError
from agent_tools.errors import UserError
from selfevo import loop, proposals, replay, report
from selfevo.arms import Commands, train_seed
from selfevo.campaign import RunOptions, read_view
from selfevo.config import load_lab_config
from selfevo.gate import FRESH, SeedScore, confirm
from selfevo.store import read_events
from selfevo.text import time_rows


def arm(*scores: float, infra: int = 0) -> list[SeedScore]:
    return [SeedScore(i, s, 0.0, 32, infra) for i, s in enumerate(scores)]


# ------------------------------------------------------------------ the pure function


def test_confirmed_is_the_gates_test_on_fresh_seeds_alone() -> None:
    control, candidate = [40.0, 42.0, 44.0], [45.0, 47.5, 46.0]
    p = stats.ttest_ind(candidate, control, alternative="greater").pvalue
    for alpha, verdict in ((p * 1.01, "confirmed"), (p * 0.99, "failed")):
        found, result = confirm(arm(*control), arm(*candidate), alpha=alpha)
        assert found == verdict and result.p_better == pytest.approx(p)
    assert confirm(arm(40.0, 41.0), arm(20.0, 21.0), alpha=0.1)[0] == "failed"
    assert confirm(arm(40.0, 40.0), arm(40.0, 40.0), alpha=0.1)[0] == "failed"


def test_what_the_machine_lost_confirms_nothing_and_takes_nothing_back() -> None:
    for candidate in ((80.0, 81.0), (1.0, 2.0)):
        found, result = confirm(arm(40.0, 41.0), arm(*candidate, infra=20), alpha=0.1)
        assert found == "unconfirmed" and "machine" in result.reason
    assert confirm(arm(40.0), arm(80.0), alpha=0.1)[0] == "unconfirmed"


seeds = st.lists(st.floats(0, 100), min_size=2, max_size=5)


@given(seeds, seeds, st.floats(0.01, 0.49))
def test_nothing_is_confirmed_that_is_not_better(
    a: list[float], b: list[float], alpha: float
) -> None:
    found, result = confirm(arm(*a), arm(*b), alpha=alpha)
    assert found in ("confirmed", "failed")
    assert result.difference > 0 or found == "failed"


def test_one_fresh_seed_is_refused_and_their_seeds_are_their_own() -> None:
    with pytest.raises(ConfigError, match=r"gate.confirm_seeds: must be 0 .off. or at least 2"):
        load_lab_config("gate: {confirm_seeds: 1}")
    plain = {train_seed(c, i) for c in range(20) for i in range(1000)}
    fresh = {train_seed(c, FRESH + i) for c in range(20) for i in range(1000)}
    assert len(plain) == len(fresh) == 20_000 and not plain & fresh
    assert max(fresh) < 2**31


# ------------------------------------------------------------------ in the loop


def test_a_kept_change_that_holds_is_confirmed(lab: Path, commands: Commands) -> None:
    point_at(lab, "auto", confirm_seeds="2")
    lines: list[str] = []
    options = RunOptions(agent="rules", rounds=1, seed=3)
    code, folder = loop.start(lab, options, lines.append, commands)
    view = read_view(folder)
    found = view.prs[1].confirmation
    assert code == 0 and view.rounds[1].verdict == "accept" and view.prs[1].state == "merged"
    assert found is not None and found["verdict"] == "confirmed"
    # own seeds, in pairs, used by nothing before
    trained = [job for job in view.jobs.values() if job.kind == "train"]
    usual = {job.seed for job in trained if job.index < FRESH}
    fresh = [(job.id, job.seed) for job in trained if job.index >= FRESH]
    assert usual == {3000, 3001}
    first = train_seed(3, FRESH)
    assert fresh == [
        (f"r1-confirm-{role}-s{i}", first - i) for role in ("control", "candidate") for i in (0, 1)
    ]
    # own accounts: the gate's numbers are those of a campaign without confirmation
    gate = view.prs[1].gate
    assert gate is not None and gate["candidate_seeds"] == 2
    assert gate["candidate_cost"]["runs"] == found["candidate_cost"]["runs"] == 2
    assert "confirming kept changes" in [label for label, _ in time_rows(view)]
    assert any("confirmed" in line for line in lines)
    assert "fresh seeds: " in git(lab, "show", "selfevo/c1/incumbent:memory/NOTES.md")


def test_a_kept_change_that_fails_is_taken_back(lab: Path, commands: Commands) -> None:
    (lab / "fluke").touch()
    point_at(lab, "auto", confirm_seeds="2")
    _, folder = loop.start(lab, RunOptions(agent="rules"), quiet, commands)
    view = read_view(folder)
    pr, base = view.prs[1], view.rounds[0].control_arm
    assert pr.gate is not None and pr.gate["verdict"] == "accept"  # it was kept first
    assert pr.state == "reverted" and view.rounds[1].verdict == "reverted"
    assert pr.confirmation is not None and pr.confirmation["verdict"] == "failed"
    # one revert commit with trailers; the incumbent is the old configuration again
    log = git(lab, "log", "--format=%H %s%n%b", "selfevo/c1/incumbent")
    assert log.count("Selfevo-Reverts: ") == 1
    assert f"Selfevo-Reverts: {pr.merge_commit}" in log and "Selfevo-Gate: failed" in log
    main = git(lab, "show", "main:configs/train.yaml")
    assert git(lab, "show", "selfevo/c1/incumbent:configs/train.yaml") == main
    assert git(lab, "show", f"{pr.branch}:configs/train.yaml") != main  # the branch stays
    # the next round starts from the old control, and does not try the same again
    assert view.rounds[2].control_arm == view.control_arm == base
    assert view.control_commit == view.info["commit"]
    # its runs have not changed, so their digests are named and not told again
    assert view.rounds[2].digests == view.rounds[1].digests
    events = read_events(folder / "events.jsonl")[0]
    repeated = [e.data for e in events if e.kind == "digest" and e.round == 2]
    assert [data["as_in_round"] for data in repeated] == [1, 1]
    assert all(p.proposal["key"] != "optim.lr" for n, p in view.prs.items() if n > 1)
    assert view.memory[0]["line"].startswith("r1 optim.lr decrease reverted diff")
    # every view tells it
    told: list[str] = []
    replay.show(folder, told.append)
    assert any("reverted as" in line for line in told)
    for path in report.write(folder):
        text = path.read_text()
        assert "fresh seeds: " in text and "taken back" in text
    with loop.opened(lab, "c1") as c, pytest.raises(UserError, match="PR 1 is reverted"):
        proposals.merge_into(c, 1, "main")


def test_a_failing_fresh_candidate_leaves_the_change_unconfirmed(
    lab: Path, commands: Commands
) -> None:
    (lab / "break").write_text("r1-confirm-candidate")
    point_at(lab, "auto", confirm_seeds="2")
    _, folder = loop.start(lab, RunOptions(agent="rules", rounds=1), quiet, commands)
    view = read_view(folder)
    found = view.prs[1].confirmation
    assert found is not None and found["verdict"] == "unconfirmed"
    assert view.prs[1].state == "merged" and view.rounds[1].verdict == "accept"
    kinds = [event.kind for event in read_events(folder / "events.jsonl")[0]]
    assert "pr.revert" not in kinds
