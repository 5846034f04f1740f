"""MLE-bench's container contract in the sandbox (facts: openai/mle-bench `environment/`, MIT).

    /home/data                    the public files, read-only
    /home/submission/submission.csv   the one file that is graded
    /home/code, /home/logs        kept with the run
    /home/agent                   the agent's own folder, if it brings one
    /home/instructions.txt        the rules and the task
    /home/validate_submission.sh  says whether a file is valid, never a score

There is no /private: answers are on the other side of the sandbox. What is written lies in memory
of a fixed size, so that no agent can fill a disk. The only way out is the bridge, where there is
one: a socket that speaks to the model and to the validation (`bridge.py`).
"""

from __future__ import annotations

import io
import shlex
import tarfile
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from agent_tools.errors import InfraError
from agent_tools.sandbox import CommandResult, Limits, SandboxError, Shell, View, open_shell
from agent_tools.sandbox.instance import WORK

WRITABLE = ("submission", "code", "logs", "agent")
BRIDGE, PORT = "/home/bridge", 5000
_BIN = f"{WORK}/.bin"
_MOST_KEPT_BYTES = 8 << 20  # of one file in code or logs
_MOST_SUBMISSION_BYTES = 64 << 20
_RELAY = Path(__file__).with_name("relay.py.txt")

_VALIDATE = f"""#!/bin/bash
# usage: /home/validate_submission.sh FILE.csv
if [ $# -ne 1 ]; then echo "usage: $0 FILE.csv"; exit 1; fi
if [ ! -f "$1" ]; then echo "no such file: $1"; exit 1; fi
exec python3 {_BIN}/relay.py validate "$1"
"""
# Start scripts of MLE-bench's agents switch environments first; here there is only one.
_CONDA = """#!/bin/bash
echo 'conda() { :; }'
"""


class Container:
    """A shell with the contract's paths; use it as a context manager.

    files         path below /home → text, laid out before the start
    folder        copied to /home/agent
    bridge        folder of the host that holds the bridge's socket `s`; None: no way out at all
    gpu           whether programs see the host's GPUs, where it has any
    """

    def __init__(
        self,
        public: Path,
        limits: Limits,
        *,
        files: dict[str, str] | None = None,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
        bridge: Path | None = None,
        gpu: bool = False,
        python: Path | None = None,
        require_full_isolation: bool = False,
    ) -> None:
        self._limits = limits
        mounts = [(public, "/home/data")]
        if bridge is not None:
            mounts.append((bridge, BRIDGE))
        names = (*WRITABLE, "instructions.txt", "validate_submission.sh")
        self._view = View(
            mounts=tuple(mounts),
            links=tuple((f"/home/{name}", name) for name in names),
            sockets=bridge is not None,
            devices=gpu_devices() if gpu else (),
        )
        self._files = dict(files or {})
        self._folder = folder
        self._bridge = bridge
        self._python = python
        self._full = require_full_isolation
        self._environment = {
            "DATA_DIR": "/home/data",
            "SUBMISSION_DIR": "/home/submission",
            "CODE_DIR": "/home/code",
            "LOGS_DIR": "/home/logs",
            "AGENT_DIR": "/home/agent",
            **(environment or {}),
        }
        self._shell: Shell | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Protections that this host does not give; known once it is open."""
        return self._opened.missing

    def run(self, command: str, *, wall_seconds: float | None = None) -> CommandResult:
        """Run a command as if typed. Raises as `Shell.run`."""
        wall = wall_seconds or self._limits.wall
        return self._opened.run(command, wall_seconds=wall, cpu_seconds=self._limits.cpu_seconds)

    def snapshot(self, most_bytes: int) -> bytes:
        """The writable folders as a checked tar archive."""
        return self._opened.snapshot(most_bytes)

    def __enter__(self) -> Self:
        with tempfile.TemporaryDirectory() as staging:
            self._lay_out(Path(staging))
            self._shell = open_shell(
                "bubblewrap",
                inputs=Path(staging),
                limits=self._limits,
                python=self._python,
                view=self._view,
                require_full_isolation=self._full,
            )
        try:
            self._prepare()
        except BaseException:
            self._shell.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def _opened(self) -> Shell:
        if self._shell is None:
            raise SandboxError("this container is not open: use it in a `with` block")
        return self._shell

    def _lay_out(self, staging: Path) -> None:
        import shutil

        for name in (*WRITABLE, ".bin"):
            (staging / name).mkdir()
        if self._folder is not None:
            shutil.copytree(self._folder, staging / "agent", dirs_exist_ok=True)
        texts = {
            ".bin/relay.py": _RELAY.read_text(encoding="utf-8"),
            ".bin/conda": _CONDA,
            "validate_submission.sh": _VALIDATE,
            **self._files,
        }
        for name, text in texts.items():
            place = staging / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8", errors="surrogatepass")

    def _prepare(self) -> None:
        exports = " ".join(f"{key}={shlex.quote(v)}" for key, v in self._environment.items())
        lines = [
            f"cd {WORK}",
            "chmod -R u+rwX . && chmod 0755 validate_submission.sh .bin/*",
            f"export {exports} PATH={_BIN}:$PATH",
        ]
        if self._bridge is not None:
            lines.append(f"(python3 {_BIN}/relay.py serve </dev/null >/dev/null 2>&1 &)")
            lines.append(f"python3 {_BIN}/relay.py wait")
        lines.append("cd /home/agent")
        done = self._opened.run("\n".join(lines), wall_seconds=60.0)
        if done.status != "ok":
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InfraError(f"the container could not be made ready ({reason}): try again")


def gpu_devices() -> tuple[str, ...]:
    """The host's NVIDIA devices; empty where it has none."""
    found = sorted(Path("/dev").glob("nvidia*"))
    return tuple(str(path) for path in found if path.is_char_device())


def collect(container: Container, keep: tuple[str, ...] = ("submission", "code", "logs")) -> dict[
    str, bytes
]:  # fmt: skip
    """The files below the kept folders, by path. What is too big is left out.

    Of the submission folder only `submission.csv` is taken, up to 64 MiB, of the others files up
    to 8 MiB. Untrusted: names and contents are the agent's.
    """
    kilo, big = _MOST_KEPT_BYTES >> 10, _MOST_SUBMISSION_BYTES >> 10
    drop = [name for name in (*WRITABLE, ".bin") if name not in keep]
    container.run(
        f"cd {WORK} && kill $(jobs -p) 2>/dev/null; "
        f"rm -rf {' '.join(drop)} .cache instructions.txt validate_submission.sh; "
        "find . -maxdepth 1 -mindepth 1 "
        + " ".join(f"! -name {name}" for name in keep)
        + " -exec rm -rf {} +; "
        f"find . ! -path './submission/*' -type f -size +{kilo}k -delete; "
        "find ./submission -mindepth 1 ! -path ./submission/submission.csv -delete; "
        f"find ./submission -type f -size +{big}k -delete; true",
        wall_seconds=60.0,
    )
    try:
        data = container.snapshot(256 << 20)
    except SandboxError:
        container.run(
            f"cd {WORK} && find . -mindepth 1 ! -path './submission*' -delete; true",
            wall_seconds=60.0,
        )
        try:
            data = container.snapshot(256 << 20)
        except SandboxError:
            return {}
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for entry in archive:
            stream = archive.extractfile(entry) if entry.isreg() else None
            if stream is not None:
                files[entry.name] = stream.read()
    return files
