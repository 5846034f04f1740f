"""Programs as agents: environment, folder, deadline, process group, graders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mle_tasks import made_up

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent_tools"))

from mle_model_double import ModelDouble

from rl.agents.command import CommandAgent
from rl.agents.host import run_group
from rl.agents.langgraph_env import LangGraphAgent
from rl.agents.registry import KINDS, agent_env, own_tasks
from rl.agents.tasks import FolderTaskset
from rl.agents.white_box import WhiteBoxAgent
from rl.config import RunConfig, validate
from rl.envs.mle.env import make_task
from rl.envs.mle.verifier import Verifier
from rl.errors import ConfigError, InfraError
from rl.forge.worker import parts_factory
from rl.parts import AgentParts
from rl.types import AgentEnv, RewardRecord, Task

# The ten lines of docs/agents.md: an agent that somebody wrote with the standard library.
AGENT = """
import json, os, urllib.request
prompt = [{"role": "user", "content": os.environ["PROMPT"]}]
body = {"model": os.environ["MODEL"], "messages": prompt}
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
    {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
with urllib.request.urlopen(request) as reply:
    text = json.load(reply)["choices"][0]["message"]["content"]
open("answer.py", "w").write(text)
"""
CHECK = "import answer, secret\nassert answer.add(2, secret.TWO) == 4\n"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """One task of our own: write a function; its tests are seen by the grader only."""
    folder = tmp_path / "tasks" / "adding"
    for name in ("files", "tests"):
        (folder / name).mkdir(parents=True)
    (folder / "prompt.md").write_text("Write add(a, b) in answer.py.\n")
    (folder / "files" / "agent.py").write_text(AGENT)
    (folder / "tests" / "check.py").write_text(CHECK)
    (folder / "tests" / "secret.py").write_text("TWO = 2\n")
    return tmp_path / "tasks"


def grader(**more: object) -> dict[str, object]:
    return {"kind": "command", "command": ["python3", "check.py"], **more}


def agent(isolation: str, *command: str, **options: object) -> AgentEnv:
    values = {"command": list(command), "isolation": isolation, "grader": grader(), **options}
    return agent_env("command", values)


def run(env: AgentEnv, tasks: Path, url: str, deadline_s: float = 60.0) -> RewardRecord:
    return env.run(FolderTaskset(tasks).task("adding"), url, "episode-7", deadline_s)


@pytest.mark.parametrize("isolation", ["none", "bubblewrap"])
def test_an_agent_finds_its_endpoint_and_its_folder_is_graded(
    isolation: str, tasks: Path, tmp_path: Path
) -> None:
    keep = str(tmp_path / "kept")
    env = agent(isolation, "python3", "agent.py", keep=keep)
    for text, outcome in (("def add(a, b): return a + b", 1.0), ("def add(a, b): return 5", 0.0)):
        with ModelDouble(lambda request, text=text: text) as model:
            record = run(env, tasks, model.base_url)
        assert (record.outcome, record.status) == (outcome, "done")
        assert model.keys == ["Bearer episode-7"]
        (request,) = model.requests
        assert request["model"] == "nano"
        assert request["messages"][0]["content"] == "Write add(a, b) in answer.py."
    assert (tmp_path / "kept" / "adding" / "stderr.txt").read_text() == ""


def test_the_environment_is_an_allow_list(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    env = agent(
        "none", sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))",
        keep=str(tmp_path / "kept"), env={"MINE": "1"},
    )  # fmt: skip
    record = run(env, tasks, "http://127.0.0.1:9/e/g0-0.0/v1", 20)
    assert record.status == "done"
    seen = json.loads((tmp_path / "kept" / "adding" / "stdout.txt").read_text())
    assert "SECRET_OF_OURS" not in seen
    assert seen["OPENAI_BASE_URL"] == "http://127.0.0.1:9/e/g0-0.0/v1"
    assert seen["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9/e/g0-0.0"
    assert seen["OPENAI_API_KEY"] == seen["ANTHROPIC_API_KEY"] == "episode-7"
    assert (seen["MINE"], seen["TASK_ID"], seen["DEADLINE_S"]) == ("1", "adding", "20")


@pytest.mark.parametrize("isolation", ["none", "bubblewrap"])
def test_an_agent_that_never_ends_is_a_timeout_that_earns_nothing(
    isolation: str, tasks: Path
) -> None:
    work = "open('answer.py', 'w').write('def add(a, b): return a + b')\nwhile True: pass"
    record = run(agent(isolation, "python3", "-c", work), tasks, "http://127.0.0.1:9/v1", 2.0)
    assert (record.outcome, record.status) == (0.0, "timeout")
    assert record.t_wall >= 2.0


def test_what_an_agent_started_ends_with_it(tmp_path: Path) -> None:
    """Also a child that ignores SIGTERM, and one that outlives its parent in the group."""
    stubborn = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(600 if sys.argv[1] == 'stay' else 0)\n"
    )
    for how, limit in (("stay", 1.0), ("leave", 30.0)):
        done = run_group([sys.executable, "-c", stubborn, how], tmp_path, {}, limit)
        assert done.timed_out == (how == "stay")
        for pid in (tmp_path / "pids").read_text().split():
            assert _gone(int(pid)), f"{pid} of {how} lives"


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # its parent is gone, and nobody has asked yet
            return True
        time.sleep(0.05)
    return False


def test_an_agent_dies_with_the_thread_that_ran_it(tmp_path: Path) -> None:
    sleeper = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys; from pathlib import Path; from rl.agents.host import run_group\n"
        f"run_group([sys.executable, '-c', {sleeper!r}], Path(sys.argv[1]), {{}}, 600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    for _ in range(400):
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    pid = int((tmp_path / "pid").read_text())
    assert not _gone_now(pid)
    process.kill()
    process.wait()
    assert _gone(pid)


def _gone_now(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def test_a_submission_is_graded_on_the_split_that_was_asked_for(tmp_path: Path) -> None:
    competition = made_up(tmp_path, "train")
    verifier = Verifier({"made-up": competition})
    work = (
        "text = open('/home/data/sample_submission.csv').read().replace('0.5', '0.0')\n"
        "open('/home/submission/submission.csv', 'w').write(text)"
    )
    env = agent_env("command", {"command": ["python3", "-c", work]}, verifier=verifier)
    record = env.run(make_task(competition, "dev"), "http://127.0.0.1:9/v1", "e", 60)
    assert record.status == "done"
    assert 0 < record.outcome < 1
    nothing = agent_env("command", {"command": ["true"]}, verifier=verifier)
    assert nothing.run(make_task(competition, "dev"), "http://x/v1", "e", 60).outcome == 0.0


def test_a_number_is_a_reward_only_from_0_to_1(tasks: Path) -> None:
    for printed, outcome in (("0.25", 0.25), ("7", 0.0), ("nan", 0.0), ("words", 0.0), ("", 0.0)):
        (tasks / "adding" / "tests" / "check.py").write_text(f"print('log')\nprint({printed!r})")
        env = agent("none", "true", grader=grader(number=True))
        assert run(env, tasks, "http://127.0.0.1:9/v1").outcome == outcome, printed


def test_a_link_that_an_agent_left_is_replaced_not_followed(tasks: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("untouched")
    work = f"import os; os.symlink({str(target)!r}, 'check.py')"
    run(agent("none", sys.executable, "-c", work), tasks, "http://127.0.0.1:9/v1")
    assert target.read_text() == "untouched"


def test_a_function_grades(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_grader.py").write_text(
        "def judge(task, folder): return len(list(folder.glob('*.txt'))) / 4\n"
        "def wrong(task, folder): return 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    work = "open('a.txt', 'w'); open('b.txt', 'w')"
    judged = {"kind": "python", "call": "my_grader:judge"}
    env = agent("none", sys.executable, "-c", work, grader=judged)
    assert run(env, tasks, "http://127.0.0.1:9/v1").outcome == 0.5
    wrong = agent("none", "true", grader={"kind": "python", "call": "my_grader:wrong"})
    with pytest.raises(ConfigError, match="returned 2; return a number from 0 to 1"):
        run(wrong, tasks, "http://127.0.0.1:9/v1")


def test_many_episodes_run_at_once(tasks: Path) -> None:
    env = agent("none", "python3", "agent.py")
    records: list[RewardRecord] = []
    with ModelDouble(lambda request: "def add(a, b): return a + b") as model:
        threads = [
            threading.Thread(target=lambda: records.append(run(env, tasks, model.base_url)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [record.outcome for record in records] == [1.0] * 4


def test_a_program_that_is_not_there_is_no_zero_reward(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="'no-such-agent': no such program"):
        run(agent("none", "no-such-agent"), tasks, "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="no-such-agent: command not found"):
        run(agent("bubblewrap", "no-such-agent"), tasks, "http://127.0.0.1:9/v1")


def test_an_endpoint_that_fails_to_the_last_is_no_fault_of_the_agent(tasks: Path) -> None:
    env = agent("bubblewrap", "python3", "agent.py")
    with pytest.raises(InfraError, match="the endpoint failed at the agent's last request"):
        run(env, tasks, "http://127.0.0.1:9/v1")
    with ModelDouble(lambda request: 503) as model, pytest.raises(InfraError):
        run(env, tasks, model.base_url)
    with ModelDouble(lambda request: 400) as model:
        assert run(env, tasks, model.base_url).status == "done"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "langgrph"}, "kind"),
        ({"kind": "command"}, "command"),
        ({"kind": "command", "command": ["x"], "grader": {"kind": "mlee"}}, "grader"),
        ({"kind": "command", "command": ["x"], "isolatoin": "none"}, "isolatoin"),
        ({"kind": "langgraph", "graph": "no colon"}, "graph"),
        ({"kind": "mle", "context": {"budget": 0}}, "budget"),
        ({"kind": "mle", "context": {"budget": 9, "actions": [{"do": "forget"}]}}, "forget"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        validate(RunConfig, {"agent": options}, "run.yaml")
    assert "\n" not in str(caught.value)


def test_kinds_by_name(tmp_path: Path) -> None:
    assert KINDS == ("mle", "langgraph", "command", "mini-swe-agent")
    with pytest.raises(ConfigError, match="nearest known kind is 'langgraph'"):
        agent_env("lang-graph")
    with pytest.raises(ConfigError, match="needs the competitions of a run"):
        agent_env("mle")
    with pytest.raises(ConfigError, match="no_such_module"):
        agent_env(
            "command", {"command": ["x"], "grader": {"kind": "python", "call": "no_such_module:f"}}
        )
    with pytest.raises(ConfigError, match="no task there"):
        FolderTaskset(tmp_path)


def test_a_run_file_names_its_agent_and_tasks(tasks: Path) -> None:
    """What `forge.parts` is unless a run file says otherwise."""
    command = {"kind": "command", "command": ["x"]}
    for options, ids, kind in (
        ({}, ["diamonds-price"], WhiteBoxAgent),
        ({"agent": {"kind": "langgraph"}}, ["diamonds-price"], LangGraphAgent),
        ({"agent": command}, ["diamonds-price"], CommandAgent),
        ({"agent": {**command, "tasks": str(tasks)}}, ["adding"], CommandAgent),
    ):
        values = {
            "competitions": ["diamonds-price"],
            "sandbox": {"kind": "process", "workers": 1},
            **options,
        }
        config = validate(RunConfig, values, "run.yaml")
        with parts_factory(config.forge.parts)(config) as parts:
            assert isinstance(parts, AgentParts)
            assert [task.id for task in parts.tasks] == ids
            assert {task.split for task in parts.tasks} <= {"dev", "train"}
            assert type(parts.agent) is kind
            assert parts.scripts == (kind is not CommandAgent)


def test_a_folder_named_from_here_reaches_the_sandbox(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tasks: tasks` of a run file: the sandbox starts in another directory."""
    monkeypatch.chdir(tmp_path)
    (tasks / "adding" / "files" / "answer.py").write_text("add = int.__add__\n")
    reward = run(agent("bubblewrap", "true"), Path("tasks"), "http://127.0.0.1:9/v1")
    assert (reward.status, reward.outcome) == ("done", 1.0)


def test_tasks_of_ones_own(tasks: Path) -> None:
    config = validate(
        RunConfig,
        {"agent": {"kind": "command", "command": ["x"], "tasks": str(tasks)}},
        "run.yaml",
    )
    found = own_tasks(config.agent)
    assert found is not None
    (task,) = found
    assert isinstance(task, Task)
    assert (task.id, task.prompt[0]["content"]) == ("adding", "Write add(a, b) in answer.py.")
    assert own_tasks(RunConfig().agent) is None
    with pytest.raises(ConfigError, match="nearest is 'adding'"):
        FolderTaskset(tasks).task("ading")
    assert os.environ.get("OPENAI_BASE_URL") is None  # nothing leaks into this process
