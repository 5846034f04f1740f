"""Where the repository, its data and its separate Python environments are."""

from __future__ import annotations

import os
from pathlib import Path

from agent_tools.errors import UserError


def repo_root() -> Path:
    """Folder that holds the packages, e.g. the clone; absolute."""
    return Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Folder of prepared data: ``SELFEVO_DATA``, else ``<repository>/.data``; may not exist yet."""
    return _from_env("SELFEVO_DATA", repo_root() / ".data")


def script_python() -> Path:
    """Interpreter that runs policy scripts (numpy, pandas and scikit-learn only).

    ``SELFEVO_SCRIPT_PYTHON``, else ``<repository>/.venv-script/bin/python``.
    Raises `UserError` if it is missing.
    """
    return _interpreter("SELFEVO_SCRIPT_PYTHON", ".venv-script", "policy scripts")


def prepare_python() -> Path:
    """Interpreter with the packages that carry the source data; used by ``prepare`` only.

    ``SELFEVO_PREPARE_PYTHON``, else ``<repository>/.venv-prepare/bin/python``.
    Raises `UserError` if it is missing.
    """
    return _interpreter("SELFEVO_PREPARE_PYTHON", ".venv-prepare", "data preparation")


def agents_python() -> Path:
    """Interpreter with the agents that other people wrote (`make setup-agents`).

    ``SELFEVO_AGENTS_PYTHON``, else ``<repository>/.venv-agents/bin/python``.
    Raises `UserError` if it is missing.
    """
    return _interpreter("SELFEVO_AGENTS_PYTHON", ".venv-agents", "installed agents", "setup-agents")


def _from_env(name: str, default: Path) -> Path:
    value = os.environ.get(name, "").strip()
    return Path(value).expanduser().absolute() if value else default


def _interpreter(name: str, venv: str, purpose: str, target: str = "setup") -> Path:
    # absolute(), never resolve(): the link inside a virtual environment is what selects it.
    path = _from_env(name, repo_root() / venv / "bin" / "python")
    if not os.access(path, os.X_OK):
        raise UserError(
            f"no Python for {purpose} at {path}: run `make {target}`, or point {name} at one"
        )
    return path
