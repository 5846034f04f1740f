"""mini-swe-agent as released, in the sandbox, behind the gateway (`make setup-agents`)."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from agent_parts import TOKENIZER, ScriptedEngine, gateway
from mle_tasks import made_up

from agent_tools.errors import UserError
from agent_tools.mle_agent.model_client import BundledServer
from agent_tools.paths import agents_python, repo_root
from rl.agents.registry import agent_env
from rl.agents.tasks import FolderTaskset
from rl.envs.mle.env import make_task
from rl.envs.mle.verifier import Verifier
from rl.types import Sampling, Task

pytestmark = pytest.mark.real

BROKEN = "def mean(values):\n    return sum(values) / (len(values) + 1)\n"
CHECK = "from stats import mean\nassert mean([1, 2, 6]) == 3\nassert mean([4]) == 4\n"
COMMANDS = (
    "cat stats.py && touch /home/data/x; ls /work; env | grep -c SECRET",
    "sed -i 's/ (len(values) + 1)/ len(values)/' stats.py && cat stats.py",
    "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT",
)
OPTIONS = {"grader": {"kind": "command", "command": ["python3", "check.py"]}, "steps": 6}


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    try:
        python = agents_python()
    except UserError as error:
        pytest.skip(f"package: {error}")
    code = (
        "from importlib.metadata import version as v\n"
        "print(*(f'{n}=={v(n)}' for n in ('mini-swe-agent', 'litellm')))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    project = tomllib.loads((repo_root() / "pyproject.toml").read_text())["project"]
    assert done.stdout.split() == project["optional-dependencies"]["agents"], done.stderr


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Task]:
    """A module with a fault; the grader has tests that the agent does not see."""
    folder = tmp_path / "tasks" / "mean"
    for name in ("files", "tests"):
        (folder / name).mkdir(parents=True)
    (folder / "prompt.md").write_text("mean() in stats.py is wrong. Repair it.\n")
    (folder / "files" / "stats.py").write_text(BROKEN)
    (folder / "tests" / "check.py").write_text(CHECK)
    yield FolderTaskset(tmp_path / "tasks").task("mean")
    assert (folder / "files" / "stats.py").read_text() == BROKEN


def command(text: str) -> str:
    return (
        'I look and act.\n<minimax:tool_call>\n<invoke name="bash">\n'
        f'<parameter name="command">{text}</parameter>\n</invoke>\n</minimax:tool_call>'
    )


def test_it_repairs_a_module_and_every_id_is_recorded(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    commands = iter(COMMANDS)
    keep = tmp_path / "kept"
    agent = agent_env("mini-swe-agent", {**OPTIONS, "keep": str(keep)})
    with (
        ScriptedEngine(lambda prompt: command(next(commands))) as engine,
        gateway(engine.url, tmp_path) as stage,
    ):
        base_url = stage.open("g0-0.0", sampling={"max_tokens": 512})
        reward = agent.run(replace(task, episode="g0-0.0"), base_url, "key", 120)
        calls = stage.close("g0-0.0")
    printed = (keep / "g0-0.0" / "stdout.txt").read_text()
    trajectory = json.loads((keep / "g0-0.0" / "logs" / "trajectory.json").read_text())
    assert trajectory["info"]["exit_status"] == "Submitted"
    assert (reward.outcome, reward.status) == (1.0, "done"), printed
    told = [(tuple(prompt), tuple(ids)) for prompt, ids in engine.drawn]
    assert [(call.prompt_ids, call.response_ids) for call in calls] == told
    assert len(calls) == 3
    for before, call in pairwise(calls):
        whole = before.prompt_ids + before.response_ids
        assert call.prompt_ids[: len(whole)] == whole
    shown = TOKENIZER.decode(calls[2].prompt_ids)
    assert "mean() in stats.py is wrong" in shown
    assert "Read-only file system" in shown
    assert "cannot access \\u0027/work\\u0027" in shown
    assert "directory\\n0\\n" in shown  # no variable of ours is there


def test_it_hands_in_to_a_competition(tmp_path: Path) -> None:
    competition = made_up(tmp_path / "data", "train")
    commands = iter(
        [
            "sed 's/,0.5$/,0.0/' $DATA_DIR/sample_submission.csv > /home/submission/submission.csv",
            "/home/validate_submission.sh /home/submission/submission.csv",
            COMMANDS[-1],
        ]
    )
    agent = agent_env("mini-swe-agent", {}, verifier=Verifier({"made-up": competition}))
    with (
        ScriptedEngine(lambda prompt: command(next(commands))) as engine,
        gateway(engine.url, tmp_path) as stage,
    ):
        base_url = stage.open("g1-0.0", sampling={"max_tokens": 512})
        attempt = replace(make_task(competition, "dev"), episode="g1-0.0")
        reward = agent.run(attempt, base_url, "key", 120)
        calls = stage.close("g1-0.0")
    assert reward.status == "done"
    assert 0 < reward.outcome < 1
    assert '"output": "valid' in TOKENIZER.decode(calls[2].prompt_ids)


def test_the_nano_behind_it_is_recorded_whatever_it_can_do(task: Task, tmp_path: Path) -> None:
    """It was never taught this agent's words: only the record and the end are promised."""
    agent = agent_env("mini-swe-agent", {**OPTIONS, "steps": 2})
    with (
        BundledServer() as server,
        gateway(server.base_url.removesuffix("/v1"), tmp_path) as stage,
    ):
        base_url = stage.open("g0-1.0", sampling={"max_tokens": 24, "seed": 1})
        attempt = replace(task, episode="g0-1.0", sampling=Sampling(1.0, 24, 1))
        reward = agent.run(attempt, base_url, "key", 120)
        calls = stage.close("g0-1.0")
    assert (reward.outcome, reward.status) == (0.0, "done")
    assert 1 <= len(calls) <= 3
    for call in calls:
        assert len(call.response_ids) == len(call.logprobs) <= 24
        assert call.tokenizer_hash == TOKENIZER.hash


def test_it_is_stopped_at_the_deadline(task: Task, tmp_path: Path) -> None:
    with (
        ScriptedEngine(lambda prompt: command("sleep 600")) as engine,
        gateway(engine.url, tmp_path) as stage,
    ):
        base_url = stage.open("g0-2.0", sampling={"max_tokens": 512})
        agent = agent_env("mini-swe-agent", OPTIONS)
        reward = agent.run(replace(task, episode="g0-2.0"), base_url, "key", 15)
    assert (reward.outcome, reward.status) == (0.0, "timeout")
