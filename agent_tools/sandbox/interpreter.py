"""Where a Python lives: what a sandbox must show of it, and what not."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from agent_tools.errors import InfraError

_ASK = """
import json, os, sys, sysconfig
print(json.dumps({
    "prefix": sys.prefix, "base_prefix": sys.base_prefix,
    "stdlib": sysconfig.get_path("stdlib"),
    "base_site": sysconfig.get_path("purelib", vars={"base": sys.base_prefix}),
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """Folders that a Python needs, folders inside them to hide, and links on the way to it.

    The folders lie outside /usr, which a sandbox shows as a whole; `stdlib` is the standard
    library, wherever it is.
    """

    executable: Path
    folders: tuple[Path, ...]
    hidden: tuple[Path, ...]
    links: tuple[tuple[str, str], ...]
    stdlib: Path

    @property
    def temp(self) -> str:
        """Where scripts get their temporary folder: /tmp, unless this Python lies below it."""
        # Folders that lead to a Python below /tmp would stay writable there.
        below_tmp = any(folder.is_relative_to("/tmp") for folder in self.folders)
        return "/sandbox/tmp" if below_tmp else "/tmp"


def inspect_python(python: Path) -> Interpreter:
    """Ask a Python where it lives. Raises InfraError if it does not run."""
    try:
        answer = subprocess.run(
            [str(python), "-I", "-c", _ASK], capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise InfraError(f"script Python {python} does not run ({error}): run `make setup`") from (
            error
        )
    facts = json.loads(answer.stdout)
    prefix, base = Path(facts["prefix"]), Path(facts["base_prefix"])
    folders = [folder for folder in dict.fromkeys((base, base.resolve(), prefix)) if folder]
    folders = [folder for folder in folders if not folder.is_relative_to("/usr/bin")]
    outside_usr = [f for f in folders if f != Path("/usr") and f != Path("/")]
    hidden = []
    if prefix != base:  # a virtual environment: the base's own packages stay out
        hidden.append(Path(facts["base_site"]))
    links: list[tuple[str, str]] = []
    step = python
    while step.is_symlink() and len(links) < 20:
        target = str(step.readlink())
        if not any(step.is_relative_to(folder) for folder in (*outside_usr, Path("/usr"))):
            links.append((target, str(step)))
        step = step.parent / target
    return Interpreter(
        python, tuple(outside_usr), tuple(hidden), tuple(links), Path(facts["stdlib"])
    )
