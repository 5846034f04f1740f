"""Put a job's files where its script will find them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def lay_out(folder: str, request: dict[str, Any], memory: int) -> list[str]:
    """Write inputs (from the anonymous file `memory`) and, where the request has code, script.py;
    returns the paths made."""
    made = []
    offset = 0
    for name in request["folders"]:
        Path(f"{folder}/{name}").mkdir(0o700)
        made.append(f"{folder}/{name}")
    for name, size in request["files"]:
        path = f"{folder}/{name}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        end = offset + size
        while offset < end:
            offset += os.sendfile(fd, memory, offset, end - offset)
        os.close(fd)
        made.append(path)
    script = f"{folder}/script.py"
    if script not in made and "code" in request:
        Path(script).write_text(request["code"], encoding="utf-8", errors="surrogatepass")
        made.append(script)
    return made
