"""Whole searches against a scripted server over HTTP, with scripts in the real sandbox."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mle_model_double import ModelDouble, is_criticism, prompt_of
from test_mle_agent_parts import competition

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_agent.executor import ContainerExecutor, PoolExecutor
from agent_tools.mle_agent.folds import public_view
from agent_tools.mle_agent.model_client import ChatModel
from agent_tools.mle_agent.search import Found, Search
from agent_tools.mle_agent.settings import NANO, REAL, Settings
from agent_tools.mle_agent.solver import ChatSolver, NanoSolver
from agent_tools.mle_bench.grading import score
from agent_tools.mle_bench.registry import Competition
from agent_tools.sandbox import Limits, WarmPool, make_pool

CHAT = replace(REAL, steps=4, drafts=2, debug_share=1.0, folds=2, looks=0, container=False)
# Predicts the mean of the training targets, moved by so much.
MEAN = """
import pandas as pd
train = pd.read_csv("train.csv")
sample = pd.read_csv("sample_submission.csv")
sample["target"] = train["target"].mean() + {}
sample.to_csv("submission.csv", index=False)
"""


def said(code: str, plan: str = "A plan.") -> str:
    return f"{plan}\n\n```python\n{code}\n```"


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with make_pool("bubblewrap", 2) as made:
        yield made


def search(
    made: Competition, double: ModelDouble, pool: WarmPool, folder: Path, settings: Settings
) -> Found:
    model = ChatModel(double.base_url, "double")
    solver = NanoSolver(model) if settings.name == "nano" else ChatSolver(model)
    executor = PoolExecutor(pool, Limits(wall_seconds=60))
    return Search(public_view(made), solver, executor, settings, folder, seed=0).go()


class Script:
    """Scripts in turn; criticisms count on their own."""

    def __init__(self, *replies: str) -> None:
        self.replies = replies
        self.asked = 0

    def __call__(self, request: dict[str, Any]) -> str:
        if is_criticism(request):
            return f"Criticism after {self.asked}: go on."
        self.asked += 1
        return self.replies[min(self.asked, len(self.replies)) - 1]


def test_draft_debug_improve_with_memory_and_a_chain_of_criticism(
    pool: WarmPool, tmp_path: Path
) -> None:
    made = competition(tmp_path / "data")
    script = Script(
        said(MEAN.format("3")),
        said("raise ValueError('columns differ')"),
        said(MEAN.format("1"), "Repair it."),
        said(MEAN.format("0"), "Move the mean."),
    )
    run = tmp_path / "run"
    with ModelDouble(script) as double:
        found = search(made, double, pool, run, CHAT)
    assert [(n.stage, n.parent, n.status) for n in found.nodes] == [
        ("draft", None, "ok"),
        ("draft", None, "error"),
        ("debug", 1, "ok"),
        ("improve", 2, "ok"),
    ]
    assert found.selected is not None
    assert found.selected.id == 3
    assert found.nodes[3].cv < found.nodes[2].cv < found.nodes[0].cv
    # the whole chain of memory and criticism was in the last request for a script
    asked = [prompt_of(r) for r in double.requests if not is_criticism(r)]
    for number in (1, 2, 3):
        assert f"Criticism after {number}: go on." in asked[3]
        assert f"Criticism after {number}: go on." not in asked[number - 1]
    assert "ValueError: columns differ" in asked[2]
    assert "lower is better" in asked[0]
    memory = (run / "logs" / "memory.md").read_text()
    assert memory.count("## Step") == 4
    assert memory.count("- Criticism: ") == 4
    chosen = (run / "submission" / "submission.csv").read_bytes()
    assert chosen == (run / "candidates" / "3.csv").read_bytes()
    assert (run / "code" / "solution.py").read_text().strip() == MEAN.format("0").strip()
    assert score(made, chosen)[0] is not None
    assert found.nodes[0].scripts == 3
    assert found.nodes[0].tokens == 20


def test_selection_follows_cross_validation_where_the_test_disagrees(
    pool: WarmPool, tmp_path: Path
) -> None:
    made = competition(tmp_path / "data")
    # the second script is perfect on the test: it knows its answers, the folds do not
    answers = (made.private_dir / "test.csv").read_text()
    thief = (
        f"import pathlib, pandas as pd\nids = set(pd.read_csv('test.csv')['id'])\n"
        f"text = {answers!r}\n"
        "if any(line.startswith(f'{min(ids)},') for line in text.splitlines()):\n"
        "    pathlib.Path('submission.csv').write_text(text)\n"
        "else:\n"
        "    sample = pd.read_csv('sample_submission.csv')\n"
        "    sample['target'] = 50.0\n"
        "    sample.to_csv('submission.csv', index=False)\n"
    )
    run = tmp_path / "run"
    settings = replace(CHAT, steps=2, feedback=False)
    with ModelDouble(Script(said(MEAN.format("0")), said(thief))) as double:
        found = search(made, double, pool, run, settings)
    assert score(made, (run / "candidates" / "1.csv").read_bytes())[0] == 0.0
    assert found.selected is not None
    assert found.selected.id == 0
    assert not (run / "folds").exists()


def test_a_printed_score_selects_where_there_are_no_folds(pool: WarmPool, tmp_path: Path) -> None:
    made = competition(tmp_path / "data")
    line = "\nprint('cross-validation score:', {})"
    script = Script(
        said(MEAN.format("0") + line.format("0.5")),
        said(MEAN.format("1") + line.format("0.25")),
        said(MEAN.format("2")),
        said(MEAN.format("3") + line.format("'nan'")),
    )
    settings = replace(CHAT, folds=0, drafts=4, feedback=False)
    with ModelDouble(script) as double:
        found = search(made, double, pool, tmp_path / "run", settings)
    assert [n.cv for n in found.nodes] == [0.5, 0.25, None, None]
    assert [n.status for n in found.nodes[2:]] == ["invalid", "invalid"]
    assert "printed no line" in found.nodes[2].error
    assert found.selected is not None
    assert found.selected.id == 1


def test_a_batch_scores_its_finalists_on_all_folds_only(pool: WarmPool, tmp_path: Path) -> None:
    made = competition(tmp_path / "data")
    script = Script(*(MEAN.format(n) for n in (5, 0, 3, 1, 0)), "", "import nothing_here")
    settings = replace(NANO, steps=7, drafts=7, width=7, folds=3, finalists=2)
    with ModelDouble(script) as double:
        found = search(made, double, pool, tmp_path / "run", settings)
    by_code = {n.code: n for n in found.nodes if n.status != "repeat"}
    folds = {n: len(by_code[MEAN.format(n).strip()].folds) for n in (5, 0, 3, 1)}
    assert folds == {5: 1, 0: 3, 3: 1, 1: 3}
    assert [n.status for n in found.nodes].count("repeat") == 1
    assert [n.status for n in found.nodes].count("error") == 2
    assert found.selected is not None
    assert found.selected.code == MEAN.format(0).strip()
    assert sum(n.submission for n in found.nodes) == 2
    assert all("task regression metric rmse" in prompt_of(r) for r in double.requests)


def test_a_script_that_never_ends_and_one_that_fills_the_disk_are_only_failures(
    pool: WarmPool, tmp_path: Path
) -> None:
    made = competition(tmp_path / "data")
    big = "with open('submission.csv', 'w') as f:\n    for _ in range(2048): f.write('9' * 2**20)"
    script = Script(said("while True: pass"), said(big), said(MEAN.format(0)))
    settings = replace(CHAT, steps=3, drafts=3, feedback=False)
    with ModelDouble(script) as double:
        found = search(made, double, pool, tmp_path / "run", settings)
    assert found.nodes[0].status == "timeout"
    assert "time limit" in found.nodes[0].error
    assert not found.nodes[1].good
    assert found.selected is not None
    assert found.selected.id == 2


def test_the_time_limit_ends_a_search_over_all_its_starts(pool: WarmPool, tmp_path: Path) -> None:
    made = competition(tmp_path / "data")
    now = [0.0]

    def clock() -> float:
        now[0] += 10.0
        return now[0]

    settings = replace(CHAT, steps=50, drafts=50, time_limit_s=200.0, feedback=False, folds=2)
    with ModelDouble(Script(said(MEAN.format(0)))) as double:
        solver = ChatSolver(ChatModel(double.base_url, "double"))
        executor = PoolExecutor(pool, Limits(wall_seconds=60))
        found = Search(
            public_view(made), solver, executor, settings, tmp_path / "r", seed=0, clock=clock
        ).go()
    assert found.reason == "time"
    assert 1 < len(found.nodes) < 15


def test_a_model_that_goes_down_costs_nothing_that_was_done(pool: WarmPool, tmp_path: Path) -> None:
    made = competition(tmp_path / "data")
    replies = [said(MEAN.format(n)) for n in (3, 2, 1, 0)]
    down = [True]

    def answer(request: dict[str, Any]) -> str | int:
        n = sum(not is_criticism(r) for r in double.requests)
        if is_criticism(request):
            return 401 if down[0] and n == 2 else "fine"
        return replies[n - 1]

    with ModelDouble(answer) as double:
        with pytest.raises(InfraError, match=r"give the same command again"):
            search(made, double, pool, tmp_path / "run", CHAT)
        assert (tmp_path / "run" / "submission" / "submission.csv").exists() is False
        down[0] = False
        found = search(made, double, pool, tmp_path / "run", CHAT)
    assert sum(not is_criticism(r) for r in double.requests) == 4
    assert [n.feedback for n in found.nodes] == ["fine"] * 4
    assert [n.code for n in found.nodes] == [MEAN.format(n).strip() for n in (3, 2, 1, 0)]
    # a search that has ended asks nothing any more
    again = search(made, double, pool, tmp_path / "run", CHAT)
    assert again.selected == found.selected


def test_a_model_can_look_around_and_scripts_find_the_containers_paths(tmp_path: Path) -> None:
    made = competition(tmp_path / "data")
    code = MEAN.format(0).replace('"train', '"/home/data/train').replace(
        '"sample', '"/home/data/sample'
    ).replace('"submission', '"/home/submission/submission')  # fmt: skip
    script = Script("```bash\nls /home/data\n```", said(code))
    settings = replace(REAL, steps=1, folds=2, looks=2, feedback=False)
    looked: list[str] = []

    def look(command: str) -> str:
        looked.append(command)
        return "test.csv train.csv"

    with ModelDouble(script) as double:
        found = Search(
            public_view(made),
            ChatSolver(ChatModel(double.base_url, "double")),
            ContainerExecutor(Limits(cpu_seconds=30), {"COMPETITION_ID": "made-up"}),
            settings,
            tmp_path / "run",
            seed=0,
            look=look,
        ).go()
    assert looked == ["ls /home/data"]
    assert "test.csv train.csv" in prompt_of(double.requests[1])
    assert found.selected is not None
    assert len(found.selected.folds) == 2


COMMAND = [sys.executable, "-m", "agent_tools.mle_agent", "run", "--competition", "diamonds-price"]


@pytest.mark.real  # for its length
def test_a_run_killed_at_any_time_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    slow = "import time\ntime.sleep(0.2)\n"
    out = tmp_path / "out"
    asked: list[int] = []

    def answer(request: dict[str, Any]) -> str:
        asked.append(len(asked))
        return slow + MEAN.format(1000 + len(asked))

    settings = {"steps": 6, "drafts": 6, "width": 1, "folds": 2}
    with ModelDouble(answer) as double:
        argv = [*COMMAND, "--out", str(out), "--seeds", "1", "--settings", "nano"]
        argv += ["--base-url", double.base_url, "--model", "double"]
        argv += [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
        for nodes in (1, 3, 4):
            process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True)
            _wait(out, nodes, process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        first = (out / "scores.jsonl").read_text()
        again = subprocess.run([*argv, "--json"], capture_output=True, text=True, timeout=300)
        assert json.loads(again.stdout)["agent"] == "selfevo-nano"
    run = next(out.glob("*/diamonds-price_*"))
    nodes_found = _nodes(run / "logs" / "journal.jsonl")
    assert sorted(nodes_found) == list(range(6))
    # a reply that was kept is never asked for again; one that a kill cut off may be
    assert 6 <= len(asked) <= 9
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) == 1
    assert rows[0]["valid"]
    assert rows == [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([*argv, "--set", "steps=7"], check=True, capture_output=True)


def _nodes(path: Path) -> list[int]:
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [n["id"] for line in lines if line["kind"] == "nodes" for n in line["nodes"]]


def _wait(out: Path, nodes: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list(out.glob("*/diamonds-price_*/logs/journal.jsonl"))
        if found and len(_nodes(found[0])) >= nodes:
            return
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.02)
    raise AssertionError("the run did not get so far")


def test_rows_have_the_ledgers_columns(tmp_path: Path) -> None:
    with ModelDouble(lambda request: MEAN.format("100")) as double:
        argv = [*COMMAND, "--out", str(tmp_path / "out"), "--seeds", "2", "--settings", "nano"]
        argv += ["--base-url", double.base_url, "--set", "steps=1", "--set", "drafts=1"]
        argv += ["--campaign", "c1", "--round", "3", "--checkpoint", "abc"]
        subprocess.run(argv, check=True, capture_output=True, timeout=300)
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    wanted = {
        *("commit", "checkpoint", "suite", "suite_version", "split", "fold", "seed", "competition"),
        *("score", "percentile", "thresholds", "medal", "valid", "cost", "evaluator_hash"),
        *("campaign", "round"),
    }
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        assert wanted <= set(row)
        assert (row["campaign"], row["round"], row["checkpoint"]) == ("c1", 3, "abc")
        assert re.fullmatch(r"[0-9a-f]{12}", row["evaluator_hash"])
        assert set(row["thresholds"]) == {"gold", "silver", "bronze", "median"}
        assert row["cost"]["scripts"] == 4
    group = next(out.glob("*_run-group_selfevo-nano"))
    metadata = json.loads((group / "metadata.json").read_text())
    assert {entry["competition_id"] for entry in metadata["runs"].values()} == {"diamonds-price"}
    for name in metadata["runs"]:
        assert name.partition("_")[0] == "diamonds-price"
        assert {"submission", "logs", "code"} <= {p.name for p in (group / name).iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "nano"], "--base-url"),
        (["--base-url", "ftp://x", "--settings", "nano"], "give a URL"),
        (["--base-url", "http://x", "--split", "sealed"], "sealed"),
        (["--base-url", "http://x", "--competition", "nothing"], "nothing"),
        (["--base-url", "http://x", "--set", "stepz=1"], "did you mean steps"),
        (["--base-url", "http://x", "--set", "steps"], "KEY=VALUE"),
        (["--base-url", "http://x", "--sandbox", "paper"], "choose bubblewrap"),
        (["--agent", "/nowhere"], "config.yaml"),
    ],
)
def test_bad_input_is_one_line_with_the_next_step(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    argv = [*COMMAND, "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == UserError.exit_code
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_bundled_model_solves_a_competition_and_the_table_says_how_well(tmp_path: Path) -> None:
    argv = [*COMMAND, "--out", str(tmp_path / "out"), "--seeds", "1", "--settings", "nano"]
    argv += ["--base-url", "auto", "--set", "steps=4", "--set", "drafts=4", "--set", "finalists=1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    title, head, line, total = done.stdout.splitlines()
    assert re.match(r"selfevo-nano with nano-[0-9a-f]{12} on offline-small-v0 version 0", title)
    assert head.split()[-2:] == ["medal", "%"]
    assert line.startswith("diamonds-price")
    assert total.startswith("all")
    run = next((tmp_path / "out").glob("*/diamonds-price_*"))
    nodes = _nodes(run / "logs" / "journal.jsonl")
    assert nodes == [0, 1, 2, 3]
    row = json.loads((tmp_path / "out" / "scores.jsonl").read_text())
    assert row["valid"]
    assert row["percentile"] > 10
    assert row["cost"]["tokens"] > 300
    best = json.loads((tmp_path / "out" / "best_on_test.jsonl").read_text())
    assert best["percentile"] >= row["percentile"]
    shown = [sys.executable, "-m", "agent_tools.mle_agent", "table", str(tmp_path / "out")]
    assert subprocess.run(shown, capture_output=True, text=True).stdout == done.stdout
