"""`selfevo doctor` on set-ups that are broken in one way each: found, and the repair named."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selfevo_lab import point_at

from agent_tools.errors import UserError
from agent_tools.git_configs import LabRepo
from selfevo import doctor
from selfevo.agent_prompts import call_message
from selfevo.arms import Commands
from selfevo.doctor import Result
from selfevo.lab import init_lab


def tried(name: str, lab: Path | None = None, commands: Commands | None = None) -> Result:
    return next(doctor.examine(lab, commands, [name]))


def told(name: str, lab: Path | None = None, **env: str) -> Result:
    """The same through the command line, in another environment; exit code 1 where it fails."""
    command = [sys.executable, "-m", "selfevo.cli", "doctor", "--json", "--only", name]
    done = subprocess.run(
        [*command, *([str(lab)] if lab else [])],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **env},
    )
    record: dict[str, Any] = json.loads(done.stdout)
    result = Result(**record["checks"][0])
    assert done.returncode == (0 if result.status == "ok" else 1) and done.stderr == ""
    return result


def broken(result: Result, *words: str) -> None:
    """Failed, with all these words in what is wrong or in the repair."""
    assert result.status == "failed", result
    assert result.repair, result
    for word in words:
        assert word in f"{result.detail} / {result.repair}", result


@pytest.fixture
def plain_lab(tmp_path: Path) -> Path:
    init_lab(tmp_path / "plain")
    return tmp_path / "plain"


def program(folder: Path, name: str, body: str) -> str:
    """A program of that name, first on the path; returns the path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# ------------------------------------------------------------------ what works


def test_a_working_set_up_passes_and_leaves_nothing(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    point_at(lab, model(call_message("abstain", {"why": "healthy"})).url)
    before = sorted(lab.rglob("*"))
    results = list(doctor.examine(lab, commands))
    bad = [r for r in results if r.status != "ok" and r.name != "identity"]
    assert not bad and [r.name for r in results] == [check.name for check in doctor.CHECKS]
    assert [path for path in sorted(lab.rglob("*")) if ".git" not in path.parts] == [
        path for path in before if ".git" not in path.parts
    ]
    assert LabRepo(lab).branches("selfevo/") == []


def test_a_check_that_nobody_knows_is_a_usage_error() -> None:
    with pytest.raises(UserError, match="--only nothing: choose from lab, disk, git"):
        next(doctor.examine(None, only=["nothing"]))


def test_what_needs_a_failed_part_is_skipped_and_the_text_names_the_repair(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "selfevo.cli", "doctor", "--only", "data", "--only", "grader"]
    env = {**os.environ, "SELFEVO_DATA": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[0].startswith("FAILED   data")
    assert lines[1].split() == [
        "repair:", "run", "`python", "-m", "agent_tools.mle_bench", "prepare", "--suite",
        "offline-small-v0`",
    ]  # fmt: skip
    assert lines[2].split() == ["skipped", "grader", "needs", "data"]
    assert lines[3] == "1 of 2 checks failed: data"


# ------------------------------------------------------------------ one broken part each


def test_no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, *a, **k: None if name == "bwrap" else real(name, *a, **k)
    )
    broken(tried("sandbox"), "bubblewrap is not installed", "apt-get install bubblewrap")


def test_a_sandbox_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = 'case "$1" in --version) echo bubblewrap 0.8.0;; *) exit 1;; esac'
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "bwrap", refuses))
    result = tried("sandbox")
    broken(result, "worker did not start")
    assert result.repair.startswith("run `") or result.repair.startswith("allow user namespaces")


def test_no_git_identity(tmp_path: Path, plain_lab: Path) -> None:
    nobody = {"HOME": str(tmp_path), "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    none = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL"), "")
    broken(told("identity", plain_lab, **nobody, **none), "no user.name", "git config --global")
    named = told(
        "identity", plain_lab, **nobody, GIT_AUTHOR_NAME="A", GIT_AUTHOR_EMAIL="a@example.org"
    )
    assert (named.status, named.detail) == ("ok", "A <a@example.org>")


def test_an_old_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", program(tmp_path / "bin", "git", "echo git version 2.17.1"))
    broken(tried("git"), "git version 2.17.1 is too old", "2.31")


def test_a_full_disk() -> None:
    """On a real file system of 30 MB."""
    inside = (
        "import sys; from pathlib import Path\n"
        "from selfevo.lab import init_lab; from selfevo import doctor\n"
        "init_lab(Path('/mnt/lab')); print(next(doctor.examine(Path('/mnt/lab'), only=['disk'])))\n"
    )
    done = subprocess.run(
        ["bwrap", "--dev-bind", "/", "/", "--size", "30000000", "--tmpfs", "/mnt",
         sys.executable, "-c", inside],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "status='failed'" in done.stdout, done.stderr
    assert "MB free in /mnt/lab/runs" in done.stdout and "free some space" in done.stdout


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("raise ImportError('libtorch.so is missing')", "libtorch.so is missing"),
        ("__version__ = '1.13.1'\nclass ones:\n  def __init__(s, *a): pass\n  def sum(s): return 4",
         "torch 1.13.1 is too old"),
    ],
)  # fmt: skip
def test_the_wrong_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken(tried("torch"), words, "make setup")


def test_an_unreadable_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    monkeypatch.setenv("SELFEVO_SCRIPT_PYTHON", str(python))
    broken(tried("environments"), f"no Python for policy scripts at {python}", "make setup")
    python.write_bytes(b"\x7fELF\x02\x01" + bytes(90))  # no program that any kernel starts
    python.chmod(0o755)
    broken(tried("environments"), "does not start", "rm -rf .venv-script", "make setup")
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -c "import nothing_of_that_name"\n')
    broken(tried("environments"), "nothing_of_that_name", "make setup")


def test_data_that_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFEVO_DATA", str(tmp_path))
    broken(tried("data"), "is not prepared", "agent_tools.mle_bench prepare")


def test_a_dead_endpoint(lab: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
    point_at(lab, f"http://127.0.0.1:{number}/v1", timeout_s="5")
    broken(tried("model", lab), "no connection", f"nothing listens on port {number}", "model.serve")


@pytest.fixture
def mute() -> Iterator[int]:
    """The port of a program that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_another_program_has(lab: Path, mute: int) -> None:
    point_at(lab, f"http://127.0.0.1:{mute}/v1", timeout_s="0.5")
    broken(
        tried("model", lab),
        "no answer within 0.5 s",
        f"port {mute} is taken by",
        f"(pid {os.getpid()})",
        "another port",
    )


def test_an_endpoint_that_answers_garbage(lab: Path, model: Callable[..., Any]) -> None:
    point_at(lab, model(b"<html>hello</html>").url)
    broken(tried("model", lab), "not a chat completion", "agent.base_url")


def test_an_endpoint_without_tool_calls(lab: Path, model: Callable[..., Any]) -> None:
    point_at(lab, model({"role": "assistant", "content": "I would lower it."}).url)
    broken(tried("model", lab), "not with a tool call", "a model with tool calling")


def test_a_lab_that_is_none(tmp_path: Path, plain_lab: Path) -> None:
    broken(tried("lab", tmp_path / "nowhere"), "no such folder", "selfevo init")
    (tmp_path / "empty").mkdir()
    broken(tried("lab", tmp_path / "empty"), "repository")
    (plain_lab / "selfevo.yaml").write_text("roundz: 2\n")
    broken(tried("lab", plain_lab), "unknown key 'roundz'", "'rounds'")
    (plain_lab / "selfevo.yaml").write_text("rounds: 3\n")
    broken(tried("lab", plain_lab), "protected file selfevo.yaml", "commit them", "checkout --")


def test_a_trainer_that_refuses_the_configuration(plain_lab: Path) -> None:
    """The real trainer, on a key that it does not know."""
    train = plain_lab / "configs/train.yaml"
    train.write_text(train.read_text() + "optimm: {lr: 1}\n")
    LabRepo(plain_lab).commit(["configs/train.yaml"], "typo", worktree=plain_lab)
    broken(tried("trainer", plain_lab), "exit code 2", "optimm", "--dry-run")


def test_a_trainer_that_fails(lab: Path, commands: Commands) -> None:
    train = lab / "configs/train.yaml"
    train.write_text(train.read_text().replace("lr: 3.0e-3", "lr: 9.9e-2"))
    broken(tried("trainer", lab, commands), "exit code 6")


@pytest.mark.real
def test_the_whole_of_it_with_the_real_model_and_trainer(plain_lab: Path) -> None:
    results = list(doctor.examine(plain_lab))
    assert [r for r in results if r.status != "ok" and r.name != "identity"] == []
