"""`--engine vllm` without vLLM: its command line, its refusals, the protocol, the chat template."""

import asyncio
import base64
import io
import json
import os
import socket
import stat
import subprocess
import sys
import types
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jinja2.sandbox
import numpy as np
import pytest
from serve_helpers import ADD, HELLO, tiny_model, tiny_tokenizer

from model import serve, vllm_plugin, vllm_serve
from model.chat_format import render
from model.checkpoint import save_checkpoint
from model.config import PRESETS
from model.errors import ModelError
from model.serve_types import ApiError
from model.vllm_protocol import Protocol, translate
from model.vllm_serve import Vllm, check_experts, command_of, environment_of, find_vllm

CPU = Vllm(Path("/env/bin/python"), "cpu", "0.32.0", registered=True)
GPU = Vllm(Path("/env/bin/python"), "cuda", "0.26.0", registered=False)
NANO = Path(__file__).resolve().parents[2] / "model" / "checkpoints" / "nano"


def options(*more: str) -> Namespace:
    return serve._parser().parse_args(["--engine", "vllm", "--checkpoint", str(NANO), *more])


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def fake_python(folder: Path, answer: str) -> Path:
    """A program that answers the question for vLLM as told."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_command_says_what_the_options_say() -> None:
    found = options("--max-batch", "7", "--cache-tokens", "9000", "--prefix-cache-tokens", "0")
    command = command_of(found, PRESETS["nano"], CPU, 4711)
    assert command[:3] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert value_of(command, "--model") == str(NANO)
    assert value_of(command, "--served-model-name") == "nano"
    assert value_of(command, "--port") == "4711"
    assert value_of(command, "--host") == "127.0.0.1"
    assert value_of(command, "--max-num-seqs") == "7"
    assert value_of(command, "--max-model-len") == "4096"
    assert value_of(command, "--dtype") == "float32"
    assert value_of(command, "--kv-cache-memory-bytes") == str(9000 * 6 * 2 * 64 * 4)
    assert value_of(command, "--tool-call-parser") == "minimax_m2"
    assert value_of(command, "--reasoning-parser") == "minimax_m2"
    assert value_of(command, "--generation-config") == "vllm"
    assert value_of(command, "--logprobs-mode") == "processed_logprobs"
    assert value_of(command, "--distributed-executor-backend") == "uni"
    assert json.loads(value_of(command, "--structured-outputs-config"))["enable_in_reasoning"]
    assert "--no-enable-prefix-caching" in command and "--enforce-eager" not in command
    assert value_of(command, "--chat-template").endswith("chat_template.jinja")
    assert "--weight-transfer-config" not in command


def test_a_gpu_has_its_own_type_and_weights_by_ipc() -> None:
    found = options("--control", "--eager", "--vllm-option=--seed=3", "--logprobs", "raw")
    command = command_of(found, PRESETS["nano"], GPU, 1)
    assert value_of(command, "--dtype") == "bfloat16"
    assert json.loads(value_of(command, "--weight-transfer-config")) == {"backend": "ipc"}
    assert value_of(command, "--logprobs-mode") == "raw_logprobs"
    assert "--enforce-eager" in command and command[-1] == "--seed=3"
    env = environment_of(found, GPU, {"PYTHONPATH": "/site"})
    paths = env["PYTHONPATH"].split(os.pathsep)
    assert paths[-1] == "/site" and (Path(paths[1]) / "selfevo_vllm-1.dist-info").is_dir()
    assert env["VLLM_SERVER_DEV_MODE"] == "1" and env["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_experts_are_named_on_a_card_and_refused_on_the_processor() -> None:
    found = options("--routed-experts")
    check_experts(found, GPU)
    assert "--enable-return-routed-experts" in command_of(found, PRESETS["nano"], GPU, 1)
    assert "--enable-return-routed-experts" not in command_of(options(), PRESETS["nano"], GPU, 1)
    with pytest.raises(ModelError, match="on a card only"):
        check_experts(found, CPU)


def test_without_control_nobody_can_change_the_weights() -> None:
    env = environment_of(options(), CPU, {})
    assert "VLLM_SERVER_DEV_MODE" not in env and env["HF_HUB_OFFLINE"] == "1"
    assert environment_of(options(), CPU, {"HF_HUB_OFFLINE": "0"})["HF_HUB_OFFLINE"] == "0"
    threads = environment_of(options("--threads", "2"), CPU, {})
    assert threads["OMP_NUM_THREADS"] == "2" and threads["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_the_entry_point_names_the_plugin() -> None:
    folder = Path(vllm_serve.__file__).parent / "vllm_entry"
    ask = (
        "import importlib.metadata as m, json; print(json.dumps([p.value for p in "
        "m.entry_points(group='vllm.general_plugins')]))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", ask],
        env={"PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == ["model.vllm_plugin:register"]


@pytest.mark.parametrize(
    ("answer", "device", "reason"),
    [
        ("[{}, []]", "auto", "has no vLLM; run `make setup-vllm`"),
        ("no json", "auto", "does not run as Python"),
        ('[{"vllm-cpu": "0.32.0"}, []]', "cuda", "is built for cpu"),
        ('[{"vllm": "0.26.0"}, []]', "cpu", "is built for cuda"),
    ],
)
def test_an_interpreter_without_a_fitting_vllm_is_refused(
    tmp_path: Path, answer: str, device: str, reason: str
) -> None:
    python = fake_python(tmp_path, answer)
    with pytest.raises(ModelError, match=reason):
        find_vllm({"SELFEVO_VLLM_PYTHON": str(python)}, device)


def test_the_named_interpreter_comes_first(tmp_path: Path) -> None:
    python = fake_python(tmp_path, '[{"vllm-cpu": "0.32.0"}, ["model.vllm_plugin:register"]]')
    found = find_vllm({"SELFEVO_VLLM_PYTHON": str(python)})
    assert found == Vllm(python, "cpu", "0.32.0", registered=True)


def test_no_vllm_at_all_names_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_serve, "_ROOT", Path("/nowhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"run `make setup-vllm`, or set SELFEVO_VLLM_PYTHON"):
        find_vllm({})


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose configuration names a window layer."""
    folder = tmp_path_factory.mktemp("windowed")
    tiny_tokenizer().save(folder / "tokenizer")
    model = tiny_model(tiny_tokenizer().vocab_size)
    save_checkpoint(model, folder / "it", tokenizer_from=folder / "tokenizer")
    config = replace(model.config, attn_type_list=(1, 2), sliding_window=4).to_dict()
    (folder / "it" / "config.json").write_text(json.dumps(config))
    return folder / "it"


@pytest.mark.parametrize(
    ("more", "code", "reason"),
    [
        (["--checkpoint", "/nowhere"], 2, "/nowhere"),
        (["--max-batch", "0"], 2, "--max-batch is 0"),
        (["--control", "--host", "0.0.0.0"], 2, "use a loopback address"),
        (["--device", "cuda"], 2, "is built for cpu"),
        (["--port", "1", "--host", "192.0.2.1"], 5, "try --port 0"),
    ],
)
def test_bad_arguments_end_it_before_vllm_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    reason: str,
) -> None:
    python = fake_python(tmp_path, '[{"vllm-cpu": "0.32.0"}, []]')
    monkeypatch.setenv("SELFEVO_VLLM_PYTHON", str(python))
    assert vllm_serve.serve(options(*more)) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1


def test_a_port_that_another_listens_on_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = fake_python(tmp_path, '[{"vllm-cpu": "0.32.0"}, []]')
    monkeypatch.setenv("SELFEVO_VLLM_PYTHON", str(python))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert vllm_serve.serve(options("--port", str(taken.getsockname()[1]))) == 5
    assert "try --port 0" in capsys.readouterr().err


def test_a_model_that_vllm_does_not_compute_is_refused(
    windowed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vllm_serve.serve(options("--checkpoint", str(windowed))) == 2
    assert "vLLM computes the released architecture only" in capsys.readouterr().err


def test_a_vllm_that_dies_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nif [ $1 = -c ]; then echo \'[{"vllm-cpu": "0"}, []]\'; else exit 3; fi\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("SELFEVO_VLLM_PYTHON", str(python))
    port_file = tmp_path / "port.json"
    assert vllm_serve.serve(options("--port", "0", "--port-file", str(port_file))) == 1
    assert "vLLM ended with exit code 3" in capsys.readouterr().err and not port_file.exists()


# ---------------------------------------------------------------- the protocol

TOKENIZER = tiny_tokenizer()
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def test_a_plain_request_is_left_as_it_is() -> None:
    body = {"prompt": "a", "max_tokens": 3, "structured_outputs": None}
    assert translate(body, TOKENIZER, 100, chat=False) is False
    assert body == {"prompt": "a", "max_tokens": 3, "structured_outputs": None}


def test_grammars_are_those_of_our_own_server() -> None:
    chat: dict[str, Any] = {"messages": HELLO, "response_format": JSON_FORMAT, "max_tokens": 9999}
    assert translate(chat, TOKENIZER, 100, chat=True)
    assert "REASONING?" in chat["structured_outputs"]["grammar"] and chat["max_tokens"] == 100
    assert "response_format" not in chat
    text: dict[str, Any] = {"prompt": "a", "response_format": JSON_FORMAT}
    assert translate(text, TOKENIZER, 100, chat=False)
    assert text["structured_outputs"]["grammar"].startswith("start: %json")
    call: dict[str, Any] = {"messages": HELLO, "tools": [ADD], "tool_choice": "required"}
    assert translate(call | {"stop": "x"}, TOKENIZER, 100, chat=True)
    assert translate(call, TOKENIZER, 100, chat=True) and call["tool_choice"] == "auto"
    assert '<invoke name=\\"add\\">' in call["structured_outputs"]["grammar"]
    assert call["max_tokens"] == 100


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [ADD], "tool_choice": {"function": {"name": "sub"}}}, "not among the tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_what_our_own_server_refuses_is_refused(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(ApiError, match=reason):
        translate({"messages": HELLO, **body}, TOKENIZER, 100, chat=True)


class Upstream:
    """In vLLM's place: notes the request and answers as told."""

    def __init__(self, kind: str, parts: list[bytes]) -> None:
        self.kind, self.parts, self.got = kind, parts, b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.got = (await receive())["body"]
        headers = [(b"content-type", self.kind.encode()), (b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture
def answer_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a client gets of an upstream's answer to the last of some requests: status and bytes."""
    TOKENIZER.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["nano"].to_dict()))
    monkeypatch.setenv("SELFEVO_VLLM_CHECKPOINT", str(tmp_path))

    def ask(upstream: Upstream, *paths_and_bodies: Any) -> tuple[int, bytes]:
        protocol, sent = Protocol(upstream), list[Any]()

        async def send(message: Any) -> None:
            sent.append(message)

        for path, body in zip(paths_and_bodies[::2], paths_and_bodies[1::2], strict=True):
            message = {"type": "http.request", "body": body, "more_body": False}
            sent.clear()

            async def receive(message: Any = message) -> Any:
                return message

            scope = {"type": "http", "method": "POST", "path": path, "query_string": b""}
            asyncio.run(protocol(scope, receive, send))
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent)

    return ask


CHAT = "/v1/chat/completions"


def test_a_whole_answer_gets_our_fields(answer_of: Any) -> None:
    choice = {"index": 0, "message": {"reasoning": "so\n", "content": "\n\nyes"}}
    body = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {}}
    raw = json.dumps(body | {"prompt_token_ids": [1, 2]}).encode()
    upstream = Upstream("application/json", [raw[:20], raw[20:]])
    asked = json.dumps({"messages": HELLO, "return_token_ids": True}).encode()
    status, found = answer_of(upstream, CHAT, asked)
    made = json.loads(found)["choices"][0]
    assert status == 200 and json.loads(upstream.got)["logprobs"] is True
    assert made["message"]["content"] == "yes" and made["message"]["reasoning_content"] == "so"
    assert made["constrained"] is False and made["version"] == 0
    assert made["prompt_token_ids"] == [1, 2]


def test_experts_come_as_rows_beside_the_ids(answer_of: Any) -> None:
    rows_TLk = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)
    np.save(saved := io.BytesIO(), rows_TLk)
    text = base64.b64encode(saved.getvalue()).decode()
    choice = {"index": 0, "text": "a", "finish_reason": "stop", "token_ids": [4, 5]}
    body = {"id": "1", "object": "text_completion", "usage": {}}
    for ids, experts, found in [
        (True, text, rows_TLk.reshape(4, 6).tolist()), (True, None, None), (False, text, None)
    ]:  # fmt: skip
        choices = [choice | {"routed_experts": experts}]
        upstream = Upstream("application/json", [json.dumps(body | {"choices": choices}).encode()])
        asked = json.dumps({"prompt": "b", "return_token_ids": ids}).encode()
        (made,) = json.loads(answer_of(upstream, "/v1/completions", asked)[1])["choices"]
        assert made.get("routed_experts") == found
        assert ("routed_experts" in made) == (found is not None)


def test_an_update_by_ipc_gives_replies_its_version(answer_of: Any) -> None:
    choice = {"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {}}
    upstream = Upstream("application/json", [json.dumps(body).encode()])
    finish = ("/finish_weight_update", b'{"weight_version": "6"}')
    _, found = answer_of(upstream, *finish, CHAT, json.dumps({"messages": HELLO}).encode())
    assert json.loads(found)["choices"][0]["version"] == 6


def test_a_call_that_vllm_drops_is_reported_with_its_reason(answer_of: Any) -> None:
    text = '</think>\n\n<minimax:tool_call>\n<invoke name="sub">\n</invoke>\n</minimax:tool_call>'
    choice = {
        "index": 0,
        "message": {"content": None, "tool_calls": []},
        "finish_reason": "stop",
        "token_ids": TOKENIZER.encode(text),
    }
    body = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": {}}
    upstream = Upstream("application/json", [json.dumps(body).encode()])
    asked = json.dumps({"messages": HELLO, "tools": [ADD]}).encode()
    made = json.loads(answer_of(upstream, CHAT, asked)[1])["choices"][0]
    assert "there is no tool 'sub'" in made["tool_call_error"]
    assert "<invoke" in made["message"]["content"] and "token_ids" not in made


def test_a_stream_is_changed_event_by_event_wherever_it_is_cut(answer_of: Any) -> None:
    deltas: list[Any] = [{"reasoning": "a\n"}, {"reasoning": "b\n"}, {"content": "\n"}]
    deltas += [{"content": "\nc"}, {"content": "\n\nd"}]
    events = [
        {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}
        for delta in deltas
    ]
    raw = b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events)
    raw += b"data: [DONE]\n\n"
    asked = json.dumps({"messages": HELLO, "stream": True}).encode()
    for cut in range(1, len(raw), 37):
        upstream = Upstream("text/event-stream; charset=utf-8", [raw[:cut], raw[cut:]])
        lines = answer_of(upstream, CHAT, asked)[1].decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        made = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
        assert "".join(d.get("reasoning_content", "") for d in made) == "a\nb"
        assert "".join(d.get("content", "") for d in made) == "c\n\nd"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/load", b"{}", 400),
        ("/load", b'{"path": "/nowhere", "version": 1}', 400),
        ("/load", b'{"path": "/nowhere", "version": true}', 400),
        ("/pause", b"[1]", 400),
        (CHAT, b'{"messages": [], "tool_choice": "required"}', 400),
        (CHAT, b"x" * (16 * 2**20 + 1), 413),
    ],
)
def test_bad_bodies_are_refused_with_a_reason(
    answer_of: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: bytes, status: int
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    upstream = Upstream("application/json", [b"{}"])
    found, raw = answer_of(upstream, path, body)
    assert found == status and json.loads(raw)["error"]["message"] and upstream.got == b""


# ---------------------------------------------------------------- the chat template

CALL = {"function": {"name": "add", "arguments": {"a": 1, "s": "x\ny", "l": [1, {"é": None}]}}}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    HELLO,
    [{"role": "system", "content": "S"}, {"role": "developer", "content": PARTS}, *HELLO],
    [*HELLO, {"role": "assistant", "content": "<think>\nT\n</think>\n\nyes"}, *HELLO],
    [
        *HELLO,
        {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [CALL] * 2},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": PARTS},
        {"role": "assistant", "content": "ok", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "done</think>fin"},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [ADD]])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_template_writes_what_render_writes(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool
) -> None:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = env.from_string(vllm_serve.CHAT_TEMPLATE.read_text(encoding="utf-8"))
    written = template.render(messages=messages, tools=tools, add_generation_prompt=prompt)
    assert written == render(messages, tools, add_generation_prompt=prompt)


# ---------------------------------------------------------------- mends of the GPU's faults


class Card:
    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True


def test_a_card_without_flashinfer_gets_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_plugin, "_platform", Card)
    for name in ("VLLM_USE_FLASHINFER_SAMPLER", "TRITON_F32_DEFAULT"):
        monkeypatch.setenv(name, "set by the user")
    assert not vllm_plugin.sample_without_flashinfer() and not vllm_plugin.exact_float32()
    for name in ("VLLM_USE_FLASHINFER_SAMPLER", "TRITON_F32_DEFAULT"):
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    assert not vllm_plugin.sample_without_flashinfer()
    monkeypatch.delitem(sys.modules, "flashinfer")
    assert vllm_plugin.sample_without_flashinfer() and vllm_plugin.exact_float32()
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"


def test_ray_is_there_during_one_import_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> str:
        import ray  # noqa: F401

        return "engine"

    class Factory:
        _registry: ClassVar = {"ipc": load}

    at = "vllm.distributed.weight_transfer.factory"
    names = [at[:end] for end in range(len(at)) if at[end] == "."]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module: Any = types.ModuleType(at)
    module.WeightTransferEngineFactory = Factory
    monkeypatch.setitem(sys.modules, at, module)
    with pytest.raises(ModuleNotFoundError):
        Factory._registry["ipc"]()
    vllm_plugin.import_ipc_without_ray()
    vllm_plugin.import_ipc_without_ray()  # a second time changes nothing
    assert Factory._registry["ipc"]() == "engine" and "ray" not in sys.modules


def test_a_mend_that_does_not_fit_is_reported_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks() -> bool:
        raise AttributeError("no such thing in this release")

    mends = {"router": breaks, "seed": lambda: True, "ray": lambda: False, "loader": lambda: True}
    monkeypatch.setattr(vllm_plugin, "MENDS", mends)
    monkeypatch.setenv("SELFEVO_VLLM_WITHOUT", "loader, moon")
    vllm_plugin.register()
    said = capsys.readouterr().err
    assert "mend 'router' does not fit this vLLM and is left out: no such thing" in said
    assert "no mend 'moon'" in said and "vLLM mended: seed; left out: loader, moon" in said
