"""The shell that stays, and snapshots of its work folder: bubblewrap here, Docker in test-real."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import sandbox_support

from agent_tools.errors import InfraError
from agent_tools.sandbox import Limits, SandboxError, Shell, check_snapshot, open_shell

LIMITS = Limits(
    cpu_seconds=3, wall_seconds=60, memory_mb=256, file_mb=8, processes=16, open_files=64,
    disk_mb=32,
)  # fmt: skip
Open = Callable[..., Shell]


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    with sandbox_support.plain_python() as made:
        yield made


@pytest.fixture(params=["bubblewrap", pytest.param("docker", marks=pytest.mark.real)])
def opened(request: pytest.FixtureRequest, python: Path) -> Iterator[Open]:
    """Opens shells of one engine and closes them."""
    made: list[Shell] = []
    if request.param == "docker":
        request.getfixturevalue("engine")

    def go(inputs: Path | None = None, limits: Limits = LIMITS) -> Shell:
        made.append(open_shell(request.param, inputs=inputs, limits=limits, python=python))
        return made[-1]

    yield go
    for shell in made:
        shell.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with sandbox_support.docker_host() as host:
        yield host


def inputs(folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "data" / "train.csv").write_text("id\n1\n")
    (folder / "task.md").write_text("solve")
    return folder


def test_state_lasts_from_command_to_command(opened: Open, tmp_path: Path) -> None:
    shell = opened(inputs(tmp_path))
    assert shell.run("cat task.md data/train.csv").stdout == "solveid\n1\n"
    first = shell.run("x=5; export Y=6; mkdir -p a; cd a; f() { echo $x $Y; }; (exit 7)")
    assert (first.status, first.exit_code, first.state_kept) == ("error", 7, True)
    second = shell.run("f; basename $PWD; python3 -c 'import os; print(os.environ[\"Y\"])'; f >&2")
    assert (second.status, second.stdout, second.stderr) == ("ok", "5 6\na\n6\n", "5 6\n")
    assert shell.run("sleep 60 & echo started").stdout == "started\n"
    assert shell.run("jobs -r | wc -l").stdout.strip() == "1"
    assert shell.run("cat").stdout == ""  # its input is empty, not the next command
    assert shell.run("if then").status == "error"
    assert shell.run("f").stdout == "5 6\n"


def test_shell_that_leaves_is_replaced_in_the_same_folder(opened: Open) -> None:
    shell = opened()
    left = shell.run("echo kept > file; x=1; exit 3")
    assert (left.status, left.exit_code, left.state_kept) == ("error", 3, False)
    after = shell.run("echo [$x]; cat file")
    assert (after.stdout, after.state_kept) == ("[]\nkept\n", True)


def test_each_command_has_its_limits(opened: Open) -> None:
    shell = opened()
    shell.run("x=1")
    late = shell.run("sleep 60", wall_seconds=0.5)
    assert (late.status, late.exit_code) == ("timeout", None)
    assert shell.run("echo $x").stdout == "1\n"  # the shell came back
    endless = shell.run("while :; do :; done", cpu_seconds=0.3)
    assert (endless.status, endless.state_kept) == ("timeout", False)
    assert endless.cpu_s > 0.2
    child = "python3 -c 'while True: pass' & wait"
    assert shell.run(child, cpu_seconds=0.3).status == "timeout"
    printed = shell.run("head -c 30000000 /dev/zero | tr '\\0' x; echo; echo the end")
    assert printed.status == "ok"
    assert len(printed.stdout) < 20_200
    assert printed.stdout.endswith("the end\n")
    short = shell.run("echo x; echo y >&2; head -c 500 /dev/zero | tr '\\0' x", output_bytes=100)
    assert (len(short.stdout) < 150, short.stderr) == (True, "y\n")
    assert "MemoryError" in shell.run("python3 -c 'bytearray(10**9)'").stderr
    hog = "python3 -c 'import time; b = bytearray(10**8); time.sleep(9)' &"
    assert shell.run(f"{hog} {hog} {hog} wait").status in ("memory", "killed")
    many = shell.run("for i in $(seq 40); do sleep 9 & done; wait", wall_seconds=3)
    assert many.status in ("killed", "timeout", "error")
    assert shell.run("head -c 9000000 /dev/zero > big").status == "error"
    assert shell.run("rm -f big; echo $((1 + 1))").stdout == "2\n"


def test_fork_bomb_ends_with_the_shell(opened: Open) -> None:
    shell = opened(limits=Limits(cpu_seconds=1, wall_seconds=4, memory_mb=256, processes=16))
    bomb = shell.run("f() { f | f & }; f; wait; sleep 1")
    assert bomb.status in ("timeout", "killed", "error", "ok")
    for _ in range(3):
        after = shell.run("echo alive")
        if after.status == "ok" and after.stdout == "alive\n" and not after.stderr:
            break
        shell.run("exit")
    assert after.stdout == "alive\n"


def test_commands_stay_inside(opened: Open) -> None:
    shell = opened()
    # no socket, no privilege, nothing outside, and the worker that feeds the shell is out of reach
    assert shell.run("echo x > /etc/planted").status == "error"
    assert shell.run("cat /etc/shadow || ls /root/.ssh || cat /proc/1/environ").stdout == ""
    assert shell.run("exec 5<>/dev/tcp/127.0.0.1/80").status == "error"
    assert shell.run("kill -9 1; kill -STOP 1; unshare -r true || echo no").stdout == "no\n"
    facts = shell.run("grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status").stdout.split()
    assert facts[1::2] == ["0" * 16, "1", "2"]
    assert shell.run("ls /proc/self/fd | wc -l").stdout.strip() in ("4", "5")
    assert not Path("/etc/planted").exists()
    shell.run("for fd in $(seq 3 20); do echo nonsense >&$fd; done 2>/dev/null")
    for _ in range(3):  # what it wrote may be read late, and then costs it a command or two
        last = shell.run("echo alive")
        assert last.status in ("ok", "error")
    assert last.stdout == "alive\n"


def test_snapshot_and_restore(opened: Open) -> None:
    shell = opened()
    shell.run("""
        mkdir -p d/e; printf '\\0\\1' > d/e/bytes; echo run > tool; chmod 755 tool; ln -s d/e link
        ln -s /etc/passwd out; ln -s ../../.. up; mkfifo pipe; echo x > locked; chmod 0 locked
    """)
    saved = shell.snapshot()
    assert check_snapshot(saved) == ("d", "link", "tool", "d/e", "d/e/bytes")
    shell.run("x=1; sleep 100 & rm -rf d tool; chmod 700 locked; mkdir -m 0 shut; echo > new")
    shell.restore(saved)
    after = shell.run("echo [$x]; find . | sort; stat -c %a tool; od -An -tx1 link/bytes; jobs -r")
    found = "[]\n.\n./d\n./d/e\n./d/e/bytes\n./link\n./tool\n755\n 00 01\n"
    assert after.stdout == found, after
    with pytest.raises(SandboxError, match="too big"):
        shell.run("head -c 3000000 /dev/zero > three")
        shell.snapshot(most_bytes=2 << 20)
    shell.run("truncate -s 8000000 hole")
    with pytest.raises(SandboxError, match="too big"):
        shell.snapshot(most_bytes=6 << 20)


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in ("a",):
            made = tarfile.TarInfo(folder)
            made.type = tarfile.DIRTYPE
            archive.addfile(made)
        item = tarfile.TarInfo(name)
        item.type, item.linkname, item.size = kind, link, size
        archive.addfile(item, io.BytesIO(bytes(size)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (entry("../x"), "out of the work folder"),
        (entry("/etc/x"), "out of the work folder"),
        (entry("a/../../x"), "out of the work folder"),
        (entry("a/./x"), "out of the work folder"),
        (entry("a"), "twice"),
        (entry("b/x"), "no folder of the snapshot"),
        (entry("l", tarfile.SYMTYPE, "/etc"), "link"),
        (entry("a/l", tarfile.SYMTYPE, "../../x"), "link"),
        (entry("l", tarfile.LNKTYPE, "a"), "device, pipe or link"),
        (entry("n", tarfile.CHRTYPE), "device, pipe or link"),
        (entry("n", tarfile.FIFOTYPE), "device, pipe or link"),
        (entry("big", size=3 << 20), "more than 2 MiB"),
        (b"no archive at all" * 100, "no tar archive"),
        (entry("x", size=1 << 20)[: 1 << 19], "no tar archive"),
    ],
)
def test_archives_that_lead_out_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SandboxError, match=reason):
        check_snapshot(data, 2 << 20)


def test_refused_archive_leaves_the_folder_as_it_was(opened: Open) -> None:
    shell = opened()
    shell.run("echo 1 > file; x=1")
    with pytest.raises(SandboxError, match="out of the work folder"):
        shell.restore(entry("../x"))
    assert shell.run("cat file; echo $x").stdout == "1\n1\n"


def test_closing_leaves_no_process_and_wrong_use_is_named(python: Path) -> None:
    with open_shell("bubblewrap", python=python, limits=LIMITS) as shell:
        shell.run("sleep 100 & (setsid sleep 100 &)")
        with pytest.raises(SandboxError, match="zero byte"):
            shell.run("a\0b")
    mine = psutil.Process().children(recursive=True)
    assert [p for p in mine if "bwrap" in p.name() or "sleep" in p.name()] == []
    with pytest.raises(SandboxError, match="closed"):
        shell.run("true")
    with pytest.raises(SandboxError, match="'process' has no shell"):
        open_shell("process", python=python)


def test_sandbox_that_dies_is_said_to_be_gone(python: Path) -> None:
    with open_shell("bubblewrap", python=python, limits=LIMITS) as shell:
        for process in psutil.Process().children(recursive=True):
            if (process.parent() or process).name() == "bwrap":
                os.kill(process.pid, 9)
        with pytest.raises(InfraError, match="open a new one"):
            shell.run("true")


@pytest.mark.real
def test_snapshot_moves_between_engines(engine: str, python: Path) -> None:
    with open_shell("bubblewrap", python=python, limits=LIMITS) as first:
        first.run("mkdir d; echo moved > d/file")
        saved = first.snapshot()
    with open_shell("docker", python=python, limits=LIMITS) as second:
        second.restore(saved)
        assert second.run("cat d/file").stdout == "moved\n"
