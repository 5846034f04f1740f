"""Commit message trailers, written and read by us: git would run configured trailer commands."""

from __future__ import annotations

import re
from collections.abc import Mapping


def with_trailers(message: str, trailers: Mapping[str, str] | None) -> str:
    """Message with ``Key: value`` lines at its end; white space in values becomes single spaces."""
    lines = []
    for key, value in (trailers or {}).items():
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", key):
            raise ValueError(f"{key!r} is no trailer key: letters, digits and - only")
        lines.append(f"{key}: {' '.join(str(value).split())}")
    body = message.replace("\0", "").strip() or "(no message)"
    return body + ("\n\n" + "\n".join(lines) if lines else "") + "\n"


def trailers_of(message: str) -> dict[str, str]:
    """Trailers of the last paragraph, if it consists of them."""
    paragraphs = message.strip().split("\n\n")
    if len(paragraphs) < 2:
        return {}
    trailers = {}
    for line in paragraphs[-1].splitlines():
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9-]*): (.*)", line)
        if match is None:
            return {}
        trailers[match.group(1)] = match.group(2)
    return trailers
