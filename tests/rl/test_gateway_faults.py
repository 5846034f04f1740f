"""The gateway when it dies, when the disk is full, and before the real engine."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from gateway_fakes import EOS, HTTP, NANO, ROOT, TOKENIZER, ScriptedEngine, answer, gateway, until

from model.chat_format import render_next_ids
from rl.gateway.writer import Writer
from rl.pool import Pool, main
from rl.types import CallRecord

Json = dict[str, Any]


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine()
    engine.start()
    yield engine
    engine.stop()


def ask(url: str, episode: str, text: str) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    return HTTP.post(f"{url}/e/{episode}/v1/chat/completions", json=body)


def test_a_killed_gateway_leaves_whole_records_of_all_that_it_answered(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    answered: dict[str, list[list[int]]] = {}

    def agent(url: str, episode: str, attempt: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            for number in range(10_000):
                got = ask(url, episode, f"{attempt}.{number} " + "x" * 500)
                assert got.status_code == 200
                index = got.json()["choices"][0]["call_index"]
                answered[episode].append([attempt, number, index])

    for attempt in range(3):
        with (
            gateway(engine.url, tmp_path, "--auto-open") as running,
            concurrent.futures.ThreadPoolExecutor(6) as pool,
        ):
            for member in range(6):
                answered.setdefault(f"g0-{member}.0", [])
                pool.submit(agent, running.url, f"g0-{member}.0", attempt)
            wanted = 40 * (attempt + 1)
            until(lambda wanted=wanted: sum(map(len, answered.values())) > wanted)
            running.process.send_signal(signal.SIGKILL)
    assert main(["verify", str(tmp_path / "pool.db")]) == 0
    with Pool(tmp_path / "pool.db", create=False) as pool:
        for episode, calls in answered.items():
            records = pool.calls(episode)
            # no gap, also across a restart; and each answer that was given has its record
            assert [record.index for record in records] == list(range(len(records)))
            for attempt, number, index in calls:
                text = TOKENIZER.decode(records[index].prompt_ids)
                assert f"{attempt}.{number} x" in text
                assert list(records[index].response_ids) == answer()["token_ids"]


def test_a_call_that_the_disk_has_no_room_for_is_no_call(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    with gateway(engine.url, tmp_path) as running:
        running.open("g0-0.0")
        assert ask(running.url, "g0-0.0", "first").status_code == 200
        process = psutil.Process(running.process.pid)
        room = max(path.stat().st_size for path in tmp_path.glob("pool.db*"))
        process.rlimit(psutil.RLIMIT_FSIZE, (room, psutil.RLIM_INFINITY))
        faults = [ask(running.url, "g0-0.0", f"{n} " + "long " * 600) for n in range(3)]
        assert {found.status_code for found in faults} == {503}
        assert faults[0].json()["error"]["code"] == "not_recorded"
        assert running.counts()["calls"] == 1
        process.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        again = ask(running.url, "g0-0.0", "0 " + "long " * 600)
        assert again.json()["choices"][0]["call_index"] == 1
        with running.pool() as pool:
            assert [record.index for record in pool.calls("g0-0.0")] == [0, 1]
            assert pool.stats().damaged == ()


def test_one_bad_record_fails_alone(tmp_path: Path) -> None:
    import asyncio

    def record(episode: str, logprobs: tuple[float, ...] = (-1.0,)) -> CallRecord:
        return CallRecord(episode, 0, 0, (1,), (2,), logprobs, ((0, 1, 0),), "stop", 0.0, 1.0)

    async def run(pool: Pool) -> list[Any]:
        writer = Writer(pool)
        calls = [record("a"), record("b", ()), record("a"), record("b")]
        found = await asyncio.gather(
            *(writer.append(call) for call in calls), return_exceptions=True
        )
        pool.add_call(record("c"))
        found.append(await writer.append(record("c")))  # another writer was there before
        await asyncio.to_thread(writer.close)
        return found

    with Pool(tmp_path / "pool.db") as pool:
        found = asyncio.run(run(pool))
        assert [found[0], *found[2:]] == [0, 1, 0, 1]
        assert found[1].status == 503
        assert [call.index for call in pool.calls("a")] == [0, 1]


def test_a_terminated_gateway_ends_with_143_and_its_parent_takes_it_along(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    with gateway(engine.url, tmp_path, env={"SELFEVO_GATEWAY_KEY": "k"}) as running:
        assert running.control("open", {"episode": "g0-0.0"}).status_code == 401
        keyed = HTTP.post(
            f"{running.url}/control/open",
            json={"episode": "g0-0.0"},
            headers={"Authorization": "Bearer k"},
        )
        assert keyed.status_code == 200
        running.process.terminate()
        assert running.process.wait(30) == 143
    code = (
        "import sys, os; sys.path.insert(0, 'tests/rl')\n"
        "from pathlib import Path; from gateway_fakes import gateway\n"
        f"with gateway({engine.url!r}, Path({str(tmp_path)!r})) as g:\n"
        "    print(g.process.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=90
    )
    pid = int(done.stdout)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


def test_the_gateway_does_not_import_torch() -> None:
    code = "import sys, rl.gateway.__main__; sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=60).returncode == 0
    )


def test_records_before_the_real_engine_are_scored_alike_by_it(tmp_path: Path) -> None:
    port_file = tmp_path / "engine.json"
    command = [sys.executable, "-m", "model.serve", "--checkpoint", str(NANO), "--port", "0"]
    command += ["--port-file", str(port_file), "--quiet", "--control", "--exit-with-parent"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            until(port_file.exists, 60)
            url = f"http://127.0.0.1:{json.loads(port_file.read_text())['port']}"
            with gateway(url, tmp_path) as running:
                base = running.open("g2-1.0", sampling={"max_tokens": 24, "seed": 11})
                _talk(base)
                HTTP.post(f"{url}/load", json={"path": str(NANO), "version": 4}).raise_for_status()
                _talk(base, "Once more.")
                with running.pool() as pool:
                    records = pool.calls("g2-1.0")
                _score(url, records)
        finally:
            process.terminate()
    assert [record.versions[0][2] for record in records] == [0, 0, 4, 4]
    new = render_next_ids([{"role": "user", "content": "On."}], TOKENIZER, {})
    for first, second in (records[:2], records[2:]):
        end = () if first.response_ids[-1] == EOS else (EOS,)
        assert second.prompt_ids == (*first.prompt_ids, *first.response_ids, *end, *new)


def _talk(base: str, text: str = "Begin.") -> None:
    client = openai.OpenAI(base_url=base, api_key="x", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": text}]
    got = client.chat.completions.create(model="m", messages=messages).choices[0].message
    messages += [{"role": "assistant", "content": got.content}, {"role": "user", "content": "On."}]
    list(client.chat.completions.create(model="m", messages=messages, stream=True))


def _score(url: str, records: list[CallRecord]) -> None:
    """The engine's own log-probs of prompt and response, read as one prompt."""
    for record in records:
        body = {"prompt": [*record.prompt_ids, *record.response_ids], "max_tokens": 0}
        body |= {"echo": True, "logprobs": 0}
        got = HTTP.post(f"{url}/v1/completions", json=body).raise_for_status().json()
        values = got["choices"][0]["logprobs"]["token_logprobs"][len(record.prompt_ids) :]
        assert values == pytest.approx(record.logprobs, abs=1e-4)
        assert record.t_start <= record.t_end <= time.time()
