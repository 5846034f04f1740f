"""The file that tells where a server listens."""

from __future__ import annotations

import json
import os
from pathlib import Path


def write_port_file(path: Path, port: int) -> None:
    """Writes `{"port", "pid"}` of this process at once, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps({"port": port, "pid": os.getpid()}) + "\n", encoding="utf-8")
    part.replace(path)
