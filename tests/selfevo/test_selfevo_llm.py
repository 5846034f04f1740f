"""The bundled endpoint's life: started, answered, ended with the block or with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from agent_tools.errors import InfraError
from selfevo.config import AgentSection
from selfevo.llm import Endpoint, ServeCommand

SERVER = """
import json, os, sys, http.server
from pathlib import Path
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def _send(self, body):
        self.send_response(200); self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json"); self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self._send(b'{"object": "list", "data": []}')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": "hello"}}]}).encode())
    def log_message(self, *a): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
part = Path(args["--port-file"] + ".part")
part.write_text(json.dumps({"port": server.server_address[1], "pid": os.getpid()}))
part.rename(args["--port-file"])
server.serve_forever()
"""


@pytest.fixture
def command(tmp_path: Path) -> ServeCommand:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    return ServeCommand((sys.executable, str(script)))


def test_auto_serves_for_the_block_and_no_longer(tmp_path: Path, command: ServeCommand) -> None:
    with Endpoint(AgentSection(), tmp_path, command) as endpoint:
        assert endpoint.base_url.startswith("http://127.0.0.1:")
        reply = endpoint.chat({"model": "nano", "messages": [{"role": "user", "content": "hi"}]})
        assert reply["choices"][0]["message"]["content"] == "hello"
        assert endpoint._served is not None and endpoint._served.process is not None
        server = psutil.Process(endpoint._served.process.pid)
        assert server.is_running()
    assert not psutil.pid_exists(server.pid) or server.status() == psutil.STATUS_ZOMBIE


def test_the_server_dies_with_a_killed_parent(tmp_path: Path, command: ServeCommand) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from selfevo.config import AgentSection\n"
        "from selfevo.llm import Endpoint, ServeCommand\n"
        f"with Endpoint(AgentSection(), Path({str(tmp_path)!r}),\n"
        f"              ServeCommand({command.argv!r})) as e:\n"
        "    print(e._served.process.pid, flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=30)
    deadline = time.monotonic() + 20
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)
    parent.stdout.close()


def test_a_server_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    broken = ServeCommand((sys.executable, "-c", "import sys; sys.exit('no memory left')"))
    with (
        pytest.raises(InfraError, match=r"exit code 1: no memory left; see .*serve\.log"),
        Endpoint(AgentSection(), tmp_path, broken),
    ):
        pass
