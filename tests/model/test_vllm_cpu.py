"""A real vLLM on the processor: our command, our protocol, our numbers; and each mend's fault.

Both servers are started at once, since nearly all of a start is waiting for one core.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_helpers import ADD, HELLO, serving, tiny_tokenizer
from small_model import make_uneven
from vllm_mends import GREEDY, NEW

from model.batching import Batcher
from model.checkpoint import load_model, save_checkpoint
from model.config import PRESETS
from model.errors import ModelError
from model.generate import Engine, Generation, GenRequest
from model.running import RunningBatch
from model.service import Service
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.vllm_serve import find_vllm
from rl.engine_http import HttpEngine
from rl.pool import Pool
from rl.weight_sync import WeightPush

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "model" / "checkpoints" / "nano"
START_S = 600
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter that has vLLM."""
    try:
        return find_vllm(os.environ).python
    except ModelError as error:
        pytest.skip(f"vllm: {error}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random checkpoints of the same sizes."""
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    config = replace(
        PRESETS["nano"],
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        num_local_experts=8,
        max_position_embeddings=1024,
        initializer_range=0.15,
    )
    return {
        name: save_checkpoint(
            make_uneven(Transformer(config, seed=seed), seed, bias=0.2),
            folder / name,
            dtype="float32",
            tokenizer_from=folder / "tokenizer",
        )
        for name, seed in (("a", 3), ("b", 4))
    }


def ours(checkpoint: Path, prompts: list[list[int]], new: int) -> list[Generation]:
    engine = Engine(load_model(checkpoint), device="cpu")
    return engine.generate([greedy(prompt, new) for prompt in prompts])


def greedy(prompt: list[int], new: int) -> GenRequest:
    return GenRequest(prompt_ids=tuple(prompt), max_new_tokens=new, temperature=0)


def assert_same(made: list[Generation], expected: list[Generation]) -> None:
    """The same ids, and log-probs as near as two orders of float32 sums can be. Where two tokens
    are equally likely to that accuracy, either may have been chosen; nothing after it is compared.
    """
    ties = 0
    for mine, theirs in zip(made, expected, strict=True):
        fork = next(
            (i for i, (a, b) in enumerate(zip(mine.ids, theirs.ids, strict=False)) if a != b), None
        )
        compared = slice(None if fork is None else fork + 1)
        assert mine.logprobs[compared] == pytest.approx(
            theirs.logprobs[compared], rel=1e-4, abs=1e-5
        )
        ties += fork is not None
        assert fork is not None or len(mine.ids) == len(theirs.ids)
    assert ties <= len(made) // 4


# ---------------------------------------------------------------- the mends


@pytest.fixture(scope="module")
def faults(
    python: Path, tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What an engine gave with all mends, and without each of them."""
    out = tmp_path_factory.mktemp("mends") / "out.json"
    script = Path(__file__).with_name("vllm_mends.py")
    done = subprocess.run(
        [python, script, tiny["a"], tiny["b"], out],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    results: dict[str, Any] = json.loads(out.read_text())
    assert "fault" not in results["none"], results["none"]["fault"]
    return results


def as_made(rows: list[Any]) -> list[Generation]:
    return [Generation(ids, logprobs, "length", False, 0) for ids, logprobs in rows]


def test_with_all_mends_tokens_and_logprobs_are_ours_before_and_after_reloads(
    faults: dict[str, Any], tiny: dict[str, Path]
) -> None:
    first, second = (ours(tiny[name], GREEDY, NEW) for name in ("a", "b"))
    assert [row.ids for row in first] != [row.ids for row in second]
    assert_same(as_made(faults["none"]["greedy"]), first)
    assert_same(as_made(faults["none"]["b"]), second)
    assert faults["none"]["a again"] == faults["none"]["greedy"]


def test_without_router_the_first_request_ends_the_engine(faults: dict[str, Any]) -> None:
    assert 'assert self.scoring_func == "softmax"' in faults["router"]["fault"]


def test_without_loader_a_reload_ends_the_worker(faults: dict[str, Any]) -> None:
    assert "has no attribute '__name__'" in faults["loader"]["fault"]


def test_without_repack_a_reload_gives_other_outputs(faults: dict[str, Any]) -> None:
    assert faults["repack"]["b"] != faults["none"]["b"]
    assert faults["repack"]["a again"] != faults["none"]["greedy"]


def test_without_seed_a_prompt_read_in_steps_ends_the_engine(faults: dict[str, Any]) -> None:
    assert "CPU Generator does not use offset" in faults["seed"]["fault"]
    ((split, _),), ((whole, _),) = (faults[name]["seeded"] for name in ("none", "none, unsplit"))
    assert split == whole  # the tokens thrown away took nothing from the request's own draws


# ---------------------------------------------------------------- the servers


@dataclass
class Running:
    """A `model.serve --engine vllm`, its checkpoint and what it wrote so far."""

    process: subprocess.Popen[str]
    checkpoint: Path
    port_file: Path
    log: Path
    url: str = ""

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self.port_file.exists():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.1)
        self.url = f"http://127.0.0.1:{json.loads(self.port_file.read_text())['port']}"


def start(checkpoint: Path, folder: Path, *more: str) -> Running:
    port_file, log = folder / "port.json", folder / "log"
    command = [sys.executable, "-m", "model.serve", "--engine", "vllm", "--port", "0", "--eager"]
    command += ["--checkpoint", str(checkpoint), "--port-file", str(port_file)]
    command += ["--cache-tokens", "16384", "--max-batch", "16", "--threads", "1", "--quiet", *more]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, cwd=ROOT)
    return Running(process, checkpoint, port_file, log)


@pytest.fixture(scope="module")
def both(
    python: Path,
    tiny: dict[str, Path],
    faults: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Running]]:
    servers = {
        "nano": start(NANO, tmp_path_factory.mktemp("nano"), "--control"),
        "tiny": start(tiny["a"], tmp_path_factory.mktemp("tiny"), "--control"),
    }
    try:
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            if server.process.poll() is None:
                server.process.terminate()
        for server in servers.values():
            server.process.wait(60)


@pytest.fixture(scope="module")
def own() -> Iterator[str]:
    """Our own engine on the nano, in the same protocol."""
    tokenizer = Tokenizer.load(NANO)
    runner = RunningBatch(Engine(load_model(NANO), device="cpu", max_batch=16), max_batch=16)
    service = Service(
        name="nano",
        tokenizer=tokenizer,
        batcher=Batcher(runner, max_batch=16, max_queue=64),
        context=4096,
        vocab_size=2048,
    )
    with serving(service) as url:
        yield url


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_greedy_tokens_and_logprobs_are_ours_before_and_after_a_reload(
    both: dict[str, Running], tiny: dict[str, Path], tmp_path: Path, name: str
) -> None:
    server = both[name]
    prompts = [[3 + (5 * i + 11 * j) % 300 for j in range(6 + 9 * i)] for i in range(6)]
    expected = ours(server.checkpoint, prompts, 24)
    changed = load_model(server.checkpoint)
    with HttpEngine(server.url) as engine:
        assert engine.is_vllm
        assert_same(engine.generate([greedy(prompt, 24) for prompt in prompts]), expected)
        for weight in changed.parameters():
            weight.data.mul_(1.02)
        push = WeightPush(engine, "file", folder=tmp_path / "weights", dtype=changed.dtype)
        began = time.monotonic()
        push.push(changed, version=7)
        print(f"\n{name}: reload with pause and files {time.monotonic() - began:.2f} s")
        after = engine.generate([greedy(prompt, 24) for prompt in prompts])
        assert_same(after, ours(tmp_path / "weights", prompts, 24))
        assert {made.version for made in after} == {7}
        began = time.monotonic()
        engine.load(server.checkpoint, version=8)
        print(f"{name}: reload {time.monotonic() - began:.2f} s")
        assert_same(engine.generate([greedy(prompt, 24) for prompt in prompts]), expected)


@pytest.mark.parametrize(
    "body",
    [
        {"return_token_ids": True},
        {"tools": [ADD], "max_tokens": 40},
        {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}},
        {"response_format": JSON_FORMAT},
        {"max_tokens": 5},
    ],
    ids=["chat", "auto", "required", "named", "schema", "short"],
)
def test_chat_answers_as_our_own_server(
    both: dict[str, Running], own: str, body: dict[str, Any]
) -> None:
    asked = {"model": "nano", "messages": HELLO, "temperature": 0, "max_tokens": 150, **body}
    found = [
        httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=120).json()
        for url in (both["nano"].url, own)
    ]
    (theirs, mine) = (answer["choices"][0] for answer in found)
    for name in ("content", "reasoning_content"):
        assert theirs["message"][name] == mine["message"][name]
    calls = [
        [call["function"] for call in choice["message"].get("tool_calls") or []]
        for choice in (theirs, mine)
    ]
    assert [(c["name"], json.loads(c["arguments"])) for c in calls[0]] == [
        (c["name"], json.loads(c["arguments"])) for c in calls[1]
    ]
    for name in ("finish_reason", "constrained"):
        assert theirs[name] == mine[name]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert found[0]["usage"][name] == found[1]["usage"][name]
    if body.get("tool_choice"):
        assert calls[0] and theirs["finish_reason"] == "tool_calls"
    if body.get("response_format"):
        assert set(json.loads(theirs["message"]["content"])) == {"n", "ok"}
    if body.get("return_token_ids"):
        assert theirs["token_ids"] == mine["token_ids"]
        assert theirs["prompt_token_ids"] == mine["prompt_token_ids"]
        logprobs = [[e["logprob"] for e in c["logprobs"]["content"]] for c in (theirs, mine)]
        assert logprobs[0] == pytest.approx(logprobs[1], rel=1e-4, abs=1e-5)


def test_text_answers_as_our_own_server(both: dict[str, Running], own: str) -> None:
    asked = {"model": "nano", "prompt": "import numpy", "temperature": 0, "max_tokens": 12}
    for more in ({}, {"return_token_ids": True}, {"response_format": JSON_FORMAT}):
        theirs, mine = (
            httpx.post(f"{url}/v1/completions", json={**asked, **more}, timeout=120).json()
            for url in (both["nano"].url, own)
        )
        one, two = theirs["choices"][0], mine["choices"][0]
        for name in ("text", "finish_reason", "constrained"):
            assert one[name] == two[name]
        if more.get("return_token_ids"):
            assert one["token_ids"] == two["token_ids"]
            assert one["logprobs"]["token_logprobs"] == pytest.approx(
                two["logprobs"]["token_logprobs"], rel=1e-4, abs=1e-5
            )


def test_a_stream_holds_what_the_whole_answer_holds(both: dict[str, Running]) -> None:
    client = openai.OpenAI(base_url=f"{both['nano'].url}/v1", api_key="none", timeout=120)
    asked: dict[str, Any] = {"model": "nano", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**asked).choices[0]
    events = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.message.content
    assert events[-1].choices[0].finish_reason == whole.finish_reason


def test_a_random_model_calls_a_tool_when_it_must(both: dict[str, Running]) -> None:
    client = openai.OpenAI(base_url=f"{both['tiny'].url}/v1", api_key="none", timeout=120)
    for seed in range(3):
        made = client.chat.completions.create(
            model="a",
            messages=HELLO,
            tools=[ADD],
            tool_choice="required",
            seed=seed,
            max_tokens=400,
        ).choices[0]
        for call in made.message.tool_calls:
            arguments = json.loads(call.function.arguments)
            assert call.function.name == "add" and set(arguments) == {"a", "b", "mood"}
            assert 0 <= arguments["a"] <= 99 and arguments["mood"] in ("calm", "hasty")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, 400),
        ("chat/completions", {"messages": HELLO, "response_format": {"type": "xml"}}, 400),
        ("chat/completions", {"messages": HELLO, "model": "another"}, 404),
        ("completions", {"prompt": [3] * 5000}, 400),
    ],
)
def test_bad_requests_are_refused_and_the_next_is_served(
    both: dict[str, Running], path: str, body: dict[str, Any], status: int
) -> None:
    url = both["nano"].url
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "nano", **body}, timeout=120)
    assert answer.status_code == status and answer.json()["error"]["message"]
    fine = {"model": "nano", "prompt": [3, 4], "max_tokens": 1}
    assert httpx.post(f"{url}/v1/completions", json=fine, timeout=120).status_code == 200


def test_a_folder_that_is_no_checkpoint_leaves_the_weights(both: dict[str, Running]) -> None:
    url = both["nano"].url
    answer = httpx.post(f"{url}/load", json={"path": "/nowhere", "version": 9}, timeout=60)
    assert answer.status_code == 400 and "no checkpoint" in answer.json()["error"]["message"]
    assert httpx.post(f"{url}/load", json={"path": 5}, timeout=60).status_code == 400


def test_a_reply_over_a_load_says_which_tokens_came_from_which_weights(
    both: dict[str, Running], tiny: dict[str, Path]
) -> None:
    """One reply that is streamed, two of one request that are not; a load while they run."""
    url, new = both["tiny"].url, 120
    body = {"model": "a", "temperature": 0, "max_tokens": new, "ignore_eos": True}
    body |= {"return_token_ids": True, "logprobs": 0}
    prompts = [[3, 5, 7], [40 + i for i in range(30)], [9, 8, 7, 6]]
    streamed: list[Any] = []
    begun, frozen = threading.Event(), threading.Event()

    def stream() -> None:
        asked = body | {"prompt": prompts[0], "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    streamed.append((json.loads(line[6:])["choices"][0], frozen.is_set()))
                if len(streamed) > 30:
                    begun.set()

    whole: list[Any] = []
    asked = body | {"prompt": prompts[1:]}
    threads = [
        threading.Thread(
            target=lambda: whole.extend(
                httpx.post(f"{url}/v1/completions", json=asked, timeout=120).json()["choices"]
            )
        ),
        threading.Thread(target=stream),
    ]
    with HttpEngine(url) as engine:
        engine.load(tiny["a"], version=20)
        for thread in threads:
            thread.start()
        assert begun.wait(60)
        engine.pause("keep")
        engine.load(tiny["b"], version=21)
        time.sleep(0.2)  # what was sent before has been read
        frozen.set()
        engine.resume()
        for thread in threads:
            thread.join(60)
        later = engine.submit(greedy(prompts[1], 4))
        engine.load(tiny["a"], version=22)
    last = streamed[-1][0]
    early = sum(len(choice["token_ids"]) for choice, late in streamed if not late)
    ids = [id for choice, _ in streamed for id in choice["token_ids"]]
    logprobs = [v for choice, _ in streamed for v in choice["logprobs"]["token_logprobs"]]
    assert last["versions"] == [[0, early, 20], [early, new, 21]] and last["version"] == 21
    replies = [(prompts[0], ids, logprobs, last["versions"])]
    for choice in whole:
        values = choice["logprobs"]["token_logprobs"]
        replies.append(
            (choice["prompt_token_ids"], choice["token_ids"], values, choice["versions"])
        )
    assert [row[0] for row in replies] == prompts
    for prompt, ids, logprobs, ((begin, cut, old), (at, end, late)) in replies:
        assert (begin, old, at, end, late) == (0, 20, cut, new, 21) and 0 < cut < new
        parts = [Generation(ids[:cut], logprobs[:cut], "length", False, 20)]
        parts.append(Generation(ids[cut:], logprobs[cut:], "length", False, 21))
        expected = [
            *ours(tiny["a"], [prompt], cut),
            *ours(tiny["b"], [prompt + ids[:cut]], new - cut),
        ]
        for part, whose in zip(parts, expected, strict=True):
            assert_same([part], [whose])
        elsewhere = ours(tiny["a"], [prompt + ids[: cut + 1]], 1)[0]
        assert (
            abs(elsewhere.logprobs[0] - logprobs[cut + 1]) > 1e-3
            or elsewhere.ids[0] != ids[cut + 1]
        )
    assert later.versions == [(0, 4, 21)]
    assert_same([later], ours(tiny["b"], [prompts[1]], 4))


def test_the_gateway_records_what_vllm_read_and_drew(
    both: dict[str, Running], tmp_path: Path
) -> None:
    url, episode = both["nano"].url, "g0-0.0"
    command = [sys.executable, "-m", "rl.gateway", "--engine", url, "--model", str(NANO)]
    command += ["--pool", str(tmp_path / "pool.db"), "--port", "0", "--quiet", "--auto-open"]
    command += ["--port-file", str(tmp_path / "port.json"), "--seed", "5", "--exit-with-parent"]
    with HttpEngine(url) as engine:
        engine.load(NANO, version=11)
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while not (tmp_path / "port.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        port = json.loads((tmp_path / "port.json").read_text())["port"]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=episode)
        messages: list[Any] = list(HELLO)
        for said in ("Now add 4 and 5.", "And 1 and 2."):
            made = client.chat.completions.create(
                model="nano", messages=messages, tools=[ADD], max_tokens=60
            )
            messages += [made.choices[0].message.model_dump(exclude_none=True)]
            messages += [{"role": "user", "content": said}]
    finally:
        process.terminate()
        process.wait(30)
    with Pool(tmp_path / "pool.db", create=False) as pool:
        first, second = pool.calls(episode)
    asked = {"model": "nano", "messages": HELLO, "tools": [ADD], "max_tokens": 1}
    whole = httpx.post(
        f"{url}/v1/chat/completions", json=asked | {"return_token_ids": True}, timeout=60
    ).json()
    assert list(first.prompt_ids) == whole["choices"][0]["prompt_token_ids"]
    assert second.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    for call in (first, second):
        body = {"model": "nano", "prompt": list(call.prompt_ids), "max_tokens": 60, "logprobs": 0}
        body |= {"temperature": 1, "seed": 5 + call.index, "return_token_ids": True}
        (alone,) = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert list(call.response_ids) == alone["token_ids"]
        assert call.logprobs == pytest.approx(
            alone["logprobs"]["token_logprobs"], rel=1e-4, abs=1e-5
        )
        assert call.versions == ((0, len(call.response_ids), 11),) and not call.constrained


def test_paused_requests_wait_for_resume(both: dict[str, Running]) -> None:
    with HttpEngine(both["tiny"].url) as engine:
        expected = engine.submit(greedy(GREEDY[0], NEW))
        engine.pause("wait")
        assert httpx.get(f"{engine.url}/is_paused", timeout=60).json()["is_paused"] is True
        made: list[Generation] = []
        thread = threading.Thread(target=lambda: made.append(engine.submit(greedy(GREEDY[0], NEW))))
        thread.start()
        thread.join(0.5)
        assert not made
        engine.resume()
        thread.join(60)
        assert_same(made, [expected])


def test_zz_a_signal_ends_it_and_takes_the_port_file_away(both: dict[str, Running]) -> None:
    server = both["tiny"]
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert children
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 143
    assert not server.port_file.exists()
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert "serving a on http://127.0.0.1:" in server.log.read_text()
