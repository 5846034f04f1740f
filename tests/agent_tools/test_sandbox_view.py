"""What a shell shows beside its work folder: read-only folders, links, its own loopback."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
import sandbox_support

from agent_tools.sandbox import Limits, SandboxError, View, open_shell, seccomp

LIMITS = Limits(cpu_seconds=10, wall_seconds=30)


def test_folders_are_read_only_and_links_lead_to_the_work_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("seen")
    view = View(
        mounts=((tmp_path / "data", "/home/data"),), links=(("/home/out", "deep/out"),)
    )  # fmt: skip
    with open_shell("bubblewrap", limits=LIMITS, view=view) as shell:
        done = shell.run("mkdir -p deep/out && cat /home/data/a.txt && echo x > /home/out/b")
        assert (done.status, done.stdout) == ("ok", "seen")
        assert shell.run("cat deep/out/b").stdout == "x\n"
        for command in ("echo x > /home/data/a.txt", "rm /home/data/a.txt", "touch /home/new"):
            assert shell.run(command).status == "error"
        assert shell.run("python3 -c 'import socket; socket.socket()'").status == "error"
    assert (tmp_path / "data" / "a.txt").read_text() == "seen"


def test_a_python_below_the_stage_is_found_beside_a_view(tmp_path: Path) -> None:
    """Root binds what a sandbox shows on /tmp first, which hides whatever lies below it."""
    with sandbox_support.plain_python() as python:
        view = View(mounts=((tmp_path, "/home/data"),))
        with open_shell("bubblewrap", limits=LIMITS, view=view, python=python) as shell:
            assert shell.run("python3 -c 'print(1)'").stdout == "1\n"


def test_sockets_reach_the_shells_own_loopback_and_sockets_that_are_shown(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    (tmp_path / "s").chmod(0o666)
    tmp_path.chmod(0o755)
    outside = socket.create_server(("127.0.0.1", 0))
    program = f"""
import socket
socket.socket(socket.AF_UNIX).connect("/home/line/s")
server = socket.create_server(("127.0.0.1", 5000))
socket.create_connection(("127.0.0.1", 5000))
for place in (("127.0.0.1", {outside.getsockname()[1]}), ("1.1.1.1", 53)):
    try:
        socket.create_connection(place, 2)
        print("open")
    except OSError:
        print("closed")
for family in (16, 17, 29, 31, 38, 40, 44):
    try:
        socket.socket(family, socket.SOCK_DGRAM)
        print("open", family)
    except PermissionError:
        print("refused")
"""
    view = View(mounts=((tmp_path, "/home/line"),), sockets=True)
    with open_shell("bubblewrap", limits=LIMITS, view=view) as shell:
        done = shell.run(f"python3 - <<'EOF'\n{program}\nEOF")
    listener.close()
    outside.close()
    assert done.status == "ok", done.stderr
    assert done.stdout.split() == ["closed"] * 2 + ["refused"] * 7


def test_the_filter_allows_families_only_where_sockets_are_asked_for() -> None:
    plain, open_ = seccomp.build_filter(), seccomp.build_filter(allow=seccomp.SOCKET_CALLS)
    number = seccomp.denied_calls()["socket"]

    def refuses(program: bytes) -> int:
        return program.count(struct.pack("=HBBI", 0x15, 0, 1, number))

    assert (refuses(plain), refuses(open_)) == (1, 0)
    assert open_.count(struct.pack("=HBBI", 0x15, 0, 6, number)) == 1


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("/usr/x", "a"),
        ("home", "a"),
        ("/home/../etc", "a"),
        ("/home/a", "/etc"),
        ("/home/a", "../b"),
    ],
)
def test_places_that_cannot_work_are_named(place: str, target: str) -> None:
    with pytest.raises(SandboxError, match="sandbox"):
        View(links=((place, target),))


def test_a_view_needs_folders_and_bubblewrap(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="is no folder"):
        View(mounts=((tmp_path / "none", "/home/data"),))
    with pytest.raises(SandboxError, match="use 'bubblewrap'"):
        open_shell("docker", view=View())
