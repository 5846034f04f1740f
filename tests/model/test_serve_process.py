"""`python -m model.serve` as a process: port file, signals, parent, bad checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from serve_helpers import ADD, HELLO, tiny_model, tiny_tokenizer

from model.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    save_checkpoint(
        tiny_model(tokenizer.vocab_size), folder / "tiny", tokenizer_from=folder / "tokenizer"
    )
    return folder / "tiny"


def start(checkpoint: Path, port_file: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "model.serve",
            "--checkpoint",
            str(checkpoint),
            "--port",
            "0",
            "--port-file",
            str(port_file),
            "--device",
            "cpu",
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(port_file: Path, process: subprocess.Popen[str] | None = None) -> dict[str, int]:
    for _ in range(1200):
        if port_file.exists():
            return json.loads(port_file.read_text())
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the server did not come up")


def test_the_server_as_a_process(checkpoint: Path, tmp_path: Path) -> None:
    process = start(checkpoint, tmp_path / "run" / "port.json")
    try:
        where = wait_for(tmp_path / "run" / "port.json", process)
        assert where["pid"] == process.pid
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{where['port']}/v1", api_key="none")
        reply = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[ADD],
            tool_choice="required",
            extra_body={"return_token_ids": True},
            logprobs=True,
        )
        assert reply.choices[0].message.tool_calls[0].function.name == "add"
        assert all(math.isfinite(e.logprob) for e in reply.choices[0].logprobs.content)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143 and out == ""
    assert "serving tiny on http://127.0.0.1:" in err and "Traceback" not in err
    assert not (tmp_path / "run" / "port.json").exists()


def test_the_server_ends_with_its_parent(checkpoint: Path, tmp_path: Path) -> None:
    port_file = tmp_path / "port.json"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time\n"
            "subprocess.Popen([sys.executable, '-m', 'model.serve', *sys.argv[1:]])\n"
            "time.sleep(300)",
            "--checkpoint",
            str(checkpoint),
            "--port",
            "0",
            "--port-file",
            str(port_file),
            "--device",
            "cpu",
            "--quiet",
            "--exit-with-parent",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        pid = wait_for(port_file, parent)["pid"]
    finally:
        parent.kill()
        parent.wait(10)
    for _ in range(400):
        if not Path(f"/proc/{pid}").exists() or not port_file.exists():
            break
        time.sleep(0.05)
    assert not port_file.exists()
    parent.stderr.close()


@pytest.mark.parametrize("fault", ["no folder", "no tokenizer", "missing tensor"])
def test_an_unusable_checkpoint_is_one_line_and_exit_2(
    checkpoint: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from model.serve import main

    folder = tmp_path / "copy"
    if fault != "no folder":
        shutil.copytree(checkpoint, folder)
    if fault == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if fault == "missing tensor":
        shard = next(folder.glob("*.safetensors"))
        from safetensors.torch import load_file, save_file

        tensors = load_file(shard)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, shard, metadata={"format": "pt"})
    assert main(["--checkpoint", str(folder), "--port", "0", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(folder) in err


def test_a_taken_port_is_an_infrastructure_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from model.serve import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = main(["--checkpoint", str(checkpoint), "--port", port, "--device", "cpu"])
    assert code == 5 and "cannot listen on 127.0.0.1:" in capsys.readouterr().err
