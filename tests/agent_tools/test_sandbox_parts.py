"""The filter, interpreted here for both processors, and control groups of both versions."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from agent_tools.sandbox import seccomp
from agent_tools.sandbox.cgroups import Hierarchy, find_hierarchies, make_cgroup

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
        for name in ("memory.max", "pids.max", "cpu.max", "cgroup.procs"):
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
    assert (folder / "pids.max").read_text() == "9"
    assert (folder / "cpu.max").read_text() == "125000 100000"
    assert "pids" in (tmp_path / "cgroup.subtree_control").read_text()
    assert (group.oom_kills(), group.memory_bytes(), group.cpu_s()) == (2, 4096, 1.5)


def test_no_group_where_none_can_be_made(tmp_path: Path) -> None:
    assert (
        make_cgroup(0, (Hierarchy(2, dict.fromkeys(("memory", "pids", "cpu"), tmp_path)),)) is None
    )
    assert list(tmp_path.iterdir()) == []


def test_real_group_is_made_and_removed() -> None:
    group = make_cgroup(98)
    if group is None:
        pytest.skip("this host lets us make no control group")
    group.set_limits(memory_bytes=64 << 20, tasks=5)
    paths = [Path(name).parent for name in group.procs_files]
    assert all(path.is_dir() and f"-{os.getpid()}-98-" in path.name for path in paths)
    group.remove()
    assert not any(path.exists() for path in paths)
