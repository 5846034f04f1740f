"""The filter, interpreted here for both processors, and control groups of both versions."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
import tarfile
from pathlib import Path

import pytest

from agent_tools.sandbox import seccomp
from agent_tools.sandbox.cgroups import (
    Cgroup,
    Hierarchy,
    find_hierarchies,
    make_cgroup,
    missing_limits,
)
from agent_tools.sandbox.docker_image import image_key, write_image
from agent_tools.sandbox.interpreter import Interpreter

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decide(program: bytes, number: int, arch: int, *arguments: int) -> int:
    """A classic BPF machine, as far as seccomp filters use it."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number, arch, 0, *(a & (2**64 - 1) for a in padded))
    steps = list(struct.iter_unpack("=HBBI", program))
    at, register = 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        if code == 0x20:
            (register,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return value
        else:
            holds = {
                0x15: register == value,
                0x35: register >= value,
                0x45: bool(register & value),
            }[code]
            at += if_true if holds else if_false


# Numbers from the kernel's tables, written down apart from the module's.
CASES = {
    "x86_64": {
        EPERM: {"mount": 165, "unshare": 272, "setns": 308, "bpf": 321, "ptrace": 101,
                "socket": 41, "keyctl": 250, "io_uring_setup": 425, "userfaultfd": 323,
                "process_vm_readv": 310, "perf_event_open": 298, "kexec_load": 246,
                "finit_module": 313, "umount2": 166, "shmget": 29},
        ALLOW: {"read": 0, "mmap": 9, "socketpair": 53, "fork": 57, "execve": 59, "wait4": 61,
                "futex": 202, "pidfd_open": 434, "openat": 257},
    },
    "aarch64": {
        EPERM: {"mount": 40, "unshare": 97, "setns": 268, "bpf": 280, "ptrace": 117,
                "socket": 198, "keyctl": 219, "io_uring_setup": 425, "userfaultfd": 282,
                "process_vm_readv": 270, "perf_event_open": 241, "kexec_load": 104,
                "finit_module": 273, "umount2": 39, "shmget": 194},
        ALLOW: {"read": 63, "mmap": 222, "socketpair": 199, "execve": 221, "wait4": 260,
                "futex": 98, "pidfd_open": 434, "openat": 56},
    },
}  # fmt: skip
CLONE = {"x86_64": 56, "aarch64": 220}
PRLIMIT = {"x86_64": 302, "aarch64": 261}
KILL_CALL = {"x86_64": 62, "aarch64": 129}


@pytest.mark.parametrize("machine", ARCH)
def test_filter_decides_by_number_and_argument(machine: str) -> None:
    program, arch = seccomp.build_filter(machine), ARCH[machine]
    for verdict, calls in CASES[machine].items():
        for name, number in calls.items():
            assert decide(program, number, arch) == verdict, name
    assert decide(program, 435, arch) == ENOSYS
    assert decide(program, CLONE[machine], arch, 17) == ALLOW
    assert decide(program, CLONE[machine], arch, 0x3D0F00) == ALLOW  # a thread
    for flag in (0x20000, *(0x2000000 << n for n in range(6))):
        assert decide(program, CLONE[machine], arch, flag | 17) == EPERM
    assert decide(program, PRLIMIT[machine], arch, 0, 7) == ALLOW
    assert decide(program, PRLIMIT[machine], arch, 1, 7) == EPERM
    assert decide(program, KILL_CALL[machine], arch, -1, 9) == ALLOW
    other = seccomp.build_filter(machine, deny_kill_all=True)
    assert decide(other, KILL_CALL[machine], arch, -1, 9) == EPERM
    assert decide(other, KILL_CALL[machine], arch, 2**32 - 1, 9) == EPERM
    assert decide(other, KILL_CALL[machine], arch, 77, 9) == ALLOW


def test_foreign_call_conventions_end_the_process() -> None:
    program = seccomp.build_filter("x86_64")
    assert decide(program, 1, 0x40000003) == KILL  # 32-bit x86
    assert decide(program, 0x40000000 | 41, ARCH["x86_64"]) == KILL  # x32
    assert not seccomp.supported("riscv64")


V1_MOUNTS = """\
tmpfs {0} tmpfs rw 0 0
cgroup {0}/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup {0}/memory cgroup rw,relatime,memory 0 0
cgroup {0}/pids cgroup rw,relatime,pids 0 0
cgroup2 {0}/unified cgroup2 rw,relatime 0 0
"""


def test_version_1_trees_are_found(tmp_path: Path) -> None:
    for name in ("cpu,cpuacct", "memory/own", "pids", "unified"):
        (tmp_path / name).mkdir(parents=True)
    membership = "3:memory:/own\n2:pids:/elsewhere\n1:cpu,cpuacct:/\n0::/\n"
    first, second = find_hierarchies(V1_MOUNTS.format(tmp_path), membership)
    assert first.version == 1
    assert first.folders["memory"] == tmp_path / "memory" / "own"
    assert first.folders["pids"] == tmp_path / "pids"
    assert first.folders["cpuacct"] == first.folders["cpu"] == tmp_path / "cpu,cpuacct"
    assert second.version == 2


def test_version_2_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's files are played by a folder: no version 2 tree with controllers is here."""
    home = tmp_path / "user.slice"
    home.mkdir()
    for folder in (home, tmp_path):
        (folder / "cgroup.controllers").write_text("cpu memory pids\n")
        (folder / "cgroup.subtree_control").write_text("cpu\n")
    (home / "cgroup.subtree_control").chmod(0o400)
    hierarchies = find_hierarchies(f"cgroup2 {tmp_path} cgroup2 rw 0 0\n", "0::/user.slice\n")
    assert [h.folders["memory"] for h in hierarchies] == [home, tmp_path]
    real_mkdir = Path.mkdir

    def mkdir(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if self.parent == home:
            raise OSError(errno.EBUSY, "a group with processes")
        real_mkdir(self, mode, parents, exist_ok)
        for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.procs"):
            (self / name).write_text("max")
        (self / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
        (self / "memory.current").write_text("4096\n")
        (self / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    group = make_cgroup(0, hierarchies)
    assert group is not None
    group.set_limits(memory_bytes=1 << 20, tasks=9)
    folder = Path(group.procs_files[0]).parent
    assert folder.parent == tmp_path
    assert (folder / "memory.max").read_text() == str(1 << 20)
    assert (folder / "memory.swap.max").read_text() == "0"
    assert (folder / "pids.max").read_text() == "9"
    assert (folder / "cpu.max").read_text() == "125000 100000"
    assert "pids" in (tmp_path / "cgroup.subtree_control").read_text()
    assert (group.oom_kills(), group.memory_bytes(), group.cpu_s()) == (2, 4096, 1.5)


def test_version_1_limits_rise_and_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel keeps memory at or below memory with swap; both orders of writing must work."""
    written: list[str] = []
    real_write = Path.write_text

    def write(self: Path, text: str, *arguments: str | None) -> int:
        if self.name == "memory.limit_in_bytes" and int(text) > int(
            (self.parent / "memory.memsw.limit_in_bytes").read_text()
        ):
            raise OSError(errno.EINVAL, "memory would pass memory with swap")
        written.append(self.name)
        return real_write(self, text, *arguments)

    def mkdir(self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        os.makedirs(self, mode)  # noqa: PTH103 - the real one is replaced
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "pids.max"):
            real_write(self / name, str(1 << 40))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    folders = dict.fromkeys(("memory", "pids", "cpu", "cpuacct"), tmp_path)
    group = make_cgroup(0, (Hierarchy(1, folders),))
    assert group is not None
    monkeypatch.setattr(Path, "write_text", write)
    for size in (1 << 20, 4 << 20, 2 << 20):
        group.set_limits(memory_bytes=size, tasks=4)
        folder = Path(group.procs_files[0]).parent
        limits = [(folder / f"memory.{kind}limit_in_bytes").read_text() for kind in ("", "memsw.")]
        assert limits == [str(size)] * 2
    assert "pids.max" in written


def test_no_group_where_none_can_be_made(tmp_path: Path) -> None:
    assert (
        make_cgroup(0, (Hierarchy(2, dict.fromkeys(("memory", "pids", "cpu"), tmp_path)),)) is None
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_limits_name_the_repair_for_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user, repair in ((1000, "systemd-run --user --scope"), (0, "mount /sys/fs/cgroup")):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        (told,) = missing_limits(None)
        assert told.startswith("no control group") and repair in told
    monkeypatch.setattr(Cgroup, "limits_swap", property(lambda _: False))
    monkeypatch.setattr(Path, "read_text", lambda _: "Filename Type\n/swapfile file\n")
    assert "swapoff" in missing_limits(object.__new__(Cgroup))[0]
    monkeypatch.setattr(Path, "read_text", lambda _: "Filename Type\n")
    assert missing_limits(object.__new__(Cgroup)) == ()


def test_real_group_is_made_and_removed() -> None:
    group = make_cgroup(98)
    if group is None:
        pytest.skip("cgroup: this host lets us make no control group")
    group.set_limits(memory_bytes=64 << 20, tasks=5)
    paths = [Path(name).parent for name in group.procs_files]
    assert all(path.is_dir() and f"-{os.getpid()}-98-" in path.name for path in paths)
    group.remove()
    assert not any(path.exists() for path in paths)


def test_descriptor_lets_another_user_join() -> None:
    """A room's processes join by descriptors that the owner opened, not by the files' names."""
    group = make_cgroup(97)
    if group is None or os.geteuid() != 0:
        pytest.skip("cgroup: needs root and control groups")
    fds = group.open_procs()
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            for fd in fds:
                os.write(fd, b"0")
            os.write(theirs, Path("/proc/self/cgroup").read_bytes())
        finally:
            os._exit(0)
    os.close(theirs)
    text = os.read(ours, 4096).decode()
    os.waitpid(pid, 0)
    for fd in (*fds, ours):
        os.close(fd)
    group.remove()
    assert f"selfevo-{os.getpid()}-97-" in text


def test_real_version_2_tree() -> None:
    """Where the host mounts one: a group in it limits and kills, or is refused without a trace."""
    trees = [h for h in find_hierarchies() if h.version == 2]
    if not trees or os.geteuid() != 0:
        pytest.skip("cgroup: this host mounts no version 2 tree, or we are not root")
    folders = {folder for tree in trees for folder in tree.folders.values()}
    before = {folder: {path.name for path in folder.iterdir()} for folder in folders}
    group = make_cgroup(96, tuple(trees))
    if group is None:  # a hybrid host: memory and pids are in version 1
        assert not any(
            {"memory", "pids"} <= set((folder / "cgroup.controllers").read_text().split())
            for folder in folders
        )
    else:
        group.set_limits(memory_bytes=64 << 20, tasks=5)
        pid = os.fork()
        if pid == 0:
            Path(group.procs_files[0]).write_text("0")
            os.execvp("sleep", ["sleep", "60"])
        group.remove()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert {folder: {path.name for path in folder.iterdir()} for folder in folders} == before


def test_engine_profile_refuses_what_the_filter_refuses() -> None:
    for machine in ARCH:
        profile = json.loads(seccomp.engine_profile(machine))
        assert profile["architectures"] == [f"SCMP_ARCH_{machine.upper()}"]
        always = [rule for rule in profile["syscalls"] if "args" not in rule]
        names = {name for rule in always for name in rule["names"]}
        assert names == {*seccomp.denied_calls(machine), "clone3"}
        assert {"io_uring_setup", "mount", "bpf", "keyctl", "socket", "ptrace"} <= names
        assert {rule["action"] for rule in profile["syscalls"]} == {"SCMP_ACT_ERRNO"}
        flags = [r["args"][0]["value"] for r in profile["syscalls"] if r["names"] == ["clone"]]
        assert sorted(flags) == [0x20000, *(0x2000000 << n for n in range(6))]


def test_template_filter_leaves_out_three_calls() -> None:
    strict = seccomp.build_filter("x86_64")
    loose = seccomp.build_filter("x86_64", allow=seccomp.TEMPLATE_CALLS)
    for name, number in seccomp.denied_calls("x86_64").items():
        expected = ALLOW if name in ("mount", "unshare", "setns") else EPERM
        assert decide(loose, number, ARCH["x86_64"]) == expected, name
        assert decide(strict, number, ARCH["x86_64"]) == EPERM, name


def test_image_holds_files_links_and_every_parent(tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    kept = ("bin/tool", "lib/python3/os.py", "lib/python3/site-packages/p/test/data.csv")
    left_out = ("lib/python3/test/a.py", "lib/python3/idlelib/b.py", "hidden/secret.py")
    for name in (*kept, *left_out):
        (prefix / name).parent.mkdir(parents=True, exist_ok=True)
        (prefix / name).write_text(name)
    (prefix / "bin" / "tool").chmod(0o4700)
    (prefix / "lib64").symlink_to("lib")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "json.py").write_text("the system's")
    python = Interpreter(
        Path(sys.executable),
        (prefix,),
        (prefix / "hidden",),
        (("x", "/opt/y"),),
        stdlib=tmp_path / "elsewhere",
    )
    write_image(python, tmp_path / "image.tar")
    with tarfile.open(tmp_path / "image.tar") as archive:
        entries = {entry.name: entry for entry in archive}
        assert len(entries) == len(archive.getnames())
    inside = str(prefix).lstrip("/")
    assert all(f"{inside}/{name}" in entries for name in kept)
    assert not any(f"{inside}/{name}" in entries for name in left_out)
    assert entries[f"{inside}/bin/tool"].mode == 0o755
    assert entries[f"{inside}/lib64"].linkname == "lib"
    assert entries["opt/y"].linkname == "x"
    for name, entry in entries.items():
        parents = [str(path) for path in Path(name).parents if str(path) != "."]
        assert all(entries[parent].isdir() for parent in parents), name
        assert name == "sandbox/work" or not entry.isdir() or entry.mode & 0o111 == 0o111
    assert f"{tmp_path}/elsewhere/json.py".lstrip("/") in entries
    assert str(Path(sys.executable).resolve()).lstrip("/") in entries
    work = entries["sandbox/work"]
    assert (work.uid, work.mode) == (65534, 0o700)
    assert any(name.endswith("/bash") for name in entries)
    assert any("libc.so" in name for name in entries)
    key = image_key(python)
    (prefix / "lib" / "python3" / "site-packages" / "new.dist-info").mkdir()
    assert len(key) == 16
    assert image_key(python) != key
