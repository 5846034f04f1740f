"""A child process: started so that it cannot outlive us, spoken with over its pipes, restarted.

Three ties, each enough alone: the kernel's death signal (`rl.forge.tether`), the end of its
standard input, and a lock that it holds with us (`AliveLock`): who starts again in the same run
directory waits until the last process of the session before is gone. No torch here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rl.errors import InfraError
from rl.forge.messages import Message, MessageError, Ping, Pong, decode, encode

TETHER = Path(__file__).with_name("tether.py")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
STOP_S = 5.0
PULSE_S, PULSE_LIMIT_S = 2.0, 60.0
_READ = 1 << 16


class AliveLock:
    """Held by the supervisor and, through an inherited descriptor, by all its children."""

    def __init__(self, path: Path, wait_s: float = 30.0) -> None:
        """InfraError if processes of an earlier session are still alive after `wait_s`."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > until:
                    os.close(self.fd)
                    raise InfraError(
                        f"{path} is held: processes of an earlier session still run; end them"
                    ) from None
                time.sleep(0.05)

    def close(self) -> None:
        """Let go; children that still live keep holding it."""
        os.close(self.fd)


class Child:
    """One process of a run and its restarts. Use from the main thread only.

    command: gives the arguments of the next start. `piped`: messages over stdin and stdout;
    otherwise both are closed. `environment`: variables beside our own. Its stderr goes to
    `<folder>/<name>.log`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        command: Callable[[], Sequence[str]],
        alive: AliveLock,
        *,
        piped: bool,
        restarts: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.folder = name, folder
        self.ready = False
        self.starts = 0
        self.since = 0.0  # of the last start, by the monotonic clock
        self._command, self._alive, self._piped, self._restarts = command, alive, piped, restarts
        self._environment = dict(environment or {})
        self._deaths = 0  # in a row
        self._not_before = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._pinged, self._ping = 0.0, 0  # when it was asked last; 0: it has answered
        self._in, self._out = bytearray(), bytearray()

    # ---------------------------------------------------------- life

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """It runs, as far as can be known now."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def readable(self) -> int | None:
        """The descriptor to wait for, while there is one."""
        process = self._process
        return process.stdout.fileno() if process is not None and process.stdout else None

    def start_if_due(self, now: float) -> bool:
        """Start it if it does not run and its pause is over."""
        if self._process is not None or now < self._not_before:
            return False
        pipe = subprocess.PIPE if self._piped else subprocess.DEVNULL
        tied = [sys.executable, "-IS", str(TETHER), str(os.getpid()), *self._command()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                tied,
                stdin=pipe,
                stdout=pipe if self._piped else log,
                stderr=log,
                env=os.environ | self._environment,
                pass_fds=(self._alive.fd,),
                start_new_session=True,  # Ctrl-C is ours to act upon
            )
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
        self.ready, self.since = False, now
        self._pinged, self._ping = now, 0
        self.starts += 1
        self._in.clear()
        self._out.clear()
        return True

    def up(self) -> None:
        """It answers: from now on it is used."""
        self.ready = True
        print(f"{self.name} is ready after {time.monotonic() - self.since:.1f} s", flush=True)

    def ended(self) -> int | None:
        """The exit code (negative: a signal) if it has ended since it was asked last.

        Read `messages` afterwards: all that it wrote is there, then call `bury`.
        """
        return self._process.poll() if self._process is not None else None

    def bury(self, now: float, *, fault: bool = True) -> None:
        """Forget an ended process. It may start again after a pause that doubles with each death
        in a row. InfraError after too many."""
        process, self._process = self._process, None
        assert process is not None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.ready = False
        if not fault:
            self._not_before = now
            return
        self._deaths += 1
        if self._deaths > self._restarts:
            raise InfraError(
                f"{self.name} died {self._deaths} times in a row, last with "
                f"{_how(process.returncode)}: {self.tail()} (see {self.log})"
            )
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._deaths - 1))
        self._not_before = now + pause

    def thrive(self) -> None:
        """It did what it is for: deaths are counted anew."""
        self._deaths = 0

    def kill(self) -> None:
        """SIGKILL, to its process group; it is found dead by the next `ended`."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self, grace_s: float = STOP_S) -> None:
        """SIGTERM, then SIGKILL; returns when it is gone."""
        process = self._process
        if process is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        self.kill()
        process.wait()
        self._process = None
        self.ready = False

    def tail(self) -> str:
        """The last line of its log."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, self.log.stat().st_size - 4096))
                lines = stream.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return "no log"
        return lines[-1].removeprefix("error: ") if lines else "it said nothing"

    # ---------------------------------------------------------- messages

    def check_pulse(self, now: float) -> None:
        """Ask a ready process for a sign of life; kill one that gives none for too long."""
        if not self.ready or self._process is None:
            return
        if self._ping and now - self._pinged > PULSE_LIMIT_S:
            print(f"{self.name} gives no sign of life; it is started again", file=sys.stderr)
            self.kill()
        elif not self._ping and now - self._pinged > PULSE_S:
            self._pinged, self._ping = now, self.starts
            self.send(Ping(self._ping))

    def alive_by(self, pong: Pong) -> None:
        """It answered."""
        if pong.number == self._ping:
            self._ping = 0

    def send(self, message: Message) -> None:
        """Queue a message; it goes out as the pipe has room."""
        self._out += encode(message)
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes. A broken pipe is found by `ended`."""
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._out:
                sent = os.write(self._process.stdin.fileno(), self._out)
                del self._out[:sent]

    def messages(self) -> list[Message]:
        """Whole messages that have come. A child that writes anything else is killed."""
        if self.readable is None:
            return []
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self.readable, _READ):
                self._in += chunk
        *lines, rest = self._in.split(b"\n")
        self._in = bytearray(rest)
        try:
            return [decode(bytes(line)) for line in lines]
        except MessageError as error:
            print(f"{self.name}: {error}; it is started again", file=sys.stderr)
            self.kill()
            return []


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
