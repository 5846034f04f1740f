"""Which folder a checkpoint name means, and fingerprints of it. No torch here."""

from __future__ import annotations

import hashlib
from pathlib import Path

import model
from rl.errors import ConfigError


def bundled_checkpoint() -> Path:
    """The folder of the bundled nano model."""
    return Path(model.__path__[0]) / "checkpoints" / "nano"


def resolve_checkpoint(name: str) -> Path:
    """`nano` → the bundled folder, else a path; ConfigError if it holds no checkpoint."""
    folder = bundled_checkpoint() if name == "nano" else Path(name).expanduser()
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"checkpoint {name!r}: no config.json in {folder}; give a checkpoint folder or nano"
        )
    return folder


def fingerprint(folder: Path) -> str:
    """sha256 over the weight files and config.json, in name order: what was really loaded."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
