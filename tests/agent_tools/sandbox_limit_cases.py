"""Hostile scripts about limits, outputs and cleaning up."""

from __future__ import annotations

from sandbox_case import BRIEF, SHORT, case, cut, ended, output, printed, refused_output, within

OUTPUTS = (
    output("link-inside", "os.symlink('train.csv', 'submission.csv')", "link"),
    output("link-outside", "os.symlink('/etc/ld.so.cache', 'submission.csv')", "link"),
    output("link-to-memory", "os.symlink('/proc/self/mem', 'submission.csv')", "link"),
    output("link-to-nothing", "os.symlink('nowhere', 'submission.csv')", "link"),
    output("folder", "os.mkdir('submission.csv')", "not an ordinary file"),
    output("pipe", "os.mkfifo('submission.csv')", "not an ordinary file"),
    output(
        "unreadable", "write('submission.csv'); os.chmod('submission.csv', 0)", "cannot be read"
    ),
    output("missing", "pass", "no submission.csv written"),
    case(
        "output-of-a-bomb",
        """
        os.truncate(os.open("submission.csv", os.O_CREAT | os.O_RDWR), 1 << 40)
    """,
        ended("error", "killed"),
        outputs=("submission.csv",),
    ),
    case(
        "output-and-locked-folder",
        """
        write("submission.csv"); os.chmod(".", 0)
    """,
        refused_output("cannot be read"),
        outputs=("submission.csv",),
    ),
)

LIMITS = (
    case("cpu-loop", "while True: pass", within(0.7), limits=SHORT),
    case("cpu-loop-without-signal", """
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_PROF, 0)
        while True: pass
    """, within(0.9), limits=SHORT),
    case("cpu-of-children", """
        for _ in range(3):
            if os.fork() == 0:
                while True: pass
        time.sleep(60)
    """, within(1.5), limits=SHORT),
    case("cpu-of-forgotten-children", """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            if os.fork() == 0:
                end = time.process_time() + 0.05
                while time.process_time() < end: pass
                os._exit(0)
            time.sleep(0.01)
    """, ended("timeout", "killed", "error"), limits=SHORT),
    case("wall", "time.sleep(60)", ended("timeout"), limits=BRIEF),
    case("wall-with-children", """
        if os.fork() == 0: os.setsid()
        time.sleep(60)
    """, ended("timeout"), limits=BRIEF),
    case("fork-bomb", """
        while True:
            try: os.fork()
            except OSError: pass
    """, ended("timeout", "killed", "error"), limits=SHORT),
    case("threads", """
        import threading
        for number in range(200):
            threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
    """, ended("error", "killed")),
    case("memory", "block = bytearray(1 << 30)", ended("memory")),
    case("memory-touched", """
        blocks = []
        while True: blocks.append(bytearray(b"x" * (1 << 22)))
    """, ended("memory")),
    case("memory-of-children", """
        for _ in range(8):
            if os.fork() == 0:
                block = bytearray(b"x") * (100 << 20)
                time.sleep(60)
        time.sleep(60)
    """, ended("memory", "killed", "timeout")),
    case("output-100-mb", """
        for _ in range(100): sys.stdout.write("x" * (1 << 20))
        print("the end")
    """, cut),
    case("error-output-100-mb", """
        for _ in range(100): sys.stderr.write("x" * (1 << 20))
        print("done")
    """, printed("done\n")),
    case("one-file", """
        with open("big", "wb") as file:
            for _ in range(9): file.write(bytes(1 << 20))
    """, ended("error", "killed")),
    case("disk", """
        try:
            for number in range(100):
                with open(f"big{number}", "wb") as file: file.write(bytes(7 << 20))
        except OSError as error: print(errno.errorcode[error.errno])
    """, printed("ENOSPC\n")),
    case("scratch-disks", """
        for place in (os.environ["TMPDIR"], "/dev/shm"):
            try:
                for number in range(100):
                    with open(f"{place}/big{number}", "wb") as file: file.write(bytes(7 << 20))
            except OSError as error: print(errno.errorcode[error.errno])
            for number in range(100):
                try: os.unlink(f"{place}/big{number}")
                except OSError: pass
    """, printed("ENOSPC\nENOSPC\n")),
    case("open-files", """
        held = []
        try:
            while True: held.append(open("/dev/null"))
        except OSError as error: print(errno.errorcode[error.errno], len(held) < 64)
    """, printed("EMFILE True\n")),
    case("deep-folders", """
        for _ in range(1500):
            os.mkdir("d"); os.chdir("d")
    """, printed(""), then="""
        print("clean" if sorted(os.listdir(".")) == ["script.py", "train.csv"] else "left")
    """),
    case("locked-folders", """
        place = os.environ["TMPDIR"] + "/a"
        os.makedirs(place + "/b"); os.chmod(place, 0)
    """, printed(""), then="""
        print("clean" if os.listdir(os.environ["TMPDIR"]) == [] else "left")
    """),
)  # fmt: skip
