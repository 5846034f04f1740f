"""What a hostile script is, what may become of it, and the host that it runs on.

A script that tries to get out says what it got through; `contained` wants it to have reached its
end without. `World.job` puts paths in for the words $INPUTS, $SECRET and $REPOSITORY.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent_tools.sandbox import Limits, ScriptJob, ScriptPool, ScriptResult

Check = Callable[[ScriptResult], None]
LEAK = "SELFEVO_TEST_LEAK"
ROOM = Limits(
    cpu_seconds=2.0, wall_seconds=40, memory_mb=256, file_mb=8, processes=16, open_files=64,
    disk_mb=32, output_bytes=20_000,
)  # fmt: skip
SHORT = Limits(
    cpu_seconds=0.4, wall_seconds=15, memory_mb=256, file_mb=8, processes=16, open_files=64,
    disk_mb=32,
)  # fmt: skip
BRIEF = Limits(cpu_seconds=5, wall_seconds=0.6, memory_mb=256, processes=16)

PRELUDE = """
import ctypes, errno, os, signal, socket, stat, sys, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
def call(x86, arm, *arguments):
    return libc.syscall(x86 if X86 else arm, *arguments)
def attempt(name, action):
    ctypes.set_errno(0)
    try: got = action()
    except (OSError, ValueError): return
    if got not in (-1, "", b"", []): print("got through:", name, repr(got)[:60])
def write(path):
    with open(path, "w") as file: file.write("1")
"""


@dataclass(frozen=True)
class Case:
    """A script, its check, and a second script that must find nothing of the first."""

    name: str
    code: str
    check: Check
    limits: Limits = ROOM
    outputs: tuple[str, ...] = ()
    then: str = ""


def contained(result: ScriptResult) -> None:
    """It ran to its end and nothing got through."""
    assert result.status == "ok", result
    assert result.stdout == "done\n", result


def ended(*statuses: str) -> Check:
    """It ended with one of these."""

    def check(result: ScriptResult) -> None:
        assert result.status in statuses, result
        assert result.files == {}

    return check


def printed(text: str) -> Check:
    def check(result: ScriptResult) -> None:
        assert result.status == "ok", result
        assert result.stdout == text, result

    return check


def refused_output(reason: str) -> Check:
    def check(result: ScriptResult) -> None:
        assert result.status == "error", result
        assert reason in result.last_line, result
        assert result.files == {}

    return check


def cut(result: ScriptResult) -> None:
    assert result.status == "ok", result
    assert len(result.stdout) < 20_100
    assert "bytes cut" in result.stdout
    assert result.stdout.endswith("the end\n")


def within(most_cpu_s: float) -> Check:
    def check(result: ScriptResult) -> None:
        assert result.status == "timeout", result
        assert result.cpu_s < most_cpu_s, result

    return check


def case(name: str, code: str, check: Check = contained, **more: object) -> Case:
    body = textwrap.dedent(code).strip("\n")
    end = "\nprint('done')\n" if check is contained else "\n"
    return Case(name, PRELUDE + body + end, check, **more)  # type: ignore[arg-type]


def output(name: str, make: str, reason: str) -> Case:
    return case(f"output-{name}", make, refused_output(reason), outputs=("submission.csv",))


@dataclass(frozen=True)
class World:
    """What is on the host for scripts to try for: inputs, answers beside them, a secret file."""

    inputs: Path
    secret: Path
    repository: Path

    def job(self, case: Case, code: str, outputs: tuple[str, ...] = ()) -> ScriptJob:
        words = {"$INPUTS": self.inputs, "$SECRET": self.secret, "$REPOSITORY": self.repository}
        for word, path in words.items():
            code = code.replace(word, str(path))
        return ScriptJob(code, self.inputs, outputs, case.limits)


def make_world(folder: Path) -> World:
    """Files under `folder`, readable by all, so that only the sandbox keeps them from scripts."""
    inputs = folder / "prepared" / "public"
    inputs.mkdir(parents=True)
    (inputs / "train.csv").write_text("id,a,target\n1,2.5,0\n2,3.5,1\n")
    (folder / "prepared" / "private").mkdir()
    (folder / "prepared" / "private" / "answers.csv").write_text("the answers")
    (folder / "secret.txt").write_text("the secret")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return World(inputs, folder / "secret.txt", Path(__file__).resolve().parents[2])


def run_case(case: Case, pool: ScriptPool, world: World) -> None:
    """Run a case; raises AssertionError with the result where it is not contained."""
    case.check(pool.run([world.job(case, case.code, case.outputs)])[0])
    if case.then:
        code = PRELUDE + textwrap.dedent(case.then)
        second = pool.run([world.job(case, code)])[0]
        assert (second.status, second.stdout) == ("ok", "clean\n"), second
