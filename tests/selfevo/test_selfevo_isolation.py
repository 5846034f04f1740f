"""What a lab does on a host that lacks a protection: it warns, or refuses where it must."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from agent_tools.config_text import parse_yaml
from agent_tools.errors import UserError
from agent_tools.git_configs import LabRepo
from selfevo import arms, campaign, doctor
from selfevo.arms import Commands
from selfevo.campaign import RunOptions
from selfevo.config import TRAIN_CONFIG, BudgetSection, EvalConfig
from selfevo.lab import init_lab

LACK = "no control group, so memory is held by polling only: run as root"


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that gives no control group, with everything else in its place."""
    monkeypatch.setattr("agent_tools.sandbox.missing_protections", lambda _kind: (LACK,))
    monkeypatch.setattr(campaign, "check_machine", lambda *_suites: None)


def start(lab: Path, commands: Commands) -> list[str]:
    """Makes a campaign that looks at its machine; what it said."""
    said: list[str] = []
    looking = dataclasses.replace(commands, check_machine=True)
    made = campaign.create(lab, LabRepo(lab), RunOptions(agent="rules"), said.append, looking)
    made.close()
    return said


def test_a_lab_warns_and_goes_on(lacking: None, tmp_path: Path, commands: Commands) -> None:
    init_lab(tmp_path / "lab")
    assert f"sandbox: {LACK}" in start(tmp_path / "lab", commands)


def test_a_lab_that_requires_full_isolation_refuses_with_nothing_written(
    lacking: None, tmp_path: Path, commands: Commands
) -> None:
    lab = tmp_path / "lab"
    init_lab(lab, full_isolation=True)
    with pytest.raises(UserError, match="full isolation is required, but missing here") as error:
        start(lab, commands)
    assert error.value.exit_code == 2 and "run as root" in str(error.value)
    assert not (lab / "runs").exists() and LabRepo(lab).branches("selfevo/") == []


def test_a_host_that_gives_everything_starts_a_lab_that_requires_it(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_tools.sandbox.missing_protections", lambda _kind: ())
    monkeypatch.setattr(campaign, "check_machine", lambda *_suites: None)
    init_lab(tmp_path / "lab", full_isolation=True)
    assert not [line for line in start(tmp_path / "lab", commands) if "sandbox" in line]


def test_every_job_of_such_a_lab_requires_it_too(tmp_path: Path) -> None:
    for full in (False, True):
        lab = tmp_path / str(full)
        init_lab(lab, full_isolation=full)
        text = (lab / TRAIN_CONFIG).read_text()
        argv = Commands().evaluate_argv(
            Path("checkpoint"), lab / "configs", "suite", EvalConfig(), BudgetSection(), Path("out")
        )
        assert ("--require-full-isolation" in argv) is full
        run = arms.run_config(
            text, BudgetSection(), suite="suite", parent="nano", seed=0, scaffold=None,
            group="g", name="n",
        )  # fmt: skip
        assert parse_yaml(run, "RUN.yaml")["sandbox"] == {
            "kind": "bubblewrap", "workers": 2, "require_full_isolation": full,
        }  # fmt: skip
        assert "#" in text


def test_doctor_fails_where_the_lab_requires_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_tools.sandbox.bubblewrap.make_cgroup", lambda *_: None)
    for full, status in ((False, "ok"), (True, "failed")):
        lab = tmp_path / str(full)
        init_lab(lab, full_isolation=full)
        (result,) = doctor.examine(lab, only=["sandbox"])
        assert result.status == status
        assert "no control group" in result.detail
    assert result.repair
