"""The pool as its callers see it: order, inputs, limits, both kinds, hosts that refuse, leaks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest
import sandbox_support
from sandbox_support import ORDINARY_UID, SYSTEM_PYTHON, as_user, needs_system_python

from agent_tools.errors import InfraError
from agent_tools.sandbox import Limits, SandboxError, ScriptJob, WarmPool, make_pool
from agent_tools.sandbox.cgroups import find_hierarchies, sweep_stale
from agent_tools.sandbox.workers import Worker

KINDS = ("bubblewrap", "process")
PATIENT = Limits(cpu_seconds=3, wall_seconds=30)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root: needs root")


@pytest.fixture(scope="module")
def plain_python() -> Iterator[Path]:
    with sandbox_support.plain_python() as python:
        yield python


@pytest.fixture(params=KINDS)
def pool(request: pytest.FixtureRequest, plain_python: Path) -> Iterator[WarmPool]:
    with make_pool(request.param, 2, python=plain_python) as made:
        yield made


def job(code: str, inputs: Path, *outputs: str, limits: Limits = PATIENT) -> ScriptJob:
    return ScriptJob(textwrap.dedent(code), inputs, outputs, limits)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def sandbox_family() -> list[psutil.Process]:
    """Our workers, what watches them and what runs below them; all carry the worker's words."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "worker.pyz" in " ".join(process.cmdline()):
                found.append(process)
    return found


def own_groups() -> list[Path]:
    folders = {f for h in find_hierarchies() for f in h.folders.values()}
    return [path for folder in folders for path in folder.glob(f"selfevo-{os.getpid()}-*")]


def test_results_come_in_order(pool: WarmPool, tmp_path: Path) -> None:
    code = "import time; time.sleep({}); open('a', 'w').write('{}'); print({})"
    jobs = [job(code.format(0.05 * (i % 2 == 0), i, i), tmp_path, "a") for i in range(8)]
    results = pool.run(jobs)
    assert [r.status for r in results] == ["ok"] * 8
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(8)]
    assert [r.files for r in results] == [{"a": str(i).encode()} for i in range(8)]


def test_inputs_with_folders_and_changes(pool: WarmPool, tmp_path: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.txt").write_text("one")
    (tmp_path / "empty.csv").write_text("")
    look = job("print(open('images/a/1.txt').read(), open('empty.csv').read())", tmp_path)
    assert {r.stdout for r in pool.run([look] * 4)} == {"one \n"}
    (tmp_path / "images" / "a" / "1.txt").write_text("two!")
    assert {r.stdout for r in pool.run([look] * 4)} == {"two! \n"}


def test_more_input_folders_than_are_kept(pool: WarmPool, tmp_path: Path) -> None:
    jobs = []
    for i in range(40):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "x").write_text(str(i))
        jobs.append(job("print(open('x').read())", folder))
    before = open_files()
    assert [r.stdout for r in pool.run([*jobs, *jobs])] == [f"{i}\n" for i in range(40)] * 2
    assert open_files() <= before + 16


def test_missing_inputs_and_wrong_arguments(pool: WarmPool, tmp_path: Path) -> None:
    future = pool.submit(job("pass", tmp_path / "nowhere"))
    with pytest.raises(SandboxError, match=r"nowhere.*cannot be read.*prepare"):
        future.result()
    with pytest.raises(SandboxError, match="plain file name"):
        job("pass", tmp_path, "../x")
    with pytest.raises(SandboxError, match="cpu_seconds"):
        Limits(cpu_seconds=0)
    with pytest.raises(SandboxError, match="kind 'podman': use 'bubblewrap', 'docker', 'process'"):
        make_pool("podman", 1, python=SYSTEM_PYTHON)  # type: ignore[arg-type]
    with pytest.raises(SandboxError, match="no cold form"):
        make_pool("process", 1, python=SYSTEM_PYTHON, cold=True)
    assert pool.run([job("print(1)", tmp_path)])[0].status == "ok"


def test_limits_hold_in_both_kinds(pool: WarmPool, tmp_path: Path) -> None:
    short = Limits(cpu_seconds=0.2, wall_seconds=1, memory_mb=64, file_mb=1, processes=8)
    codes = {
        "timeout": "while True: pass",
        "memory": "x = b'x' * (1 << 30)",
        "error": "import socket; socket.socket()",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    }
    results = pool.run([job(code, tmp_path, limits=short) for code in codes.values()])
    assert [r.status for r in results] == list(codes)
    big = job("f = open('a', 'wb'); f.write(b'x' * (2 << 20))", tmp_path, "a", limits=short)
    assert pool.run([big])[0].status in ("error", "killed")
    bomb = job("import os\nwhile True: os.fork()", tmp_path, limits=short)
    assert pool.run([bomb])[0].status in ("error", "timeout", "killed")
    assert pool.run([job("print(1)", tmp_path)] * 4)[3].stdout == "1\n"


def test_leftover_daemons_die_in_both_kinds(pool: WarmPool, tmp_path: Path) -> None:
    code = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(100)
            os._exit(0)
        os.wait()
    """
    assert {r.status for r in pool.run([job(code, tmp_path)] * 2)} == {"ok"}
    # Two workers (with bubblewrap's own watcher and a porter each), nothing else.
    assert len(sandbox_family()) <= 6


@as_root
def test_process_kind_runs_as_users_without_account(plain_python: Path, tmp_path: Path) -> None:
    with make_pool("process", 2, python=plain_python) as made:
        code = "import os, time; print(os.getuid(), os.getgid()); time.sleep(0.2)"
        seen = {r.stdout for r in made.run([job(code, tmp_path)] * 4)}
        assert len(seen) == 2
        assert all(int(text.split()[0]) >= 30_000 for text in seen)
        code = "import os; os.kill(os.getppid(), 9)"
        assert made.run([job(code, tmp_path)])[0].last_line.startswith("PermissionError")
        assert "no namespaces" in made.missing[0]


def test_worker_that_dies_is_replaced(plain_python: Path, tmp_path: Path) -> None:
    with make_pool("bubblewrap", 1, python=plain_python) as made:
        (worker,) = templates()
        worker.kill()
        assert made.run([job("print(1)", tmp_path)])[0].stdout == "1\n"
        future = made.submit(job("import time; time.sleep(20)", tmp_path))
        for _ in range(2):  # it is tried once more, then given up as the script's doing
            kill_busy_worker()
        assert future.result(30).status == "killed"
        assert made.run([job("print(2)", tmp_path)])[0].stdout == "2\n"


def test_fault_of_our_own_ends_its_job_and_not_the_pool(
    plain_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_pool("bubblewrap", 1, python=plain_python) as made:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "run", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                made.submit(job("print(1)", tmp_path)).result(30)
        assert made.run([job("print(1)", tmp_path)])[0].stdout == "1\n"


def templates() -> list[psutil.Process]:
    """The workers themselves: bubblewrap's watcher is their parent."""
    return [p for p in sandbox_family() if (p.parent() or p).name() == "bwrap" != p.name()]


def kill_busy_worker() -> None:
    """Wait for a worker that has a script below it besides its porter, and kill the worker.

    A child that stays is a script: what a worker forks while it starts is gone at once.
    """
    give_up = time.monotonic() + 60
    seen: set[int] = set()
    while time.monotonic() < give_up:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in templates():
                below = {child.pid for child in process.children()}
                if len(below) > 1 and below == seen:
                    process.kill()
                    process.wait(5)
                    return
                seen = below
        time.sleep(0.5)
    raise AssertionError("no busy worker")


@pytest.mark.parametrize("kind", KINDS)
def test_close_leaves_nothing(kind: str, plain_python: Path, tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text()
    fds = open_files()
    with make_pool(kind, 2, python=plain_python) as made:  # type: ignore[arg-type]
        made.run([job("open('/tmp/left-by-script', 'w')" * (kind == KINDS[0]), tmp_path)] * 4)
        slow = job("import time; time.sleep(60)", tmp_path, limits=Limits(30, 60))
        running = [made.submit(slow) for _ in range(2)]
        queued = made.submit(slow)
        give_up = time.monotonic() + 30
        while not all(f.running() for f in running) and time.monotonic() < give_up:
            time.sleep(0.01)
    assert [f.result(1).status for f in running] == ["killed"] * 2
    with pytest.raises(CancelledError):
        queued.result(1)
    with pytest.raises(SandboxError, match="closed"):
        made.submit(slow)
    assert sandbox_family() == []
    assert Path("/proc/self/mounts").read_text() == mounts
    assert open_files() == fds
    assert list(Path(tempfile.gettempdir()).glob(f"selfevo-sandbox-{os.getpid()}-*")) == []
    assert own_groups() == []
    assert not Path("/tmp/left-by-script").exists()


OWNER = """
import sys, time
from pathlib import Path
from agent_tools.sandbox import Limits, ScriptJob, make_pool
pool = make_pool(sys.argv[1], 2, python=Path(sys.argv[2]))
code = "import os, time\\nos.setsid() if os.fork() == 0 else 0\\nwhile True: pass"
for _ in range(2):
    pool.submit(ScriptJob(code, Path(sys.argv[3]), (), Limits(60, 100)))
time.sleep(0.7)
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_owner_leaves_no_process(kind: str, plain_python: Path, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, kind, str(plain_python), str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=sandbox_support.ROOT,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 6
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    sweep_stale()
    make_pool("process", 1, python=plain_python).close()  # sweeps the folders of dead owners
    assert list(Path(tempfile.gettempdir()).glob(f"selfevo-sandbox-{owner.pid}-*")) == []
    folders = {f for h in find_hierarchies() for f in h.folders.values()}
    assert [p for f in folders for p in f.glob(f"selfevo-{owner.pid}-*")] == []


# ---------------------------------------------------------------- ordinary users, refusing hosts

PROBE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from agent_tools.errors import InfraError
from agent_tools.sandbox import Limits, ScriptJob, make_pool
inputs = Path(sys.argv[1]) / "inputs"
short = Limits(cpu_seconds=0.3, wall_seconds=1, memory_mb=64, processes=8)
codes = [
    "import os; open('a', 'w').write(str(os.getuid()))",
    "while True: pass",
    "x = b'x' * (1 << 30)",
    "import os\\nwhile True: os.fork()",
    "import socket; socket.socket()",
    "import os, time\\nif os.fork() == 0:\\n  os.setsid(); time.sleep(100)\\nopen('a', 'w')",
    "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))\\nopen('a', 'w')",
    "import os; os.kill(-1, 0)\\nopen('a', 'w')",
]
found = {}
for kind in sys.argv[2:]:
    try:
        with make_pool(kind, 1, python=Path("/usr/bin/python3")) as pool:
            results = pool.run([ScriptJob(c, inputs, ("a",), short) for c in codes])
            found[kind] = [[r.status, r.stdout.strip()] for r in results]
            found["missing"] = pool.missing
    except InfraError as error:
        found[kind] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def open_copy() -> Iterator[Path]:
    with sandbox_support.open_copy() as folder:
        yield folder


def probe(folder: Path, *prefix: str, kinds: tuple[str, ...] = KINDS) -> dict[str, object]:
    done = subprocess.run(
        [*prefix, str(SYSTEM_PYTHON), "-B", "-c", PROBE, str(folder), *kinds],
        capture_output=True,
        timeout=90,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@needs_system_python
def test_ordinary_user(open_copy: Path) -> None:
    found = probe(open_copy, *as_user())
    inside = [["ok", ""], ["timeout", ""], ["memory", ""]]
    for kind in KINDS:
        results = found[kind]
        assert isinstance(results, list)
        assert results[:3] == inside
        assert results[3][0] in ("error", "killed", "timeout")
        assert results[4:6] == [["error", ""], ["ok", ""]]
        assert results[6][1] == "-1"
        # Without a process namespace kill(-1) would reach the user's whole session.
        assert results[7][0] == "error"
    assert psutil_of_user(ORDINARY_UID) == []


def psutil_of_user(uid: int) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["uids"]) if (p.info["uids"] or (0,))[0] == uid]


@needs_system_python
def test_host_that_refuses_namespaces_is_named(open_copy: Path) -> None:
    no_caps = "setpriv --ambient-caps=-all --inh-caps=-all"
    refuse = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {no_caps} "$@"'
    user = as_user(41_235)
    inner = ("unshare", "-U", "--map-current-user", "--keep-caps", "sh", "-c", refuse, "sh")
    found = probe(open_copy, *user, *inner, kinds=("bubblewrap",))
    message = found["bubblewrap"]
    assert isinstance(message, str)
    assert "refused namespaces" in message
    assert "sysctl -w user.max_user_namespaces=15000" in message
    assert "\n" not in message


@needs_system_python
def test_root_of_a_container_that_maps_only_itself(open_copy: Path) -> None:
    found = probe(open_copy, "unshare", "-U", "-r")
    for kind in KINDS:
        assert found[kind][:2] == [["ok", ""], ["timeout", ""]]  # type: ignore[index]


def test_missing_bubblewrap_names_the_package(
    monkeypatch: pytest.MonkeyPatch, plain_python: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(InfraError, match="apt-get install bubblewrap"):
        make_pool("bubblewrap", 1, python=plain_python)


@pytest.mark.parametrize("kind", KINDS)
def test_python_that_does_not_run_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=r"script Python .*gone.* run `make setup`"):
        make_pool(kind, 1, python=tmp_path / "gone")  # type: ignore[arg-type]
