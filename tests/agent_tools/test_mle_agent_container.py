"""MLE-bench's container contract, agents in its format, and agents that mean harm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mle_model_double import ModelDouble
from test_mle_agent_parts import competition

from agent_tools.errors import UserError
from agent_tools.mle_agent.bridge import Bridge, form_file
from agent_tools.mle_agent.container import Container, collect
from agent_tools.mle_agent.folds import public_view
from agent_tools.mle_agent.foreign import Ended, load_agent, run_agent
from agent_tools.mle_agent.leaks import CANARY
from agent_tools.mle_bench.registry import competition_dir
from agent_tools.paths import repo_root
from agent_tools.sandbox import Limits
from agent_tools.sandbox.instance import WORK

LIMITS = Limits(
    cpu_seconds=30, wall_seconds=60, memory_mb=1024, file_mb=64, processes=64, disk_mb=128
)
AGENTS = repo_root() / "agent_tools" / "mle_agent" / "agents"
Made = Callable[..., tuple[Ended, Path]]


def agent_folder(folder: Path, text: str, **entry: Any) -> Path:
    """An agent `bad` in MLE-bench's format with this start script."""
    (folder / "bad").mkdir(parents=True)
    values = {"start": "bad/start.sh", "env_vars": {"TIME_LIMIT_SECS": 20, "STEP_LIMIT": 3}}
    (folder / "bad" / "config.yaml").write_text(json.dumps({"bad": values | entry}))
    (folder / "bad" / "start.sh").write_text(text)
    return folder / "bad"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Runs an agent's start script on a made-up competition; returns its end and its files."""

    def go(
        start: str,
        validate: str = "Submission is valid.",
        base_url: str | None = None,
        **entry: Any,
    ) -> tuple[Ended, Path]:
        task = competition(tmp_path / "data")
        agent = load_agent(str(agent_folder(tmp_path / "agents", start, **entry)))
        with Bridge(lambda data: f"{validate} ({len(data)} bytes)", base_url, "key-1") as bridge:
            ended = run_agent(
                agent, public_view(task), bridge, tmp_path / "run", limits=LIMITS, python=None,
                model="double",
            )  # fmt: skip
        return ended, tmp_path / "run"

    return go


def test_the_container_has_mle_benchs_paths_and_nothing_else(made: Made) -> None:
    start = """
    cd /home; ls -d agent code data logs submission instructions.txt validate_submission.sh
    echo "$COMPETITION_ID $TIME_LIMIT_SECS $STEP_LIMIT $1 $2 $EXTRA"
    eval "$(conda shell.bash hook)"; conda activate agent && echo conda
    touch /home/data/x 2>/dev/null || echo read-only
    ls /private 2>&1 | grep -c 'No such file'
    head -1 /home/data/train.csv
    grep -c 'Predict it.' instructions.txt
    cp data/sample_submission.csv submission/submission.csv
    ./validate_submission.sh submission/submission.csv
    ./validate_submission.sh nowhere
    echo "print(1)" > code/a.py; mkdir logs/deep; echo l > logs/deep/l.txt
    echo junk > submission/other.csv; head -c 9000000 /dev/zero > logs/big.bin
    """
    ended, run = made(
        start, kwargs_type="argparse", kwargs={"depth": 3},
        env_vars={"TIME_LIMIT_SECS": 20, "STEP_LIMIT": 3, "EXTRA": "more"},
    )  # fmt: skip
    out = (run / "logs" / "agent.stdout.txt").read_text()
    assert ended.status == "ok"
    assert out.split("\n")[:7] == [
        *("agent", "code", "data", "instructions.txt", "logs", "submission"),
        "validate_submission.sh",
    ]
    assert "made-up 20 3 --depth 3 more" in out
    assert "conda\nread-only\n1\nid,n0,n1,n2,target\n1\n" in out
    assert "Submission is valid. (" in out
    assert "no such file: nowhere" in out
    kept = sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    assert kept == [
        *("code/a.py", "logs/agent.stderr.txt", "logs/agent.stdout.txt", "logs/deep/l.txt"),
        "submission/submission.csv",
    ]


def test_the_model_is_the_only_place_that_an_agent_reaches(made: Made) -> None:
    start = r"""
    python3 - <<'EOF'
import json, os, socket, urllib.request
def ask(path, data=None):
    url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1") + path
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=20).read().decode()
    except OSError as error:
        return f"refused {getattr(error, 'code', error)}"
body = json.dumps({"model": os.environ["MODEL"], "messages": [{"role": "user", "content": "hi"}]})
print(json.loads(ask("/v1/chat/completions", body.encode()))["choices"][0])
print(ask("/health"), ask("/admin"), ask("/v1/../secret"), os.environ["OPENAI_API_KEY"])
for place in (("1.1.1.1", 80), ("169.254.169.254", 80), ("127.0.0.1", 22)):
    try:
        socket.create_connection(place, 2)
        print("open", place)
    except OSError as error:
        print("closed")
for family in (16, 17, 38, 40):
    try:
        socket.socket(family, socket.SOCK_STREAM if family > 20 else socket.SOCK_RAW)
        print("open", family)
    except OSError:
        print("closed")
EOF
"""
    with ModelDouble(lambda request: "hello") as double:
        ended, run = made(start, base_url=double.base_url)
    out = (run / "logs" / "agent.stdout.txt").read_text()
    assert ended.status == "ok", (run / "logs" / "agent.stderr.txt").read_text()
    assert "'content': 'hello'" in out
    assert "ok\n refused 404 refused 404 none" in out
    assert out.count("closed") == 7
    assert "open" not in out
    assert (ended.calls, ended.tokens) == (1, 10)
    assert double.keys == ["Bearer key-1"]


def test_an_agent_that_never_ends_is_ended_and_what_it_left_is_kept(made: Made) -> None:
    start = "cp /home/data/sample_submission.csv /home/submission/submission.csv; " + (
        "(while true; do sleep 1; done) & while true; do :; done"
    )
    from agent_tools.mle_agent import foreign

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "_GRACE_S", 2.0)
        ended, run = made(start, env_vars={"TIME_LIMIT_SECS": 3, "STEP_LIMIT": 1})
    assert ended.status == "timeout"
    assert ended.wall_s < 20
    assert (run / "submission" / "submission.csv").is_file()


@pytest.mark.parametrize(
    "start",
    [
        "head -c 2G /dev/zero > /home/submission/submission.csv",
        "for i in $(seq 40); do head -c 60M /dev/zero > /home/submission/part$i; done",
        'python3 -c \'open("/home/submission/submission.csv", "w").truncate(2 << 30)\'',
        f"rm -rf /home/submission; ln -s /home/data {WORK}/submission",
        "rm -rf /home/submission/; mkfifo /home/submission/submission.csv",
        "ln -s /etc/passwd /home/submission/submission.csv",
        f"rmdir {WORK}/submission; echo x > {WORK}/submission",
        "cd /home/code; for i in $(seq 30000); do : > $i; done",
    ],
)
def test_what_an_agent_leaves_is_bounded(made: Made, start: str) -> None:
    _, run = made(start)
    files = [p for p in run.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 70 << 20
    assert not any(p.is_symlink() for p in run.rglob("*"))
    assert not (run / "submission" / "submission.csv").is_dir()


def test_an_agent_does_not_find_the_answers(made: Made) -> None:
    start = """
    find / -name '*.csv' -not -path '/proc/*' 2>/dev/null | sort
    find / -name CANARY.txt 2>/dev/null
    grep -rl 'selfevo-canary' / --include='*' -s --exclude-dir=proc --exclude-dir=sys \
      --exclude-dir=usr | grep -v WORK/agent
    cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n' | grep -i -E 'selfevo|data_dir='
    """
    _, run = made(start.replace("WORK", WORK))
    found = (run / "logs" / "agent.stdout.txt").read_text().split()
    wanted = ["sample_submission.csv", "test.csv", "train.csv"]
    tables = [line for line in found if line.startswith("/home")]
    assert tables == [f"/home/data/{name}" for name in wanted]
    assert not [w for w in found if "private" in w or "CANARY" in w or "SELFEVO" in w]


def test_bad_agent_folders_are_named(tmp_path: Path) -> None:
    folder = agent_folder(tmp_path / "a", "true")
    assert load_agent(f"{folder}:bad").step_limit == 3
    cases: list[tuple[dict[str, Any], str]] = [
        ({"start": "bad/none.sh"}, "is not in"),
        ({"start": "../../etc/passwd"}, "is not in"),
        ({"privileged": True}, "privileged"),
        ({"kwargs": {"a": 1}, "kwargs_type": "other"}, "argparse or omegaconf"),
        ({"env_vars": {"1x": "2"}}, "no name of a variable"),
        ({"env_vars": {"TIME_LIMIT_SECS": "soon"}}, "whole number"),
        ({"env_vars": {"TOKEN": "${{ secrets.NOT_SET_HERE }}"}}, "NOT_SET_HERE"),
    ]
    for number, (entry, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            load_agent(str(agent_folder(tmp_path / str(number), "true", **entry)))
    with pytest.raises(UserError, match="no variant 'other'"):
        load_agent(f"{folder}:other")
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not YAML"):
        load_agent(str(folder))
    (folder / "config.yaml").write_text("vars: {a: 1}")
    with pytest.raises(UserError, match="`start`"):
        load_agent(str(folder))


def test_secrets_reach_the_agent_and_no_file_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "word-of-honour")
    variables = {"TOKEN": "${{ secrets.HUB_TOKEN }}", "OPENAI_API_KEY": "${{secrets.OPENAI_KEY}}"}
    agent = load_agent(str(agent_folder(tmp_path, "true", env_vars=variables)))
    assert agent.environment == {"TOKEN": "word-of-honour"}  # the model's key stays outside
    assert "word-of-honour" not in json.dumps(agent.settings())
    assert agent.settings()["environment"] == {"TOKEN": "secret"}


def test_an_agent_that_brings_its_sandbox_down_ends_its_own_run_only(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent_tools.errors import InfraError
    from agent_tools.sandbox import Shell

    plain = Shell.run

    def gone(shell: Shell, command: str, **limits: Any) -> Any:
        if "start.sh" in command:
            shell.close()
            raise InfraError("the shell's sandbox is gone")
        return plain(shell, command, **limits)

    monkeypatch.setattr(Shell, "run", gone)
    ended, run = made("true")
    assert (ended.status, ended.exit_code) == ("killed", None)
    assert "is gone" in (run / "logs" / "agent.stderr.txt").read_text()


def test_the_form_field_is_found_or_refused() -> None:
    body = (
        b'--m\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\na\n\xff\r\n--m--'
    )
    assert form_file("multipart/form-data; boundary=m", body) == b"a\n\xff"
    assert form_file("multipart/form-data; boundary=n", body) is None
    assert form_file("text/plain", b"x") is None
    assert form_file("", b"") is None


def test_a_container_keeps_only_what_is_asked_for(tmp_path: Path) -> None:
    task = competition(tmp_path)
    with Container(task.public_dir, LIMITS) as opened:
        opened.run("echo 1 > /home/submission/submission.csv; echo 2 > /home/code/a; echo 3 > b")
        assert collect(opened, keep=("submission",)) == {"submission/submission.csv": b"1\n"}


RUN = [sys.executable, "-m", "agent_tools.mle_agent", "run", "--competition", "food-reviews"]


def test_the_sample_agent_runs_by_the_command_and_is_graded(tmp_path: Path) -> None:
    argv = [*RUN, "--out", str(tmp_path), "--seeds", "1", "--agent", str(AGENTS / "sample")]
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "scores.jsonl").read_text())
    assert (row["valid"], row["score"], row["medal"]) == (True, 0.5, None)
    run = next(tmp_path.glob("*_run-group_sample/food-reviews_*"))
    assert (run / "logs" / "validation.txt").read_text().strip() == "Submission is valid."
    assert json.loads(done.stdout)["findings"] == []


def test_an_agent_that_shows_the_canary_or_a_source_package_is_void(tmp_path: Path) -> None:
    base = competition_dir("food-reviews")
    start = "cp /home/data/sample_submission.csv /home/submission/submission.csv\n"
    first = agent_folder(tmp_path / "a", start + "echo 'import sktime' > /home/code/solution.py\n")
    argv = [*RUN, "--seeds", "1", "--out"]
    done = subprocess.run(
        [*argv, str(tmp_path / "one"), "--agent", str(first)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "VOID food-reviews seed 0: source-package in code solution.py line 1" in done.stdout
    # the first judgement has planted the word; now an agent that knows it
    secret = (base / "prepared" / CANARY).read_text().strip()
    spelt = " ".join(secret)
    second = agent_folder(tmp_path / "b", start + f"echo '{spelt}'\n")
    subprocess.run(
        [*argv, str(tmp_path / "two"), "--agent", str(second)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    row = json.loads((tmp_path / "two" / "scores.jsonl").read_text())
    assert (row["valid"], row["percentile"], row["score"]) == (False, 0.0, None)
    assert row["error"].startswith("void: canary in log agent.stdout.txt")
    found = json.loads((tmp_path / "two" / "findings.jsonl").read_text())
    assert found["kind"] == "canary"
    assert secret.rpartition("-")[2] not in json.dumps(found)
    best = json.loads((tmp_path / "two" / "best_on_test.jsonl").read_text())
    assert not best["valid"]
