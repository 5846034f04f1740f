"""What sandbox tests share: a Python without packages, a copy for any user, an engine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PYTHON = Path("/usr/bin/python3")
ORDINARY_UID = 41_234

needs_system_python = pytest.mark.skipif(
    not SYSTEM_PYTHON.exists() or os.geteuid() != 0, reason="root: needs root and /usr/bin/python3"
)


def as_user(uid: int = ORDINARY_UID) -> tuple[str, ...]:
    """The head of a command line that gives up root."""
    return ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")


@contextmanager
def plain_python() -> Iterator[Path]:
    """A virtual environment without packages, below /tmp: its workers start at once."""
    folder = Path(tempfile.mkdtemp(prefix="plain-python-"))
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        folder.chmod(0o755)  # as a clone has it: workers run as another user
        yield folder / "bin" / "python"
    finally:
        shutil.rmtree(folder)


@contextmanager
def open_copy(*extra: Path) -> Iterator[Path]:
    """A folder with the sandbox package (and `extra` files) that any user can read."""
    folder = Path(tempfile.mkdtemp(prefix="open-copy-"))
    try:
        folder.chmod(0o755)
        (folder / "inputs").mkdir()
        target = folder / "agent_tools"
        shutil.copytree(ROOT / "agent_tools" / "sandbox", target / "sandbox")
        for name in ("__init__.py", "errors.py", "paths.py"):
            shutil.copy(ROOT / "agent_tools" / name, target / name)
        for path in extra:
            shutil.copy(path, folder / path.name)
        subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def docker_host() -> Iterator[str]:
    """An engine's address: DOCKER_HOST, or an engine of our own. Skips where there can be none."""
    pytest.importorskip("docker", reason="docker: `pip install 'selfevo[docker]'`")
    given = os.environ.get("DOCKER_HOST")
    if given:
        yield given
        return
    daemon = shutil.which("dockerd")
    if daemon is None or os.geteuid() != 0:
        pytest.skip("docker: set DOCKER_HOST, or be root with `apt-get install docker.io`")
    folder = Path(tempfile.mkdtemp(prefix="eng.", dir="/tmp"))  # short: a socket's path is
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                daemon, "--host", f"unix://{folder}/s", "--data-root", f"{folder}/data",
                "--exec-root", f"{folder}/x", "--pidfile", f"{folder}/pid", "--iptables=false",
                "--ip6tables=false", "--ip-forward=false", "--bridge=none",
                "--exec-opt", "native.cgroupdriver=cgroupfs",
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
    try:
        give_up = time.monotonic() + 60
        while not (folder / "s").exists():
            if process.poll() is not None or time.monotonic() > give_up:
                tail = (folder / "log").read_text().splitlines()[-1:]
                pytest.skip(f"docker: the engine does not start here ({tail})")
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", f"unix://{folder}/s")
            yield f"unix://{folder}/s"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)
