"""Hostile scripts that try to get out, and with those about limits the whole list.

It is the same for every engine and user. Scripts need the standard library only.
"""

from __future__ import annotations

from sandbox_case import BRIEF, LEAK, case, ended
from sandbox_limit_cases import LIMITS, OUTPUTS

FILES = (
    case(
        "write-outside",
        """
        for place in ("/etc", "/usr", "/", "/root", "/var", "/home", "/dev", "/sys", "/proc",
                      "/opt", "/usr/local", "/usr/lib", "/sandbox", "/bin", "/lib"):
            attempt(place, lambda: write(os.path.join(place, "planted")))
            attempt(place + " folder", lambda: os.mkdir(os.path.join(place, "planted.d")))
    """,
    ),
    case(
        "read-host",
        """
        for path in ("$SECRET", "$REPOSITORY/pyproject.toml", "$REPOSITORY/agent_tools/errors.py",
                     "$REPOSITORY/.data", "/etc/shadow", "/root/.ssh", "/root/.bashrc",
                     "/root/.bash_history", "/var/log", "/home", "/boot", "/proc/kcore"):
            attempt(path, lambda: os.listdir(path) if os.path.isdir(path) else open(path).read())
    """,
    ),
    case(
        "read-private-answers",
        """
        for start in ("", "/proc/self/root", "/proc/1/root", "/proc/self/cwd/..", ".."):
            for path in ("$INPUTS/../private/answers.csv", "private/answers.csv", "../private"):
                attempt(start + path, lambda: open(os.path.join(start + "/", path)).read())
                attempt(path, lambda: open(path).read())
    """,
    ),
    case(
        "read-other-scripts",
        """
        mine = os.getcwd()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            if int(pid) != os.getpid():
                for name in ("cwd", "root", "exe"):
                    attempt(pid + name, lambda: os.listdir(f"/proc/{pid}/{name}/"))
        for name in os.listdir(os.path.dirname(mine)):
            path = os.path.join(os.path.dirname(mine), name)
            if path not in (mine, os.environ["TMPDIR"]): print("got through:", path)
    """,
    ),
    case(
        "change-interpreter",
        """
        import json
        for path in (os.__file__, json.__file__, os.path.realpath(sys.executable),
                     "/usr/bin/env", "/bin/sh"):
            attempt(path, lambda: open(path, "ab"))
            attempt(path, lambda: os.rename(path, path + "x"))
            attempt(path, lambda: os.chmod(path, 0o777))
        for folder in sys.path:
            if folder.startswith("/"):
                attempt(folder, lambda: write(os.path.join(folder, "usercustomize.py")))
    """,
    ),
    case(
        "kernel-settings",
        """
        for path in ("/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern",
                     "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger", "/proc/sys/fs/file-max",
                     "/proc/sys/user/max_user_namespaces", "/proc/sys/net/ipv4/ip_forward",
                     "/sys/kernel/uevent_helper", "/sys/power/state"):
            attempt(path, lambda: write(path))
        def unkillable():
            with open("/proc/self/oom_score_adj", "w") as file: file.write("-1000")
        attempt("oom score", unkillable)
        for base, folders, files in os.walk("/sys/fs/cgroup"):
            attempt(base, lambda: os.mkdir(base + "/mine"))
            for name in ("cgroup.procs", "memory.limit_in_bytes", "memory.max", "pids.max"):
                attempt(base + name, lambda: write(base + "/" + name))
    """,
    ),
    case(
        "own-user-maps",
        """
        for name in ("uid_map", "gid_map", "setgroups", "attr/current"):
            attempt(name, lambda: write("/proc/self/" + name))
    """,
    ),
    case(
        "device-nodes",
        """
        attempt("null", lambda: os.mknod("null", 0o600 | stat.S_IFCHR, os.makedev(1, 3)))
        attempt("disk", lambda: os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0)))
        for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/kvm", "/dev/fuse",
                     "/dev/tty", "/dev/net/tun"):
            attempt(path, lambda: os.open(path, os.O_RDWR))
    """,
    ),
    case(
        "links-into-the-system",
        """
        for path in ("/etc/ld.so.cache", "/usr/bin/env", "/bin/sh", "/proc/self/mem"):
            attempt(path, lambda: os.link(path, "hard"))
    """,
    ),
    case(
        "owners-and-modes",
        """
        open("a", "w").close()
        attempt("chown", lambda: os.chown("a", 0, 0))
        attempt("chown other", lambda: os.chown("a", 12345, 12345))
        attempt("lchown /", lambda: os.lchown("/", os.getuid(), os.getgid()))
        attempt("chmod /", lambda: os.chmod("/", 0o777))
        attempt("chmod /usr", lambda: os.chmod("/usr", 0o777))
        attempt("xattr", lambda: libc.setxattr(b"/tmp", b"user.a", b"b", 1, 0))
    """,
    ),
    case(
        "set-user-id",
        """
        import shutil, subprocess
        tool = shutil.which("id")
        shutil.copy(tool, "mine"); os.chmod("mine", 0o6755)
        before = os.getuid()
        for command in (["./mine", "-u"], [tool, "-u"]):
            if int(subprocess.run(command, capture_output=True).stdout) != before:
                print("got through:", command)
        for path in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount", "/usr/bin/sudo"):
            if os.path.exists(path) and os.stat(path).st_mode & stat.S_ISUID:
                if not os.statvfs(path).f_flag & os.ST_NOSUID: print("got through:", path)
        if before == 0: print("got through: user 0")
        for name, act in (("setuid", os.setuid), ("setgid", os.setgid), ("seteuid", os.seteuid)):
            attempt(name, lambda: act(0))
        attempt("setgroups", lambda: os.setgroups([0]))
    """,
    ),
    case(
        "environment",
        f"""
        texts = [str(dict(os.environ)), open("/proc/self/environ").read()]
        try: texts.append(open("/proc/1/environ").read())
        except OSError: pass
        if "{LEAK}" in "".join(texts): print("got through: the environment")
        if set(os.environ) & {{"DOCKER_HOST", "PYTHONPATH", "VIRTUAL_ENV", "SSH_AUTH_SOCK"}}:
            print("got through:", sorted(os.environ))
    """,
    ),
)

PROCESSES = (
    case(
        "signal-the-worker",
        """
        for number in (*range(1, 32), *range(34, 65)):
            try: os.kill(1, number)
            except OSError: pass
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            if number != signal.SIGTERM: signal.signal(number, signal.SIG_IGN)
            try: os.kill(-1, number)
            except OSError: pass
    """,
    ),
    case(
        "see-other-processes",
        """
        others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
        if others: print("got through:", others)
    """,
    ),
    case(
        "read-the-worker",
        """
        names = ["mem", "environ", "maps", "root", "cwd", "exe", "ns/mnt", "ns/net", "auxv"]
        for name in (*names, "pagemap", *(f"fd/{number}" for number in range(10))):
            attempt(name, lambda: os.open("/proc/1/" + name, os.O_RDONLY))
        attempt("stack", lambda: open("/proc/1/stack").read())
        attempt("descriptors", lambda: os.listdir("/proc/1/fd"))
        attempt("mem", lambda: os.open("/proc/1/mem", os.O_RDWR))
    """,
    ),
    case(
        "trace",
        """
        for pid in (1, 2, os.getppid() or 1):
            attempt("attach", lambda: call(101, 117, 16, pid, 0, 0))
            attempt("seize", lambda: call(101, 117, 0x4206, pid, 0, 0))
        attempt("traceme", lambda: call(101, 117, 0, 0, 0, 0))
        attempt("readv", lambda: call(310, 270, 1, 0, 0, 0, 0, 0))
        attempt("writev", lambda: call(311, 271, 1, 0, 0, 0, 0, 0))
        attempt("kcmp", lambda: call(312, 272, os.getpid(), 1, 0, 0, 0))
        attempt("pidfd_getfd", lambda: call(438, 438, os.pidfd_open(1), 0, 0))
        attempt("process_madvise", lambda: call(440, 440, os.pidfd_open(1), 0, 0, 8, 0))
    """,
    ),
    case(
        "limit-the-worker",
        """
        import resource
        attempt("prlimit", lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)))
        attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, 1, 19))
        attempt("affinity", lambda: os.sched_setaffinity(1, [0]))
        attempt("raise files", lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)))
        attempt("raise memory", lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)))
        attempt("raise core", lambda: resource.setrlimit(resource.RLIMIT_CORE, (1, 1)))
    """,
    ),
    case(
        "inherited-descriptors",
        """
        for fd in range(3, 700):
            try: os.fstat(fd); print("got through:", fd, os.readlink(f"/proc/self/fd/{fd}"))
            except OSError: pass
    """,
    ),
    case(
        "namespaces",
        """
        for bit in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            attempt(f"unshare {bit:#x}", lambda: libc.unshare(bit))
            attempt(f"clone {bit:#x}", lambda: call(56, 220, bit | 17, 0, 0, 0, 0))
        attempt("clone3", lambda: call(435, 435, 0, 0))
        for pid in (1, os.getpid()):
            for name in ("mnt", "net", "user", "pid"):
                attempt(f"setns {name}",
                        lambda: libc.setns(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY), 0))
    """,
    ),
    case(
        "mounts",
        """
        attempt("tmpfs", lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
        attempt("proc", lambda: libc.mount(b"proc", b"/proc", b"proc", 0, None))
        attempt("bind", lambda: libc.mount(b"/", b"/tmp", None, 4096, None))
        attempt("writable", lambda: libc.mount(b"none", b"/usr", None, 4096 | 32, None))
        attempt("umount", lambda: libc.umount2(b"/tmp", 2))
        attempt("chroot", lambda: libc.chroot(b"/tmp"))
        attempt("pivot_root", lambda: call(155, 41, b"/tmp", b"/tmp"))
        for number in (428, 429, 430, 431, 432, 433, 442):
            attempt(f"call {number}", lambda: libc.syscall(number, -100, b"/tmp", 0, 0, 0))
    """,
    ),
    case(
        "no-capabilities",
        """
        facts = dict(l.split(":\\t", 1) for l in open("/proc/self/status") if ":\\t" in l)
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            if int(facts[name], 16): print("got through:", name)
        if facts["NoNewPrivs"].strip() != "1" or facts["Seccomp"].strip() != "2":
            print("got through:", facts["NoNewPrivs"], facts["Seccomp"])
    """,
    ),
    case(
        "orphans",
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in range(1, 32):
                    try: signal.signal(number, signal.SIG_IGN)
                    except OSError: pass
                while True: time.sleep(0.01)
            os._exit(0)
        os.wait()
    """,
        then="""
        others = [p for p in os.listdir("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
        print(others or "clean")
    """,
    ),
    case(
        "kill-the-parent",
        """
        if os.fork() == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            while True: time.sleep(0.01)
        time.sleep(30)
    """,
        ended("killed"),
    ),
    case("stop-oneself", "os.kill(os.getpid(), signal.SIGSTOP)", ended("timeout"), limits=BRIEF),
    case(
        "core-dumps",
        """
        pid = os.fork()
        if pid == 0: ctypes.string_at(0)
        _, status = os.waitpid(pid, 0)
        found = sorted(os.listdir("."))
        if os.WCOREDUMP(status) or found != ["script.py", "train.csv"]: print("got through:", found)
    """,
    ),
    case(
        "shell",
        """
        import subprocess
        text = "echo x > /etc/y; echo x > /usr/y; cat /etc/shadow; cat $SECRET; ls /root/.ssh"
        found = subprocess.run(["/bin/sh", "-c", text], capture_output=True)
        if found.stdout: print("got through:", found.stdout)
    """,
    ),
)

KERNEL = (
    case(
        "keys",
        """
        attempt("add_key", lambda: call(248, 217, b"user", b"a", b"b", 1, -3))
        attempt("request_key", lambda: call(249, 218, b"user", b"a", 0, -3))
        attempt("keyctl", lambda: call(250, 219, 0, -3, 0))
    """,
    ),
    case("bpf", "attempt('bpf', lambda: call(321, 280, 0, ctypes.create_string_buffer(128), 128))"),
    case(
        "io-uring",
        """
        attempt("setup", lambda: call(425, 425, 8, ctypes.create_string_buffer(256)))
        attempt("enter", lambda: call(426, 426, 0, 0, 0, 0, 0))
        attempt("register", lambda: call(427, 427, 0, 0, 0, 0))
        if ctypes.get_errno() != errno.EPERM: print("got through:", ctypes.get_errno())
    """,
    ),
    case(
        "perf-events",
        """
        attempt("perf", lambda: call(298, 241, ctypes.create_string_buffer(128), 0, -1, -1, 0))
    """,
    ),
    case(
        "system-calls",
        """
        attempt("userfaultfd", lambda: call(323, 282, 0))
        attempt("kexec_load", lambda: call(246, 104, 0, 0, 0, 0))
        attempt("init_module", lambda: call(175, 105, 0, 0, b""))
        attempt("finit_module", lambda: call(313, 273, 0, b"", 0))
        attempt("open_by_handle_at", lambda: call(304, 265, 0, 0, 0))
        attempt("name_to_handle_at", lambda: call(303, 264, -100, b"/", 0, 0, 0))
        attempt("fanotify_init", lambda: call(300, 262, 0, 0))
        attempt("acct", lambda: call(163, 89, b"a"))
        attempt("swapon", lambda: call(167, 224, b"a", 0))
        attempt("reboot", lambda: call(169, 142, 0, 0, 0, 0))
        attempt("settimeofday", lambda: call(164, 170, 0, 0))
        attempt("sethostname", lambda: libc.sethostname(b"x", 1))
        attempt("syslog", lambda: call(103, 116, 3, 0, 0))
        attempt("quotactl", lambda: call(179, 60, 0, 0, 0, 0))
        attempt("move_pages", lambda: call(279, 239, 1, 0, 0, 0, 0, 0))
    """,
    ),
)

TALK = (
    case(
        "sockets",
        """
        for family in (1, 2, 10, 16, 17, 29, 31, 38, 40, 44):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                attempt(f"family {family}", lambda: socket.socket(family, kind))
    """,
    ),
    case(
        "abstract-names",
        """
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        attempt("bind", lambda: one.bind("\\0name"))
        attempt("listen", lambda: one.listen())
        attempt("connect", lambda: one.connect("\\0name"))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        for number in range(2048):
            attempt("reach", lambda: one.sendto(b"x", b"\\0%05x" % number))
    """,
    ),
    case(
        "no-interfaces",
        """
        names = [l.split(":")[0].strip() for l in open("/proc/net/dev") if ":" in l]
        if names not in ([], ["lo"]): print("got through:", names)
    """,
    ),
    case(
        "system-v",
        """
        attempt("shmget", lambda: call(29, 194, 1, 4096, 0o1600))
        attempt("semget", lambda: call(64, 190, 1, 1, 0o1600))
        attempt("msgget", lambda: call(68, 186, 1, 0o1600))
        attempt("mq_open", lambda: call(240, 180, b"q", 0o102, 0o600, 0))
    """,
    ),
    case(
        "shared-folders",
        """
        for place in (os.environ["TMPDIR"], "/dev/shm", os.getcwd(), os.path.dirname(os.getcwd())):
            try:
                write(os.path.join(place, "left")); os.utime(place, (1, 1)); os.chmod(place, 0o777)
            except OSError: pass
    """,
        then="""
        for place in (os.environ["TMPDIR"], "/dev/shm", os.getcwd()):
            seen = os.stat(place)
            if os.path.exists(os.path.join(place, "left")): print("left in", place)
            if stat.S_IMODE(seen.st_mode) & 0o022: print(place, oct(seen.st_mode))
            if seen.st_mtime < 10: print("time of", place)
        print("clean")
    """,
    ),
    case(
        "poison-modules",
        """
        import builtins, json, random, csv
        json.dumps = lambda *a, **k: "poison"
        builtins.len = lambda x: 0
        csv.reader = None
        sys.modules["statistics"] = None
        os.environ["POISON"] = "1"
        sys.path.insert(0, os.environ["TMPDIR"])
        write(os.path.join(os.environ["TMPDIR"], "math.py"))
        random.seed(99)
        try: libc.setenv(b"POISON", b"1", 1)
        except OSError: pass
    """,
        then="""
        import builtins, csv, json, math, statistics
        right = json.dumps([1]) == "[1]" and len([1]) == 1 and csv.reader is not None
        print("clean" if right and "POISON" not in os.environ and math.pi > 3 else "poisoned")
    """,
    ),
    case(
        "change-inputs",
        """
        try: write("train.csv")
        except OSError: pass
        os.chmod("train.csv", 0o600); write("train.csv"); os.unlink("train.csv")
    """,
        then="""
        print("clean" if open("train.csv").read().startswith("id,") else "changed")
    """,
    ),
    case(
        "timers-and-handlers",
        """
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
    """,
        then="""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        timer = signal.getitimer(signal.ITIMER_REAL)
        print("clean" if not blocked and timer == (0, 0) else blocked)
    """,
    ),
)

CASES = (*FILES, *PROCESSES, *KERNEL, *TALK, *OUTPUTS, *LIMITS)
