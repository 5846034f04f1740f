"""Versions and requirements, also where the project runs from its folder without being installed
(on PYTHONPATH, as on a machine whose packages are given)."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from agent_tools.paths import repo_root

NAME = "selfevo"


def version_of(name: str) -> str:
    """A distribution's version; `absent` where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        found = _project().get("version", "absent") if name == NAME else "absent"
        return str(found)


def requirements() -> list[str]:
    """What the project needs, as requirement lines without those of extras."""
    try:
        lines = requires(NAME) or []
    except PackageNotFoundError:
        lines = [str(line) for line in _project().get("dependencies", [])]
    return [line for line in lines if "extra ==" not in line]


def _project() -> dict[str, Any]:
    path = repo_root() / "pyproject.toml"
    try:
        with path.open("rb") as file:
            found = tomllib.load(file).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        return {}
    return dict(found)
