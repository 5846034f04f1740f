"""Evaluation, rollouts, clients, and the real path end to end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rl_fakes import TextEnv, text_tasks, tiny_checkpoint

from agent_tools.sandbox.types import Limits, ScriptJob, ScriptResult
from model.checkpoint import load_model
from model.generate import Engine
from model.tokenizer import Tokenizer
from rl import evaluate as evaluate_module
from rl import train as train_module
from rl.cli import run_main
from rl.engine import OpenAIClient, reply_content
from rl.errors import ConfigError, InfraError
from rl.evaluate import Score, append_ledger, evaluate, plan, summarise
from rl.rollout import CachingPool, run_local

SCRIPT = """\
import pandas as pd
from sklearn.ensemble import HistGradientBoostingRegressor
train = pd.read_csv("train.csv")
test = pd.read_csv("test.csv")
sub = pd.read_csv("sample_submission.csv")
cols = train.select_dtypes("number").columns[1:-1]
model = HistGradientBoostingRegressor(max_iter=50)
sub[sub.columns[1]] = model.fit(train[cols], train["target"]).predict(test[cols])
sub.to_csv("submission.csv", index=False)
"""


def score(competition: str, percentile: float, status: str = "ok", **changes: Any) -> Score:
    row = Score(
        competition, 0, status == "ok", 1.0, percentile, percentile > 60, percentile > 90, False,
        False, percentile > 50, status, 0.1, 0.2, 10, False, "", "x",
    )  # fmt: skip
    return replace(row, **changes)


def test_competitions_count_equally_and_infrastructure_errors_not_at_all() -> None:
    rows = [score("a", 80.0), score("a", 40.0), score("a", 0.0, "infra"), score("b", 0.0, "error")]
    out = summarise(rows)
    assert out["competitions"]["a"]["mean_percentile"] == 60.0
    assert out["competitions"]["a"]["samples"] == 2
    assert out["mean_percentile"] == 30.0
    assert (out["infra_errors"], out["infra_share"]) == (1, 0.25)
    assert out["valid_share"] == 0.5
    lost = summarise([score("a", 0.0, "infra"), score("b", 50.0)])
    assert lost["competitions"]["a"]["mean_percentile"] is None
    assert lost["mean_percentile"] == 50.0


def test_equal_samples_and_seeds_that_depend_on_the_competition_only() -> None:
    tasks = text_tasks()
    both = plan(tasks, samples=3, temperature=0.5, max_tokens=9, seed=1)
    assert [t.id for t in both] == [tasks[0].id] * 3 + [tasks[1].id] * 3
    alone = plan(tasks[1:], samples=3, temperature=0.5, max_tokens=9, seed=1)
    assert [t.sampling for t in both[3:]] == [t.sampling for t in alone]
    assert len({t.sampling.seed for t in both}) == 6
    other = plan(tasks, samples=3, temperature=0.5, max_tokens=9, seed=2)
    assert {t.sampling.seed for t in both}.isdisjoint({t.sampling.seed for t in other})


def test_scores_are_written_one_row_a_sample_and_repeatable(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "start")
    engine, tokenizer = Engine(load_model(checkpoint)), Tokenizer.load(checkpoint)
    attempts = plan(text_tasks(), samples=5, temperature=1.0, max_tokens=8, seed=0)
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.append(
            evaluate(
                attempts,
                lambda part: run_local(part, TextEnv(), engine, tokenizer),
                tmp_path / name,
            )
        )
    rows = [json.loads(line) for line in (tmp_path / "one/scores.jsonl").open()]
    assert len(rows) == 10 and rows[7]["index"] == 2
    assert [row["script_sha256"] for row in rows] == [
        json.loads(line)["script_sha256"] for line in (tmp_path / "two/scores.jsonl").open()
    ]
    assert results[0]["mean_percentile"] == results[1]["mean_percentile"]
    assert results[0]["tokens"] > 0


def test_errors_in_an_episode_are_raised_and_do_not_hang(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "start")
    engine, tokenizer = Engine(load_model(checkpoint)), Tokenizer.load(checkpoint)

    class Broken(TextEnv):
        def run(self, task: Any, client: Any) -> Any:
            if task.index == 1:
                raise KeyError("broken environment")
            return super().run(task, client)

    attempts = plan(text_tasks(), samples=3, temperature=1.0, max_tokens=4, seed=0)
    with pytest.raises(KeyError, match="broken environment"):
        run_local(attempts, Broken(), engine, tokenizer)

    def stop() -> None:
        raise InterruptedError("signal")

    with pytest.raises(InterruptedError):
        run_local(attempts, TextEnv(), engine, tokenizer, stop)


def test_ledger_lines_are_appended(tmp_path: Path) -> None:
    append_ledger(tmp_path / "deep/ledger.jsonl", {"a": 1})
    append_ledger(tmp_path / "deep/ledger.jsonl", {"a": 2})
    lines = (tmp_path / "deep/ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["a"] for line in lines] == [1, 2]


def test_content_is_the_reply_without_thinking_and_end_mark() -> None:
    assert reply_content("</think>\n\nimport x\n[e~[", None) == "import x\n"
    assert reply_content("hm\n</think>\n\nimport x", None) == "import x"
    assert reply_content("never closed", None) == ""
    broken = reply_content("</think>\n\na = 1\n<minimax:tool_call>oops", None)
    assert broken.startswith("a = 1")


# ------------------------------------------------------------------ cache


class CountingPool:
    """A pool that records jobs and answers at once."""

    def __init__(self, status: str = "ok") -> None:
        self.jobs: list[ScriptJob] = []
        self.status = status

    missing: tuple[str, ...] = ()

    def submit(self, job: ScriptJob) -> Future[ScriptResult]:
        self.jobs.append(job)
        future: Future[ScriptResult] = Future()
        future.set_result(ScriptResult(self.status, 0, "", "", {}, 0.1, 0.1))  # type: ignore[arg-type]
        return future

    def run(self, jobs: Sequence[ScriptJob]) -> list[ScriptResult]:
        return [self.submit(job).result() for job in jobs]

    def close(self) -> None:
        pass


def test_equal_scripts_on_equal_inputs_run_once() -> None:
    inner = CountingPool()
    pool = CachingPool(inner)  # type: ignore[arg-type]
    a, b = Path("/a"), Path("/b")
    jobs = [ScriptJob("x", a), ScriptJob("x", a), ScriptJob("x", b), ScriptJob("y", a)]
    assert len(pool.run([*jobs, ScriptJob("x", a, limits=Limits(cpu_seconds=1.0))])) == 5
    assert len(inner.jobs) == 4 and pool.hits == 1


def test_infrastructure_failures_are_tried_again() -> None:
    inner = CountingPool("infra")
    pool = CachingPool(inner)  # type: ignore[arg-type]
    pool.run([ScriptJob("x", Path("/a")), ScriptJob("x", Path("/a"))])
    assert len(inner.jobs) == 2


# ------------------------------------------------------------------ HTTP


@contextmanager
def endpoint(content: str, status: int = 200) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A loopback endpoint that always answers `content`, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                    "choices": [choice]}  # fmt: skip
            data = b"garbage" if content == "garbage" else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def test_openai_client_sends_sampling_and_reads_the_reply() -> None:
    with endpoint("print(1)") as (url, asked):
        reply = OpenAIClient(url, "m").chat(
            [{"role": "user", "content": "hi"}], temperature=0.7, max_tokens=5, seed=3
        )
    assert (reply.text, reply.finish_reason) == ("print(1)", "stop")
    assert (asked[0]["temperature"], asked[0]["max_tokens"], asked[0]["seed"]) == (0.7, 5, 3)


def test_endpoint_faults_have_their_own_errors() -> None:
    message = [{"role": "user", "content": "hi"}]
    with endpoint("x", status=400) as (url, _), pytest.raises(ConfigError, match="refused"):
        OpenAIClient(url, "m").chat(message)
    with endpoint("garbage") as (url, _), pytest.raises(InfraError):
        OpenAIClient(url, "m").chat(message)
    with pytest.raises(InfraError, match="not reachable"):
        OpenAIClient(url, "m").chat(message)


# ------------------------------------------------------------------ the real path


def test_an_endpoint_is_measured_on_real_data_in_the_real_sandbox(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    with endpoint(f"Here it is:\n```python\n{SCRIPT}```") as (url, _):
        arguments = ["--base-url", url, "--split", "dev", "--competitions", "diamonds-price",
                     "--samples", "2", "--out", str(out), "--json"]  # fmt: skip
        assert run_main(evaluate_module.main, arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    stored = json.loads((out / "result.json").read_text())
    assert printed == stored
    assert stored["valid_share"] == 1.0 and 0 < stored["mean_percentile"] <= 100
    assert stored["infra_errors"] == 0 and stored["suite_version"] == 0
    assert run_main(evaluate_module.main, arguments) == 2  # never overwrites a result


def test_val_is_written_in_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with endpoint("raise SystemExit(3)") as (url, _):
        arguments = ["--base-url", url, "--split", "val", "--samples", "1", "--seed", "4",
                     "--out", str(tmp_path / "eval"), "--ledger", str(ledger)]  # fmt: skip
        assert run_main(evaluate_module.main, arguments) == 0
    assert "electricity-demand" in capsys.readouterr().out
    (line,) = ledger.read_text().splitlines()
    entry = json.loads(line)
    assert entry["split"] == "val" and entry["seed"] == 4
    assert set(entry["competitions"]) == {"electricity-demand", "vowel-speaker"}
    result = json.loads((tmp_path / "eval/result.json").read_text())
    assert result["mean_percentile"] == 0.0 and result["valid_share"] == 0.0


def test_both_jobs_warn_of_what_the_host_lacks_or_refuse_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent_tools.sandbox.bubblewrap.make_cgroup", lambda *_: None)
    refusal = "error: full isolation is required, but missing here: no control group"
    with endpoint("raise SystemExit(3)") as (url, _):
        arguments = ["--base-url", url, "--split", "dev", "--competitions", "diamonds-price",
                     "--samples", "1", "--out", str(tmp_path / "eval")]  # fmt: skip
        assert run_main(evaluate_module.main, [*arguments, "--require-full-isolation"]) == 2
        assert capsys.readouterr().err.startswith(refusal)
        assert run_main(evaluate_module.main, arguments) == 0
        assert "sandbox: no control group" in capsys.readouterr().err
    tiny_checkpoint(tmp_path / "start")
    (tmp_path / "run.yaml").write_text(
        f"model: {{checkpoint: {tmp_path}/start}}\ncompetitions: [diamonds-price]\n"
        "wandb: {mode: disabled}\n"
    )
    train = [str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "device=cpu"]
    assert run_main(train_module.main, [*train, "--require-full-isolation"]) == 2
    assert refusal in capsys.readouterr().err


def test_train_command_on_real_data_with_a_random_model(tmp_path: Path) -> None:
    """A random policy writes no valid script: every group is without spread, and nothing stalls."""
    tiny_checkpoint(tmp_path / "start")
    (tmp_path / "run.yaml").write_text(
        f"model: {{checkpoint: {tmp_path}/start}}\n"
        "competitions: [diamonds-price]\n"
        "budget: {steps: 2, scripts_per_step: 4, tokens_per_script: 16}\n"
        "rollout: {group_size: 4, max_new_tokens: 16}\n"
        "wandb: {mode: disabled}\n"
    )
    arguments = [str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "device=cpu"]
    assert run_main(train_module.main, arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["rollout/valid_frac"] == 0.0 and rows[0]["group/zero_std_frac"] == 1.0
    assert rows[0]["policy/grad_norm"] == 0.0 and rows[0]["rollout/infra_frac"] == 0.0
    assert json.loads((tmp_path / "run/result.json").read_text())["scripts"] == 8
