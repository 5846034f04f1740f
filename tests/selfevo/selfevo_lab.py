"""Labs for the loop's tests."""

import re
import subprocess
from pathlib import Path

from agent_tools.git_configs import LabRepo
from selfevo.lab import init_lab


def quiet(line: str) -> None:
    """A listener that says nothing."""


def git(lab: Path, *args: str) -> str:
    """What git itself says in the lab, without the white space around it."""
    return subprocess.run(
        ["git", "-C", str(lab), *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def new_lab(path: Path) -> Path:
    """A lab as `selfevo init` makes it: its agent is a model; `point_at` says which."""
    init_lab(path)
    return path


def point_at(lab: Path, url: str, **settings: str) -> None:
    """Commit a lab configuration that uses `url`, with further replacements `old=new`."""
    path = lab / "selfevo.yaml"
    text = path.read_text().replace("base_url: auto ", f"base_url: {url} ")
    for old, new in settings.items():
        assert f"{old}: " in text
        text = re.sub(rf"(?m)^(\s*){old}: [^ \n]+", rf"\g<1>{old}: {new}", text)
    path.write_text(text)
    LabRepo(lab).commit(["selfevo.yaml"], "settings", worktree=lab)
