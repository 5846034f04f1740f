"""The worker's end of the line to its owner: messages of JSON, each with a few byte strings.

A message is four bytes of length, then JSON. The byte strings travel as descriptors where the line
is a local socket, and after the JSON, in the sizes that its key "sizes" gives, where it is a pair
of streams (a container engine). Either way this side sees them as descriptors.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, Protocol

_MOST_FDS = 16


class LineError(Exception):
    """The other end closed the line inside a message."""


class Line(Protocol):
    """One conversation: requests in, answers out."""

    @property
    def hangup_fd(self) -> int:
        """A descriptor that polls as hung up once the owner is gone."""

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next request and its descriptors, which the caller closes; None at the end."""

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        """Send a message with what the descriptors hold."""


class SocketLine:
    """A local stream socket; byte strings are passed as descriptors, without a copy."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel

    @property
    def hangup_fd(self) -> int:
        return self.channel.fileno()

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        fds = array.array("i")
        space = socket.CMSG_SPACE(4 * _MOST_FDS)
        head, ancillary, _flags, _address = self.channel.recvmsg(4, space, socket.MSG_CMSG_CLOEXEC)
        if not head:
            return None
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data)
        head += _exactly(self.channel.recv, 4 - len(head))
        body = _exactly(self.channel.recv, struct.unpack("=I", head)[0])
        message: dict[str, Any] = json.loads(body)
        return message, list(fds)

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        body = json.dumps(message).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.channel.sendmsg([struct.pack("=I", len(body))], rights)
        self.channel.sendall(body)


class StreamLine:
    """Two one-way streams, as a container's standard input and output are."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading = reading
        self._writing = writing

    def _read(self, size: int) -> bytes:
        return os.read(self._reading, size)

    @property
    def hangup_fd(self) -> int:
        return self._reading

    def receive(self) -> tuple[dict[str, Any], list[int]] | None:
        head = self._read(4)
        if not head:
            return None
        head += _exactly(self._read, 4 - len(head))
        message: dict[str, Any] = json.loads(_exactly(self._read, struct.unpack("=I", head)[0]))
        fds = []
        for size in message["sizes"]:
            fd = os.memfd_create("received", os.MFD_CLOEXEC)
            left = size
            while left:
                piece = _exactly(self._read, min(left, 1 << 20))
                _write(fd, piece)
                left -= len(piece)
            os.lseek(fd, 0, os.SEEK_SET)
            fds.append(fd)
        return message, fds

    def send(self, message: dict[str, Any], fds: list[int]) -> None:
        sizes = [os.fstat(fd).st_size for fd in fds]
        body = json.dumps({**message, "sizes": sizes}).encode()
        _write(self._writing, struct.pack("=I", len(body)) + body)
        for fd, size in zip(fds, sizes, strict=True):
            at = 0
            while at < size:
                piece = os.pread(fd, min(size - at, 1 << 20), at)
                if not piece:
                    raise LineError("a file shrank while it was sent")
                _write(self._writing, piece)
                at += len(piece)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = read(size - len(data))
        if not piece:
            raise LineError("the owner closed the line inside a message")
        data += piece
    return bytes(data)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
