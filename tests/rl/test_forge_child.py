"""Children: real processes that cannot outlive their parent, are restarted, and speak in lines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from gateway_fakes import until

from rl.errors import InfraError
from rl.forge.child import AliveLock, Child
from rl.forge.messages import Ended, Message, Retire
from rl.forge.servers import Server

SLEEP = [sys.executable, "-IS", "-c", "import time; time.sleep(600)"]
wait_for = partial(until, seconds=20)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    lock = AliveLock(tmp_path / "alive.lock")
    children: list[Child] = []

    def one(*command: str, restarts: int = 3) -> Child:
        child = Child("thing", tmp_path, lambda: command, lock, piped=True, restarts=restarts)
        children.append(child)
        return child

    yield one
    for child in children:
        child.stop(0.1)
    lock.close()


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_messages_go_both_ways_and_a_cut_off_line_is_none(make: Callable[..., Child]) -> None:
    echo = """
import os, sys
from rl.forge.pipe import Pipe
pipe = Pipe()
print("noise")  # goes to the log
for message in pipe:
    pipe.send(message)
    os.write(pipe._out, b'{"ended": {"group"')
    os._exit(0)
"""
    child = make(*script(echo))
    child.start_if_due(time.monotonic())
    child.send(Retire("x" * 200_000))  # more than a pipe holds
    got: list[Message] = []

    def done() -> bool:
        child.flush()
        got.extend(child.messages())
        return child.ended() is not None

    wait_for(done)
    got.extend(child.messages())
    assert got == [Retire("x" * 200_000)]
    assert "noise" in child.log.read_text()


def test_a_child_that_writes_anything_else_is_killed(make: Callable[..., Child]) -> None:
    child = make(*script("import time; print('hello', flush=True); time.sleep(600)"))
    child.start_if_due(time.monotonic())
    wait_for(lambda: child.messages() == [] and child.ended() == -signal.SIGKILL)


def test_deaths_in_a_row_are_counted_and_pauses_double(make: Callable[..., Child]) -> None:
    child = make(*script("import sys; sys.exit('error: no such thing')"), restarts=2)
    pauses = []
    for _ in range(2):
        wait_for(lambda: child.start_if_due(time.monotonic()))
        wait_for(lambda: child.ended() is not None)
        child.bury(100.0)
        assert not child.start_if_due(100.0)
        pauses.append(child._not_before - 100.0)
        child._not_before = 0.0
    assert pauses == pytest.approx([0.1, 0.2])
    child.start_if_due(1.0)
    wait_for(lambda: child.ended() is not None)
    with pytest.raises(InfraError, match=r"thing died 3 times in a row.*no such thing"):
        child.bury(1.0)


def test_a_child_that_thrives_is_forgiven(make: Callable[..., Child]) -> None:
    child = make(*script("raise SystemExit(1)"), restarts=1)
    for _ in range(3):
        child._not_before = 0.0
        child.start_if_due(1.0)
        wait_for(lambda: child.ended() is not None)
        child.bury(1.0)
        child.thrive()


PARENT = """
import os, sys, time
from pathlib import Path
from rl.forge.child import AliveLock, Child
folder = Path(sys.argv[1])
lock = AliveLock(folder / "alive.lock")
child = Child("thing", folder, lambda: sys.argv[2:], lock, piped=False, restarts=0)
child.start_if_due(time.monotonic())
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_child_ends_with_a_killed_parent_and_its_lock_tells(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *SLEEP], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    child = psutil.Process(pid)
    wait_for(lambda: "time.sleep(600)" in " ".join(child.cmdline()))  # it is tied by then
    with pytest.raises(InfraError, match="earlier session"):
        AliveLock(tmp_path / "alive.lock", wait_s=0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    AliveLock(tmp_path / "alive.lock", wait_s=20).close()
    wait_for(lambda: not psutil.pid_exists(pid) or child.status() == psutil.STATUS_ZOMBIE)


def test_a_child_whose_parent_is_gone_before_it_is_tied_does_not_start(tmp_path: Path) -> None:
    from rl.forge.child import TETHER

    done = subprocess.run([sys.executable, "-IS", TETHER, str(os.getpid() + 1), "echo", "started"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""


def test_a_worker_process_ends_with_its_standard_input() -> None:
    code = "from rl.forge.pipe import Pipe; p = Pipe(); p.leave_at_end(lambda m: p.send(m))"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    from rl.forge.messages import decode, encode

    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(encode(Ended(1, 2, 3, "done")))
    child.stdin.flush()
    assert decode(child.stdout.readline()) == Ended(1, 2, 3, "done")
    child.stdin.close()
    assert child.wait(20) == 0
    child.stdout.close()


def test_supervisor_workers_and_scorer_have_no_torch() -> None:
    """Each would cost 200 MB and seconds at every restart."""
    code = """
import sys
import rl.forge.run, rl.forge.scorer, rl.forge.worker, rl.mle_parts
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


SERVER = """
import argparse, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from model.port_file import write_port_file

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
parser.add_argument("--port-file", type=Path)
options = parser.parse_args()
try:
    server = HTTPServer(("127.0.0.1", options.port), Answer)
except OSError:
    sys.exit(5)
write_port_file(options.port_file, options.port)
server.serve_forever()
"""


def test_a_server_keeps_its_port_unless_another_process_took_it(tmp_path: Path) -> None:
    lock = AliveLock(tmp_path / "alive.lock")
    server = Server("server", tmp_path, ["-c", SERVER], lock,
                    health="/health", start_timeout_s=30, restarts=9)  # fmt: skip

    def begin() -> int:
        wait_for(lambda: server.start_if_due(time.monotonic()))
        wait_for(lambda: server.ended() is not None or server.probe(time.monotonic()))
        return server.port

    def end() -> None:
        server.kill()
        wait_for(lambda: server.ended() is not None)
        server.bury(0.0)

    try:
        first = begin()
        end()
        assert begin() == first
        end()
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", first))
            thief.listen()
            begin()
            assert server.ended() == 5
            server.bury(0.0)
            assert begin() not in (0, first) and server.probe(time.monotonic())
    finally:
        server.stop(0.1)
        lock.close()


def test_a_refusal_ends_a_run_unless_the_weights_were_replaced_meanwhile(tmp_path: Path) -> None:
    lock = AliveLock(tmp_path / "alive.lock")
    server = Server("server", tmp_path, ["-c", "raise SystemExit(2)"], lock,
                    health="/", start_timeout_s=30, restarts=9)  # fmt: skip
    server.start_if_due(time.monotonic())
    wait_for(lambda: server.ended() is not None)
    code = server.ended()
    assert code == 2 and server.refused(code, outdated=False)
    assert not server.refused(code, outdated=True) and not server.refused(-9, outdated=False)
    server.ready = True  # what ends after it answered did not end because of its arguments
    assert not server.refused(code, outdated=False)
    lock.close()


def test_a_server_that_never_answers_is_killed(tmp_path: Path) -> None:
    lock = AliveLock(tmp_path / "alive.lock")
    server = Server("server", tmp_path, ["-c", "import time; time.sleep(600)"], lock,
                    health="/", start_timeout_s=0.0, restarts=9)  # fmt: skip
    server.start_if_due(time.monotonic())
    assert not server.probe(time.monotonic() + 1.0)
    wait_for(lambda: server.ended() == -signal.SIGKILL)
    lock.close()


def test_the_gateway_reads_its_key_where_the_supervisor_puts_it() -> None:
    from rl.forge import servers
    from rl.gateway import app

    assert servers.CONTROL_KEY == app.CONTROL_KEY
