"""A seccomp filter in classic BPF, assembled here so that no library is needed.

The filter allows by default and refuses what a script has no business with: namespaces, mounts,
tracing, kernel keys, io_uring, sockets, System V memory, other processes' limits. Refused calls
give EPERM (clone3 ENOSYS, so that libc falls back to clone, whose flags a filter can read).
Numbers: Linux `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`.
"""

from __future__ import annotations

import errno
import json
import platform
import struct
from dataclasses import dataclass

# classic BPF opcodes (linux/bpf_common.h)
_LOAD, _JEQ, _JGE, _JSET, _RET = 0x20, 0x15, 0x35, 0x45, 0x06
# seccomp return values (linux/seccomp.h)
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# offsets in struct seccomp_data: nr, arch, instruction pointer, six 64-bit arguments
_NR, _ARCH = 0, 4
_ARG0, _ARG0_HIGH = 16, 20

_X32_BIT = 0x40000000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET (linux/sched.h)
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x60000000


@dataclass(frozen=True)
class _Machine:
    audit_arch: int
    engine_arch: str
    numbers: dict[str, int]
    has_x32: bool


# Calls since Linux 5.1 have the same number everywhere.
_COMMON = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "clone3": 435,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "process_mrelease": 448,
    "set_mempolicy_home_node": 450,
    "setxattrat": 463,
    "open_tree_attr": 467,
}

_X86_64 = {
    "socket": 41, "connect": 42, "bind": 49, "listen": 50, "clone": 56, "kill": 62,
    "shmget": 29, "shmat": 30, "semget": 64, "msgget": 68, "mq_open": 240,
    "ptrace": 101, "syslog": 103, "setpriority": 141, "sched_setparam": 142,
    "sched_setscheduler": 144, "vhangup": 153, "modify_ldt": 154, "pivot_root": 155,
    "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165,
    "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
    "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "quotactl": 179, "nfsservctl": 180, "sched_setaffinity": 203, "lookup_dcookie": 212,
    "clock_settime": 227, "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251,
    "migrate_pages": 256, "unshare": 272, "move_pages": 279, "vmsplice": 278,
    "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "sched_setattr": 314,
    "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190, "kexec_file_load": 320, "bpf": 321,
    "userfaultfd": 323,
}  # fmt: skip

_AARCH64 = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7,
    "lookup_dcookie": 18, "ioprio_set": 30, "umount2": 39, "mount": 40, "pivot_root": 41,
    "nfsservctl": 42, "chroot": 51, "vhangup": 58, "quotactl": 60, "vmsplice": 75, "acct": 89,
    "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106,
    "clock_settime": 112, "syslog": 116, "ptrace": 117, "sched_setparam": 118,
    "sched_setscheduler": 119, "sched_setaffinity": 122, "kill": 129, "setpriority": 140,
    "reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "adjtimex": 171,
    "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194, "shmat": 196, "socket": 198,
    "bind": 200, "listen": 201, "connect": 203, "add_key": 217, "request_key": 218, "keyctl": 219,
    "clone": 220, "swapon": 224, "swapoff": 225, "mbind": 235, "get_mempolicy": 236,
    "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239, "perf_event_open": 241,
    "prlimit64": 261, "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265,
    "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271,
    "kcmp": 272, "finit_module": 273, "sched_setattr": 274, "bpf": 280, "userfaultfd": 282,
    "kexec_file_load": 294,
}  # fmt: skip

_MACHINES = {
    "x86_64": _Machine(0xC000003E, "SCMP_ARCH_X86_64", {**_COMMON, **_X86_64}, has_x32=True),
    "aarch64": _Machine(0xC00000B7, "SCMP_ARCH_AARCH64", {**_COMMON, **_AARCH64}, has_x32=False),
}

# What a template needs to house its scripts; the scripts themselves get the whole filter on top.
TEMPLATE_CALLS = frozenset({"unshare", "setns", "mount"})
# What a program needs to speak over the loopback of its own network namespace.
SOCKET_CALLS = frozenset({"socket", "connect", "bind", "listen"})
_OWN_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
# Read by argument, hence not simply refused.
_BY_ARGUMENT = ("clone", "clone3", "prlimit64", "kill")


def supported(machine: str | None = None) -> bool:
    """Whether a filter can be built for this kind of processor."""
    return (machine or platform.machine()) in _MACHINES


def denied_calls(machine: str | None = None) -> dict[str, int]:
    """Name and number of every call that is always refused."""
    numbers = _MACHINES[machine or platform.machine()].numbers
    return {name: number for name, number in numbers.items() if name not in _BY_ARGUMENT}


def engine_profile(machine: str | None = None) -> str:
    """The same filter as the JSON text that a container engine takes, for its own machine."""
    chosen = machine or platform.machine()
    deny = {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
    rules: list[dict[str, object]] = [
        {"names": sorted(denied_calls(chosen)), **deny},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        {"names": ["prlimit64"], "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_NE"}], **deny},
    ]
    for bit in range(32):
        if _NEW_NAMESPACES >> bit & 1:
            flag = {"index": 0, "value": 1 << bit, "valueTwo": 1 << bit, "op": "SCMP_CMP_MASKED_EQ"}
            rules.append({"names": ["clone"], "args": [flag], **deny})
    return json.dumps(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": [_MACHINES[chosen].engine_arch],
            "syscalls": rules,
        }
    )


def build_filter(
    machine: str | None = None,
    *,
    deny_kill_all: bool = False,
    allow: frozenset[str] = frozenset(),
) -> bytes:
    """The filter as an array of `struct sock_filter`, as bubblewrap's --seccomp reads it.

    `allow` names calls to leave out. deny_kill_all also refuses kill(-1), which without a process
    namespace would reach every process of the user. Raises KeyError for a machine that
    `supported` refuses.
    """
    chosen = _MACHINES[machine or platform.machine()]
    numbers = chosen.numbers
    program: list[bytes] = []

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        program.append(struct.pack("=HBBI", code, if_true, if_false, value))

    refuse = _ERRNO | errno.EPERM
    op(_LOAD, _ARCH)
    op(_JEQ, chosen.audit_arch, 1, 0)
    op(_RET, _KILL)  # 32-bit calls would have other numbers
    op(_LOAD, _NR)
    if chosen.has_x32:
        op(_JGE, _X32_BIT, 0, 1)
        op(_RET, _KILL)
    op(_JEQ, numbers["clone3"], 0, 1)
    op(_RET, _ERRNO | errno.ENOSYS)
    for name, number in denied_calls(machine).items():
        if name not in allow:
            op(_JEQ, number, 0, 1)
            op(_RET, refuse)
    if "socket" in allow:  # only families that belong to the network namespace
        op(_JEQ, numbers["socket"], 0, 6)
        op(_LOAD, _ARG0)
        for left, family in enumerate(_OWN_FAMILIES, start=1):
            op(_JEQ, family, 4 - left, 0)
        op(_RET, refuse)
        op(_LOAD, _NR)
    # clone: no new namespaces
    op(_JEQ, numbers["clone"], 0, 3)
    op(_LOAD, _ARG0)
    op(_JSET, _NEW_NAMESPACES, 0, 1)
    op(_RET, refuse)
    op(_LOAD, _NR)
    # prlimit64: only on oneself (the low word of the pid is what the kernel reads)
    op(_JEQ, numbers["prlimit64"], 0, 3)
    op(_LOAD, _ARG0)
    op(_JEQ, 0, 1, 0)
    op(_RET, refuse)
    op(_LOAD, _NR)
    if deny_kill_all:
        op(_JEQ, numbers["kill"], 0, 3)
        op(_LOAD, _ARG0)
        op(_JEQ, 0xFFFFFFFF, 0, 1)
        op(_RET, refuse)
    op(_RET, _ALLOW)
    return b"".join(program)
