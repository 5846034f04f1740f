"""What a program prints, bounded."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field


@dataclass
class Capture:
    """Keeps the first and last half of `limit` bytes of a stream; the rest is dropped."""

    limit: int
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    total: int = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.limit // 2 - len(self.head)
        if room > 0:
            self.head += data[:room]
            data = data[room:]
        self.tail += data
        keep = self.limit - self.limit // 2
        if len(self.tail) > keep:
            del self.tail[:-keep]

    def text(self) -> str:
        cut = self.total - len(self.head) - len(self.tail)
        middle = f"\n[{cut} bytes cut]\n".encode() if cut else b""
        return (bytes(self.head) + middle + bytes(self.tail)).decode("utf-8", "replace")

    def drain(self, fd: int, most: int = 1 << 26) -> None:
        """Read what a non-blocking descriptor holds, at most `most` bytes."""
        with contextlib.suppress(BlockingIOError):
            while most > 0:
                data = os.read(fd, 1 << 16)
                if not data:
                    return
                self.add(data)
                most -= len(data)
