"""What endpoints, disks and users can do wrong: one line each, and nothing half-written."""

from __future__ import annotations

import json
import shlex
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from selfevo_lab import point_at, quiet

from agent_tools.config_text import ConfigError
from agent_tools.errors import InfraError, UserError
from agent_tools.git_configs import LabRepo
from selfevo import cli, llm, loop, replay, report
from selfevo.agent_prompts import AGENT_TOOLS, call_message
from selfevo.agents import Call, Malformed, plain_message, read_reply
from selfevo.arms import Commands
from selfevo.campaign import RunOptions, read_view
from selfevo.config import AgentSection, load_lab_config
from selfevo.lab import find_campaign
from selfevo.llm import Endpoint
from selfevo.summary import next_commands

PASS = call_message("abstain", {"why": "healthy"})
EDIT = {"key": "optim.lr", "direction": "decrease", "why": "x"}
SHAPES: list[Any] = ["abc", {"a": 1}, ["abc"], [None], [{"id": 1}], [{"id": 1, "function": "f"}]]


def calling(arguments: str) -> dict[str, Any]:
    function = {"name": "propose_edit", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}


# ------------------------------------------------------------------ replies


@pytest.mark.parametrize("calls", SHAPES)
def test_tool_calls_of_any_shape_are_a_failed_call(calls: Any) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    step = read_reply(message, AGENT_TOOLS, "c")
    assert step == Malformed("a tool call without a name")
    assert plain_message(message, step)["role"] == "assistant"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"nan"', "9" * 400])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    text = json.dumps(EDIT)[:-1] + f', "value": {value}}}'
    step = read_reply(calling(text), AGENT_TOOLS, "c")
    assert step == Malformed("propose_edit: value must be a number")


def test_text_that_no_file_can_hold_is_replaced_and_depth_is_survived() -> None:
    step = read_reply(calling(json.dumps(EDIT | {"why": "\ud800 up"})), AGENT_TOOLS, "c")
    assert isinstance(step, Call) and step.arguments["why"] == "? up"
    assert isinstance(read_reply(calling('{"a":' * 5000), AGENT_TOOLS, "c"), Malformed)


@pytest.mark.parametrize("calls", [SHAPES[0], SHAPES[3]])
def test_a_campaign_survives_garbage_in_a_reply_and_can_be_replayed(
    lab: Path, commands: Commands, model: Callable[..., Any], calls: Any
) -> None:
    garbage = {"role": "assistant", "content": "\ud800", "tool_calls": calls}
    point_at(lab, model(garbage).url)
    code, folder = loop.start(lab, RunOptions(rounds=1), quiet, commands)
    view = read_view(folder)
    assert code == 0 and view.rounds[1].verdict == "no_proposal" and view.rounds[1].strikes == 3
    lines: list[str] = []
    replay.show(folder, lines.append)
    assert sum("failed call" in line for line in lines) >= 3
    assert report.write(folder)[1].is_file()


def test_odd_token_counts_do_not_reach_the_log(
    lab: Path, commands: Commands, model: Callable[..., Any]
) -> None:
    choice = {"index": 0, "message": PASS, "finish_reason": {"a": 1}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    point_at(lab, model(json.dumps({**body, "choices": [choice], "usage": [1]}).encode()).url)
    code, folder = loop.start(lab, RunOptions(rounds=1), quiet, commands)
    events = (folder / "events.jsonl").read_text().splitlines()
    reply = next(e for e in map(json.loads, events) if e["kind"] == "agent.reply")
    assert code == 0 and reply["data"]["prompt_tokens"] is None
    assert isinstance(reply["data"]["finish_reason"], str)


# ------------------------------------------------------------------ endpoints


@pytest.fixture
def slow() -> Iterator[Callable[[bool], str]]:
    """A server that lists its models and then never answers: silent, or with a blank now and then.

    Returns its address.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    drip = threading.Event()
    closed = threading.Event()

    def serve(client: socket.socket) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        with client:
            try:
                if client.recv(65536).startswith(b"GET"):
                    body = b'{"object": "list", "data": []}'
                    close = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
                    client.sendall(head + close + body)
                    return
                if drip.is_set():
                    client.sendall(head + b"Content-Length: 100000\r\n\r\n")
                while not closed.wait(0.05):
                    if drip.is_set():
                        client.sendall(b" ")
            except OSError:
                return  # the client went

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()

    def start(dripping: bool) -> str:
        if dripping:
            drip.set()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start
    closed.set()
    listener.close()


@pytest.mark.parametrize(
    ("dripping", "words"), [(False, "no answer within 0.3 s"), (True, "no whole answer within")]
)
def test_an_endpoint_that_never_answers_is_given_up(
    tmp_path: Path,
    slow: Callable[[bool], str],
    monkeypatch: pytest.MonkeyPatch,
    dripping: bool,
    words: str,
) -> None:
    monkeypatch.setattr(llm, "RETRY_PAUSES_S", 0.1 if dripping else 20.0)
    settings = AgentSection(base_url=slow(dripping), timeout_s=0.3)
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    with Endpoint(settings, tmp_path) as endpoint, pytest.raises(InfraError, match=words):
        endpoint.chat(request)


def test_an_endpoint_that_is_down_leaves_no_campaign(lab: Path, commands: Commands) -> None:
    point_at(lab, "http://127.0.0.1:9/v1")
    with pytest.raises(InfraError, match=r"no connection; .*agent\.base_url"):
        loop.start(lab, RunOptions(), quiet, commands)
    assert not list((lab / "runs").glob("c*")) and LabRepo(lab).branches("selfevo/") == []


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "", "http://a b"])
def test_an_address_that_is_none_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"agent\.base_url: must be auto, or an address"):
        load_lab_config(f"agent: {{base_url: {json.dumps(url)}}}")


# ------------------------------------------------------------------ disks and names


def test_a_full_disk_under_the_checkpoint_cache_is_one_line_and_resumable(
    lab: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = SqliteSaver.put, []

    def full(self: SqliteSaver, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise sqlite3.OperationalError("database or disk is full")
        return put(self, *args, **kwargs)

    monkeypatch.setattr(SqliteSaver, "put", full)
    with pytest.raises(InfraError, match=r"checkpoints\.sqlite: .*full; free some space"):
        loop.start(lab, RunOptions(rounds=1, agent="rules"), quiet, commands)
    code, folder = loop.resume(lab, None, quiet, commands)
    assert code == 0 and read_view(folder).rounds[1].verdict == "accept"


def test_a_report_that_cannot_be_written_is_one_line(
    lab: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, folder = loop.start(lab, RunOptions(rounds=1, agent="random"), quiet, commands)
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["selfevo", "report", str(lab)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 5 and errors.startswith("error: ") and errors.count("\n") == 1


def test_proposed_commands_quote_a_folder_with_spaces(lab: Path, commands: Commands) -> None:
    spaced = lab.rename(lab.with_name("my lab"))
    code, folder = loop.start(spaced, RunOptions(rounds=1, agent="rules"), quiet, commands)
    for command in next_commands(read_view(folder), folder, code):
        assert str(spaced) in shlex.split(command)
    with pytest.raises(UserError) as refused:
        find_campaign(spaced.with_name("no lab"))
    hint = str(refused.value).split("`")[1]
    assert shlex.split(hint) == ["selfevo", "run", str(spaced.with_name("no lab"))]
