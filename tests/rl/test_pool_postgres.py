"""The pool in a real PostgreSQL server, started here on a socket of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rl.errors import ConfigError, InfraError
from rl.pool import GroupRecord, Pool, StepRecord, main
from tests.rl.test_rl_pool import CALL, REWARD

pytestmark = pytest.mark.real

WRITER = """
import sys
from dataclasses import replace
from rl.pool import Pool
from tests.rl.test_rl_pool import CALL
url, name = sys.argv[1:]
with Pool(url) as pool:
    for i in range(300):
        pool.add_call(replace(CALL, episode=name, index=i))
        print(i, flush=True)
"""


class Server:
    """`postgres` on a socket in a folder, run by an ordinary user: it refuses to serve root's."""

    def __init__(self, folder, programs):
        self.folder, self.programs = folder, programs
        self.user = "nobody" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user)
        self.run("initdb", "-D", "data", "-U", "pool", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    @property
    def url(self):
        return f"postgresql://pool@/postgres?host={self.folder}"

    def run(self, program, *arguments):
        command = [str(self.programs / program), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, user=self.user, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    def start(self):
        settings = f"-h '' -k {self.folder} -c max_connections=20 -c shared_buffers=8MB"
        self.run("pg_ctl", "-D", "data", "-w", "-l", "log", "-o", settings, "start")

    def stop(self, mode="fast"):
        self.run("pg_ctl", "-D", "data", "-w", "-m", mode, "stop")

    def kill(self):
        """SIGKILL to the server and all of its children, until none is left."""
        leader = psutil.Process(int((self.folder / "data/postmaster.pid").read_text().split()[0]))
        leader.suspend()  # it starts no new ones
        processes = [*leader.children(recursive=True), leader]
        for process in processes:
            process.kill()
        until = time.monotonic() + 30
        while any(psutil.pid_exists(process.pid) for process in processes):  # nor their remains
            assert time.monotonic() < until
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server():
    homes = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("initdb") or "").parent]
    found = [home for home in homes if (home / "initdb").is_file()]
    if not found:
        pytest.skip("postgres: install postgresql")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        home = Path(folder)
        home.chmod(0o755)
        made = Server(home, found[0])
        yield made
        made.stop("immediate")


@pytest.fixture
def url(server):
    """A database of its own."""
    import psycopg

    name = f"pool_{time.monotonic_ns()}"
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
    return server.url.replace("/postgres?", f"/{name}?")


def test_records_come_back_exactly_and_stay(url, capsys):
    import psycopg

    step = StepRecord(1, (GroupRecord("t", "mle", ("g3-0",)),))
    with pytest.raises(ConfigError, match="has no pool"):
        Pool(url, create=False)
    with Pool(url) as pool:
        pool.add_calls([CALL, replace(CALL, index=1, response_ids=(), logprobs=())])
        pool.add_reward(REWARD)
        pool.add_step(step)
        with pytest.raises(InfraError, match="duplicate key"):
            pool.add_calls([replace(CALL, index=2), replace(CALL, index=1)])
        assert pool.next_index("g3-0") == 2  # none of them was taken
    with Pool(url, create=False) as again:
        assert again.calls("g3-0")[0] == CALL
        assert again.reward("g3-0") == REWARD and again.steps() == [step]
    for sql in ("UPDATE calls SET meta = ''", "DELETE FROM rewards", "TRUNCATE steps"):
        with psycopg.connect(url) as db, pytest.raises(psycopg.Error, match="append-only"):
            db.execute(sql)
    assert main(["verify", url]) == 0
    assert "2 calls" in capsys.readouterr().out


def test_processes_that_start_together_share_one_pool(url):
    names = [f"g{i}-0" for i in range(4)]
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, name], stdout=subprocess.DEVNULL)
        for name in names
    ]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    with Pool(url, create=False) as pool:
        for name in names:
            assert [call.index for call in pool.calls(name)] == list(range(300))


@pytest.mark.parametrize("way", ["restarted", "killed"])
def test_a_server_that_goes_away_is_waited_for(server, url, way):
    """Every call is there once, whatever it was doing when the connection broke."""
    done, calls = threading.Event(), 400

    def write():
        with Pool(url) as pool:
            for i in range(calls):
                pool.add_call(replace(CALL, index=i))
                pool.next_index("g3-0")
                time.sleep(0.002)
        done.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    time.sleep(0.5)
    server.stop() if way == "restarted" else server.kill()
    time.sleep(0.3)
    server.start()
    writer.join(60)
    assert done.is_set()
    with Pool(url, create=False) as pool:
        assert [call.index for call in pool.calls("g3-0")] == list(range(calls))
        assert not pool.stats().damaged


def test_an_answer_that_was_lost_is_no_second_insert(url, monkeypatch):
    """The server takes the rows, the connection breaks before it says so."""
    with Pool(url) as pool:
        db = pool._db._db
        commit = db.commit

        def cut():
            commit()
            db.close()
            raise type(lost)("the connection is closed")

        import psycopg

        lost = psycopg.OperationalError()
        monkeypatch.setattr(db, "commit", cut)
        pool.add_call(CALL)
        pool.add_call(replace(CALL, index=1))
        assert [call.index for call in pool.calls("g3-0")] == [0, 1]


def test_no_server_is_said():
    with pytest.raises(InfraError, match=r"the pool's database: .*check its URL"):
        Pool("postgresql://pool@127.0.0.1:9/none?connect_timeout=2")
