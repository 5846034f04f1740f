"""Hostile scripts on a real bubblewrap worker: each is contained, and the worker goes on.

The same worker (one process, never replaced unless a test says so) serves all of them, so a
leak of one script into the next shows.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_tools.errors import UserError
from agent_tools.paths import script_python
from agent_tools.sandbox import Limits, ScriptJob, ScriptResult, WarmPool, make_pool

Run = Callable[..., ScriptResult]
SHORT = Limits(cpu_seconds=0.4, wall_seconds=2.0, memory_mb=256, file_mb=8, processes=16)


def python_for_tests() -> Path:
    try:
        return script_python()
    except UserError:
        return Path(sys.executable)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "train.csv").write_text("id,a,target\n1,2.5,0\n2,3.5,1\n")
    return folder


@pytest.fixture(scope="module")
def pool() -> Iterator[WarmPool]:
    with make_pool("bubblewrap", 1, python=python_for_tests()) as made:
        yield made


@pytest.fixture
def run(pool: WarmPool, inputs: Path) -> Iterator[Run]:
    """Run a script; afterwards the pool must serve an honest one from a clean folder."""

    def go(code: str, *, outputs: tuple[str, ...] = (), limits: Limits = SHORT) -> ScriptResult:
        return pool.run([ScriptJob(textwrap.dedent(code), inputs, outputs, limits)])[0]

    yield go
    honest = pool.run([ScriptJob(HONEST, inputs, limits=Limits(wall_seconds=30))])[0]
    assert honest.status == "ok", honest
    assert honest.files["submission.csv"] == b"id,a,target\n1,2.5,0\n2,3.5,1\n"
    assert honest.stdout.split() == ["script.py,train.csv", "none", "none", "1"], honest.stdout


# What an honest script sees: its own files, empty temporary folders, two processes.
HONEST = """
import os, shutil
print(",".join(sorted(os.listdir("."))))
for place in (os.environ["TMPDIR"], "/dev/shm"):
    print(",".join(os.listdir(place)) or "none")
print(len([p for p in os.listdir("/proc") if p.isdigit() and p != str(os.getpid())]))
shutil.copy("train.csv", "submission.csv")
"""


def test_endless_loop_ends_at_its_cpu_limit(run: Run) -> None:
    result = run("while True: pass")
    assert result.status == "timeout"
    assert 0.3 < result.cpu_s < 0.6


def test_fraction_of_a_second_is_a_limit_too(run: Run) -> None:
    limits = Limits(cpu_seconds=0.1, wall_seconds=5)
    result = run("while True: pass", limits=limits)
    assert result.status == "timeout"
    assert 0.05 < result.cpu_s < 0.25


def test_loop_that_blocks_the_profiling_signal_ends(run: Run) -> None:
    result = run("""
        import signal
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_PROF, 0)
        while True: pass
    """)
    assert result.status == "timeout"
    assert result.cpu_s < 0.7


def test_children_count_towards_the_cpu_limit(run: Run) -> None:
    result = run("""
        import os, time
        for _ in range(3):
            if os.fork() == 0:
                while True: pass
        time.sleep(60)
    """)
    assert result.status == "timeout"
    assert result.cpu_s < 1.2


def test_sleep_ends_at_the_wall_limit(run: Run) -> None:
    result = run("import time; time.sleep(60)", limits=Limits(cpu_seconds=1, wall_seconds=0.3))
    assert result.status == "timeout"
    assert 0.3 <= result.wall_s < 30


def test_fork_bomb_is_contained(run: Run) -> None:
    result = run("""
        import os
        while True:
            try: os.fork()
            except OSError: pass
    """)
    assert result.status in ("timeout", "killed")


def test_eight_gigabytes_are_refused(run: Run) -> None:
    result = run("import numpy; numpy.ones(10**9)")
    assert (result.status, result.exit_code) == ("memory", 1)
    assert "MemoryError" in result.last_line


def test_memory_of_all_processes_is_limited(run: Run) -> None:
    result = run("""
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                block = b"x" * (100 << 20)
                time.sleep(60)
        time.sleep(60)
    """)
    assert result.status in ("memory", "timeout")
    assert result.files == {}


def test_printing_100_megabytes_is_cut(run: Run) -> None:
    result = run(
        """
        import sys
        for _ in range(100): sys.stdout.write("x" * (1 << 20))
        print("the end")
        """,
        limits=Limits(cpu_seconds=3, output_bytes=1000),
    )
    assert result.status == "ok"
    assert len(result.stdout) < 1100
    assert result.stdout.endswith("the end\n")
    assert "bytes cut" in result.stdout


@pytest.mark.parametrize(
    "path", ["/etc/x", "/usr/x", "/x", "/dev/x", "/proc/x", "/sandbox/x", "/root/x", "/usr/local/x"]
)
def test_nothing_outside_can_be_written(run: Run, path: str) -> None:
    result = run(f"open({path!r}, 'w').write('x')")
    assert result.status == "error"
    assert result.last_line.startswith(("PermissionError", "OSError", "FileNotFoundError"))


def test_interpreter_and_packages_cannot_be_written(run: Run) -> None:
    result = run("""
        import os, numpy, sys
        for path in (numpy.__file__, os.__file__, os.path.realpath(sys.executable)):
            try: open(path, "a")
            except OSError: print("refused")
    """)
    assert result.stdout == "refused\n" * 3


def test_repository_home_and_data_are_not_there(run: Run) -> None:
    repository = Path(__file__).resolve().parents[2]
    hidden = [str(repository / "agent_tools"), str(repository / ".data"), "/etc/shadow"]
    hidden += ["/etc/passwd", str(Path.home() / ".ssh"), str(repository / "pyproject.toml")]
    result = run(f"import os; print([p for p in {hidden} if os.path.exists(p)])")
    assert result.stdout == "[]\n"


def test_environment_has_nothing_of_ours(run: Run) -> None:
    result = run("import os; print(sorted(os.environ))")
    ours = {"PATH", "LANG", "HOME", "TMPDIR", "PWD", "LC_CTYPE", "LOKY_MAX_CPU_COUNT"}
    seen = set(eval(result.stdout))
    assert {
        n for n in seen - ours if not n.startswith(("PYTHON", "KMP_")) and "THREADS" not in n
    } == set()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET"])
def test_no_socket_opens(run: Run, family: str) -> None:
    result = run(f"import socket; socket.socket(socket.{family}, socket.SOCK_RAW)")
    assert result.status == "error"
    assert result.last_line.startswith("PermissionError")


def test_daemon_left_behind_is_killed(run: Run) -> None:
    result = run("""
        import os, signal, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in range(1, 32):
                    try: signal.signal(number, signal.SIG_IGN)
                    except OSError: pass
                while True:
                    open(os.environ["TMPDIR"] + "/alive", "a").write("x")
                    time.sleep(0.01)
            os._exit(0)
        time.sleep(0.05)
    """)
    assert result.status == "ok"


def test_worker_cannot_be_read(run: Run) -> None:
    result = run("""
        import os
        assert os.getppid() == 1
        for name in ("mem", "environ", "fd/3", "maps", "root", "cwd", "exe"):
            try: os.open(f"/proc/1/{name}", os.O_RDONLY); print("open", name)
            except OSError: pass
        try: print(os.listdir("/proc/1/fd"))
        except OSError: pass
        print("others", [p for p in os.listdir("/proc") if p.isdigit() and int(p) > 1
                         and int(p) != os.getpid()])
    """)
    assert result.stdout == "others []\n"


def test_worker_cannot_be_signalled_or_limited(run: Run) -> None:
    result = run("""
        import os, signal, resource
        for number in (*range(1, 32), *range(34, 65)):
            os.kill(1, number)
        for call in (lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)),
                     lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
                     lambda: os.sched_setaffinity(1, [0])):
            try: call(); print("allowed")
            except PermissionError: pass
        if os.fork() == 0: signal.pause()
        os.kill(-1, signal.SIGKILL)
        print("still here")
    """)
    assert (result.status, result.stdout) == ("ok", "still here\n")


def test_disk_cannot_be_filled(run: Run) -> None:
    result = run(
        """
        import errno, os
        for place in (".", os.environ["TMPDIR"], "/dev/shm"):
            try:
                for i in range(1000):
                    with open(f"{place}/big{i}", "wb") as f:
                        for _ in range(7): f.write(bytes(1 << 20))
            except OSError as e: print(errno.errorcode[e.errno])
        """,
        limits=Limits(cpu_seconds=6, file_mb=8),
    )
    assert result.stdout == "ENOSPC\n" * 3


def test_one_file_cannot_pass_its_limit(run: Run) -> None:
    result = run("""
        import os, errno
        with open("big", "wb") as f:
            for size in (1 << 40, 9 << 20):
                try: os.truncate("big", size)
                except OSError as e: print(errno.errorcode[e.errno])
    """)
    assert result.status == "killed" or result.stdout == "EFBIG\nEFBIG\n"


def test_inputs_can_be_deleted_only_for_oneself(run: Run, inputs: Path) -> None:
    result = run("""
        import os
        os.chmod("train.csv", 0o600)
        open("train.csv", "w").write("spoilt")
        os.unlink("train.csv")
    """)
    assert result.status == "ok"
    assert (inputs / "train.csv").read_text().startswith("id,")


def test_inputs_are_read_only_by_default(run: Run) -> None:
    result = run("open('train.csv', 'a')")
    assert result.last_line.startswith("PermissionError")


def test_only_the_own_inputs_are_there(run: Run, pool: WarmPool, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("answer-of-another-competition")
    other = ScriptJob("print(open('secret.csv').read())", tmp_path, (), SHORT)
    assert pool.run([other])[0].stdout == "answer-of-another-competition\n"
    result = run("""
        import os
        found = []
        for fd in range(3, 1024):
            try: os.fstat(fd); found.append(fd)
            except OSError: pass
        print(found, [n for n in os.listdir("/sandbox/work")], os.path.exists("secret.csv"))
    """)
    assert result.stdout.startswith("[] [")
    assert result.stdout.count("'") == 2
    assert result.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        ("os.symlink('/usr/bin/env', 'submission.csv')", "link"),
        ("os.symlink('train.csv', 'submission.csv')", "link"),
        ("os.symlink('/proc/self/mem', 'submission.csv')", "link"),
        ("os.mkdir('submission.csv')", "not an ordinary file"),
        ("os.mkfifo('submission.csv')", "not an ordinary file"),
        ("open('submission.csv', 'w').close(); os.chmod('submission.csv', 0)", "cannot be read"),
        ("pass", "no submission.csv written"),
    ],
)
def test_output_must_be_an_ordinary_file(run: Run, make: str, reason: str) -> None:
    result = run(f"import os; {make}", outputs=("submission.csv",))
    assert result.status == "error"
    assert reason in result.last_line
    assert result.files == {}


def test_shell_runs_but_stays_inside(run: Run) -> None:
    result = run("""
        import os
        os.execv("/bin/sh", ["sh", "-c", "echo shell; echo x > /etc/y; cat /etc/passwd; id -u"])
    """)
    assert result.stdout.startswith("shell\n")
    assert "root:" not in result.stdout
    assert not Path("/etc/y").exists()


CALLS = {
    "unshare user": "libc.unshare(0x10000000)",
    "unshare network": "libc.unshare(0x40000000)",
    "setns": "libc.setns(0, 0)",
    "clone with a namespace": "libc.syscall(56, 0x10000011, 0, 0, 0, 0)",
    "mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "umount": "libc.umount2(b'/tmp', 2)",
    "chroot": "libc.chroot(b'/tmp')",
    "pivot_root": "libc.syscall(155, b'/tmp', b'/tmp')",
    "ptrace the worker": "libc.ptrace(16, 1, 0, 0)",
    "process_vm_readv": "libc.syscall(310, 1, 0, 0, 0, 0, 0)",
    "bpf": "libc.syscall(321, 0, 0, 0)",
    "perf_event_open": "libc.syscall(298, 0, 0, -1, -1, 0)",
    "keyctl": "libc.syscall(250, 0, -3, 0)",
    "add_key": "libc.syscall(248, b'user', b'a', b'b', 1, -3)",
    "io_uring_setup": "libc.syscall(425, 8, 0)",
    "userfaultfd": "libc.syscall(323, 0)",
    "kexec_load": "libc.syscall(246, 0, 0, 0, 0)",
    "init_module": "libc.syscall(175, 0, 0, b'')",
    "open_by_handle_at": "libc.syscall(304, 0, 0, 0)",
    "shmget": "libc.syscall(29, 1, 4096, 0o1600)",
    "mq_open": "libc.syscall(240, b'q', 0o102, 0o600, 0)",
    "sethostname": "libc.sethostname(b'x', 1)",
    "setxattr": "libc.setxattr(b'/tmp', b'user.a', b'b', 1, 0)",
    "fsopen": "libc.syscall(430, b'tmpfs', 0)",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
def test_privileged_calls_are_refused(run: Run) -> None:
    lines = "\n".join(f"ask({name!r}, lambda: {call})" for name, call in CALLS.items())
    result = run(f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def ask(name, call):
    ctypes.set_errno(0)
    if call() != -1 or ctypes.get_errno() != 1: print(name, ctypes.get_errno())
{lines}
print("clone3", libc.syscall(435, 0, 0), ctypes.get_errno())
""")
    assert result.stdout == "clone3 -1 38\n", result


def test_no_privileges(run: Run) -> None:
    result = run("""
        import os
        lines = dict(l.split(":\\t", 1) for l in open("/proc/self/status") if ":\\t" in l)
        print(*(lines[k].strip() for k in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs", "Seccomp")))
        try: os.setuid(0); print("root")
        except OSError: pass
        print(os.getuid() != 0, os.getgroups() in ([], [os.getgid()]))
    """)
    zero = "0" * 16
    first, second = result.stdout.splitlines()
    assert first == f"{zero} {zero} {zero} 1 2"
    assert second.startswith("True")


def test_marks_on_shared_folders_do_not_last(run: Run) -> None:
    run("""
        import os
        for place in (os.environ["TMPDIR"], "/dev/shm", "/sandbox/work"):
            os.utime(place, (1, 1)); os.chmod(place, 0o777)
        open("/sandbox/work/kept", "w").write("x")
    """)
    result = run("""
        import os
        for place in (os.environ["TMPDIR"], "/dev/shm", "/sandbox/work"):
            found = os.stat(place)
            print(oct(found.st_mode & 0o777), found.st_mtime > 10)
        print(os.path.exists("/sandbox/work/kept"))
    """)
    assert result.stdout.split() == ["0o755", "True"] * 3 + ["False"]


def test_folder_that_cannot_be_removed_costs_the_worker_not_the_next_script(run: Run) -> None:
    result = run("""
        import os
        place = os.environ["TMPDIR"] + "/a"
        os.makedirs(place + "/b"); os.chmod(place, 0)
    """)
    assert result.status == "ok"


def test_errors_and_exits(run: Run) -> None:
    assert run("def f(): return 1 / 0\nf()").last_line == "ZeroDivisionError: division by zero"
    failed = run("def f(): return 1 / 0\nf()")
    assert "worker" not in failed.stderr
    assert "return 1 / 0" in failed.stderr
    assert run("x = (").last_line.startswith("SyntaxError")
    assert run("import sys; sys.exit(3)").exit_code == 3
    assert run("import sys; sys.exit('why')").last_line == "why"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)").status == "killed"
    assert run("import ctypes; ctypes.string_at(0)").status == "killed"
    assert run("print('\x1b[31mred\\x07')").stdout == "[31mred\n"
    assert run("x = '\ud800'").status == "error"


def test_random_state_is_the_same_every_time(run: Run) -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand(), hash('text'))"
    first = run(code)
    assert first.status == "ok"
    assert run("import numpy; numpy.random.rand(5)").status == "ok"
    assert run(code).stdout == first.stdout
