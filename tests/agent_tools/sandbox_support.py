"""What sandbox tests share: a Python without packages and a copy for any user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
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
