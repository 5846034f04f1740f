"""Each script's own namespaces and control group; hosts where there can be none; Landlock."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sandbox_support

from agent_tools.sandbox import (
    Limits,
    SandboxError,
    ScriptJob,
    WarmPool,
    make_pool,
    missing_protections,
    require_full,
)
from agent_tools.sandbox.bubblewrap import BubblewrapSandbox
from agent_tools.sandbox.cgroups import find_hierarchies
from agent_tools.sandbox.guest import landlock

PATIENT = Limits(cpu_seconds=3, wall_seconds=60)
NAMESPACES = ("user", "pid", "mnt", "ipc", "net", "uts", "cgroup")
LOOK = """
import os, time
print(*(os.readlink(f"/proc/self/ns/{n}") for n in %r))
open("ready", "w").close()
time.sleep(%f)
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="root: needs root")


@pytest.fixture(scope="module")
def plain_python() -> Iterator[Path]:
    with sandbox_support.plain_python() as python:
        yield python


def job(code: str, inputs: Path) -> ScriptJob:
    return ScriptJob(textwrap.dedent(code), inputs, (), PATIENT)


def workers() -> list[psutil.Process]:
    """The templates: bubblewrap's watcher is their parent."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if (p.parent() or p).name() == "bwrap" != p.name()]


@as_root
def test_every_script_has_namespaces_of_its_own(plain_python: Path, tmp_path: Path) -> None:
    with make_pool("bubblewrap", 2, python=plain_python) as pool:
        look = job(LOOK % (NAMESPACES, 1.0), tmp_path)
        seen = [result.stdout.split() for result in pool.run([look] * 2)]
        templates = workers()
        assert len(templates) == 2
        for process in templates:
            folder = Path(f"/proc/{process.pid}/ns")
            seen.append([str((folder / name).readlink()) for name in NAMESPACES])
    for number, name in enumerate(NAMESPACES):
        marks = [row[number] for row in seen]
        assert len(set(marks)) == 4, f"{name}: {marks}"


def group_of(process: psutil.Process) -> str:
    """The process's memory group (version 1) or its group (version 2)."""
    lines = Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()
    named = [line for line in lines if ":memory:" in line] or lines
    return named[0].split(":", 2)[2]


@as_root
def test_every_script_has_a_control_group_of_its_own(plain_python: Path, tmp_path: Path) -> None:
    if not find_hierarchies():
        pytest.skip("cgroup: this host has no control groups")
    with make_pool("bubblewrap", 1, python=plain_python) as pool:
        if pool.missing:
            pytest.skip(f"cgroup: this host gives {pool.missing[0]}")
        (template,) = workers()
        porter = template.children()
        future = pool.submit(job("import time; time.sleep(2)", tmp_path))
        scripts: list[psutil.Process] = []
        give_up = time.monotonic() + 30
        while not scripts and time.monotonic() < give_up:
            scripts = [p for p in template.children() if p not in porter]
        time.sleep(0.3)  # it joins before it runs anything of the script
        group = group_of(scripts[0])
        assert group != group_of(template)
        assert f"selfevo-{os.getpid()}-0-" in group
        assert future.result(60).status == "ok"
    left = [f for h in find_hierarchies() for d in h.folders.values() for f in d.glob(f"*{group}")]
    assert left == []


def test_template_keeps_nothing_of_a_script(plain_python: Path, tmp_path: Path) -> None:
    """After many scripts: no process, descriptor or mount more than after the first."""
    with make_pool("bubblewrap", 1, python=plain_python) as pool:
        code = """
            import os, subprocess
            open("a", "w").write("x" * 100000)
            open("/dev/shm/b", "w").write("x" * 100000)
            if os.fork() == 0:
                os.setsid(); os.execvp("sleep", ["sleep", "60"])
        """
        pool.run([job(code, tmp_path)])
        (template,) = workers()

        def held() -> tuple[int, int, int]:
            mounts = Path(f"/proc/{template.pid}/mounts").read_text().count("\n")
            return template.num_fds(), len(template.children(recursive=True)), mounts

        before = held()
        assert {result.status for result in pool.run([job(code, tmp_path)] * 20)} == {"ok"}
        give_up = time.monotonic() + 10  # a worker answers before it has closed all
        while any(now > was for now, was in zip(held(), before, strict=True)):
            assert time.monotonic() < give_up, (held(), before)
            time.sleep(0.02)
        assert workers() == [template]  # and it was never replaced


def test_nothing_but_its_own_folders_takes_a_mark(plain_python: Path, tmp_path: Path) -> None:
    """Times and modes, which scripts of one worker could leave each other, on every mount."""
    code = """
        import os
        places = {line.split()[1] for line in open("/proc/self/mounts")}
        places |= {f"/dev/{name}" for name in os.listdir("/dev")} | {"/dev/pts/ptmx"}
        own = (os.getcwd(), os.environ["TMPDIR"], "/dev/shm")
        for place in sorted(places):
            if place in own or os.path.realpath(place).startswith("/proc"):
                continue
            for act in (os.utime, lambda p: os.utime(p, (1, 1)), lambda p: os.chmod(p, 0o700)):
                try: act(place); print("marked", place)
                except OSError: pass
        assert os.urandom(1) and open("/dev/zero", "rb").read(1) == b"\\0"
        print("done", file=open("/dev/null", "w")); print(len(places) > 20)
    """
    with make_pool("bubblewrap", 1, python=plain_python) as pool:
        result = pool.run([job(code, tmp_path)])[0]
        assert (result.status, result.stdout) == ("ok", "True\n"), result


def test_script_that_cannot_begin_is_the_sandboxs_failure(
    plain_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "data").write_bytes(bytes(3 << 20))
    small = Limits(cpu_seconds=1, wall_seconds=30, disk_mb=1)
    endless = Limits(cpu_seconds=1, wall_seconds=30, file_mb=1 << 60)
    with make_pool("bubblewrap", 1, python=plain_python) as pool:
        for inputs, limits, reason in (
            (tmp_path / "big", small, "no room for a script: "),
            (tmp_path, endless, "the sandbox cannot start a script: "),
        ):
            result = pool.run([ScriptJob("print(1)", inputs, (), limits)])[0]
            assert (result.status, result.exit_code) == ("infra", None), result
            assert result.last_line.startswith(reason)
        assert pool.run([job("print(2)", tmp_path)])[0].stdout == "2\n"


def test_missing_protections_are_told_without_a_script(
    plain_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("bubblewrap", "process"):
        with make_pool(kind, 1, python=plain_python) as pool:  # type: ignore[arg-type]
            assert missing_protections(kind, plain_python) == pool.missing  # type: ignore[arg-type]
    monkeypatch.setattr("agent_tools.sandbox.bubblewrap.make_cgroup", lambda *_: None)
    (told,) = missing_protections("bubblewrap", plain_python)
    assert told.startswith("no control group")
    with pytest.raises(SandboxError, match="missing here: no control group") as error:
        require_full((told,))
    assert error.value.exit_code == 2
    require_full(())


def test_host_that_gives_no_rooms(
    plain_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without rights over its own namespaces: scripts share them, and it says so."""
    real = BubblewrapSandbox._isolation

    def without(self: BubblewrapSandbox, rooms: bool) -> list[str]:
        flags = real(self, rooms)
        while "--cap-add" in flags:
            at = flags.index("--cap-add")
            del flags[at : at + 2]
        return flags

    monkeypatch.setattr(BubblewrapSandbox, "_isolation", without)
    with make_pool("bubblewrap", 1, python=plain_python) as pool:
        assert "scripts of one worker share its namespaces" in pool.missing[-1]
        code = """
            import os
            facts = dict(l.split(":\\t", 1) for l in open("/proc/self/status") if ":\\t" in l)
            print(int(facts["CapEff"], 16), facts["Seccomp"].strip(), sorted(os.listdir(".")))
            open("/tmp/left" if os.path.isdir("/tmp") else "left", "w").close()
        """
        expected = "0 2 ['script.py']\n"
        assert [r.stdout for r in pool.run([job(code, tmp_path)] * 2)] == [expected] * 2
        network = pool.run([job("import socket; socket.socket()", tmp_path)])[0]
        assert network.last_line.startswith("PermissionError")
    with pytest.raises(SandboxError, match=r"full isolation is required, .*share its namespaces"):
        make_pool("bubblewrap", 1, python=plain_python, require_full_isolation=True)


@as_root
def test_full_isolation_holds_as_root(plain_python: Path, tmp_path: Path) -> None:
    with make_pool("bubblewrap", 1, python=plain_python) as pool:
        missing = pool.missing
    if missing:
        pytest.skip(f"cgroup: this host gives {missing[0]}")
    with make_pool("bubblewrap", 1, python=plain_python, require_full_isolation=True) as pool:
        assert pool.run([job("print(1)", tmp_path)])[0].stdout == "1\n"


def test_process_kind_is_never_full_isolation(plain_python: Path) -> None:
    with pytest.raises(SandboxError, match=r"full isolation is required, .*no namespaces") as error:
        make_pool("process", 1, python=plain_python, require_full_isolation=True)
    assert error.value.exit_code == 2


@pytest.fixture(scope="module")
def landlocked(plain_python: Path) -> Iterator[WarmPool]:
    if landlock.version() == 0:
        pytest.skip("landlock: this kernel has no Landlock")
    with make_pool("process", 1, python=plain_python) as pool:
        yield pool


def test_landlock_keeps_a_script_without_namespaces_from_files(
    landlocked: WarmPool, tmp_path: Path
) -> None:
    (tmp_path / "beside.txt").write_text("beside")
    (tmp_path / "in").mkdir()
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o055)
    result = landlocked.run(
        [
            job(
                f"""
                import os, tempfile
                for path in ("/etc/passwd", {str(tmp_path / "beside.txt")!r}, "/etc/hostname"):
                    try: open(path).read(); print("read", path)
                    except PermissionError: print("refused")
                for path in ("/tmp/planted", "/dev/shm/planted", "/var/tmp/planted"):
                    try: open(path, "w"); print("wrote", path)
                    except PermissionError: print("refused")
                open("own", "w").write("1")
                with tempfile.TemporaryFile() as file: file.write(b"1")
                import sqlite3, xml.dom.minidom, subprocess
                print(subprocess.run(["/bin/echo", "child"], capture_output=True).stdout)
                """,
                tmp_path / "in",
            )
        ]
    )[0]
    assert result.stdout == "refused\n" * 6 + "b'child\\n'\n", result


@as_root
def test_landlock_keeps_a_script_without_namespaces_from_signals(
    landlocked: WarmPool, tmp_path: Path
) -> None:
    if landlock.version() < 6:
        pytest.skip("landlock: this kernel's Landlock knows no signals")
    code = """
        import os
        for pid in (1, os.getppid()):
            try: os.kill(pid, 0); print("reached", pid)
            except PermissionError: print("refused")
        os.kill(os.getpid(), 0)
    """
    assert landlocked.run([job(code, tmp_path)])[0].stdout == "refused\nrefused\n"
