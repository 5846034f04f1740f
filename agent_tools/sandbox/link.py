"""The owner's end of the line to a worker: it trusts nothing that comes over it.

Two kinds, as in `guest/wire.py`: a local socket over which byte strings travel as descriptors, and
the attached streams of a container, over which they travel inline.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol

_MOST_FDS = 16
_MOST_ANSWER_BYTES = 256 << 20
_SEND_S = 30.0
_FRAME = struct.Struct(">BxxxL")
_OUT, _ERR = 1, 2


class WorkerGoneError(Exception):
    """The worker ended, or does not keep to the protocol."""


class Link(Protocol):
    """One worker's line."""

    @property
    def passes_fds(self) -> bool:
        """Whether descriptors themselves reach the worker, or only what they hold."""

    def send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        """Send a request. Raises WorkerGoneError."""

    def receive(self, timeout_s: float, most_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
        """One answer with its byte strings, each at most `most_bytes` long.

        Raises TimeoutError and WorkerGoneError.
        """

    def abort(self) -> None:
        """Make a `receive` in another thread fail now."""

    def close(self) -> None: ...


class SocketLink:
    """A local stream socket whose other end the worker inherited."""

    passes_fds = True

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        body = json.dumps(message).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._channel.settimeout(_SEND_S)
            self._channel.sendmsg([struct.pack("=I", len(body))], rights)
            self._channel.sendall(body)
        except OSError as error:
            raise WorkerGoneError from error

    def receive(self, timeout_s: float, most_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
        left = _countdown(timeout_s)
        fds = array.array("i")

        def read(size: int) -> bytes:
            self._channel.settimeout(left())
            space = socket.CMSG_SPACE(4 * _MOST_FDS)
            piece, ancillary, _flags, _address = self._channel.recvmsg(
                size, space, socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds.frombytes(payload[: len(payload) // 4 * 4])
            return piece

        try:
            message = _read_message(read)
            return message, [_contents(fd, most_bytes) for fd in fds]
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise WorkerGoneError from error
        finally:
            for fd in fds:
                os.close(fd)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._channel.close()


class AttachedLink:
    """A container's standard streams, attached over one socket of the engine.

    What comes back is cut into frames of eight bytes of head (stream, length) and data; frames of
    the error stream go to `log`.
    """

    passes_fds = False

    def __init__(self, channel: socket.socket, log: IO[bytes]) -> None:
        self._channel = channel
        self._log = log
        self._held = bytearray()
        self._raw = bytearray()

    def send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        sizes = [os.fstat(fd).st_size for fd in fds]
        body = json.dumps({**message, "sizes": sizes}).encode()
        self.send_bytes(struct.pack("=I", len(body)) + body)
        for fd, size in zip(fds, sizes, strict=True):
            self.send_bytes(os.pread(fd, size, 0))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are. Raises WorkerGoneError."""
        try:
            self._channel.settimeout(_SEND_S)
            self._channel.sendall(data)
        except OSError as error:
            raise WorkerGoneError from error

    def receive(self, timeout_s: float, most_bytes: int) -> tuple[dict[str, Any], list[bytes]]:
        left = _countdown(timeout_s)

        def read(size: int) -> bytes:
            while not self._held:
                self._fill(left())
            piece = bytes(self._held[:size])
            del self._held[:size]
            return piece

        try:
            message = _read_message(read)
            sizes = [int(size) for size in message["sizes"]]
            if len(sizes) > _MOST_FDS or any(not 0 <= size <= most_bytes for size in sizes):
                raise WorkerGoneError
            return message, [_exactly(read, size) for size in sizes]
        except TimeoutError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkerGoneError from error

    def _fill(self, timeout_s: float) -> None:
        self._channel.settimeout(timeout_s)
        piece = self._channel.recv(1 << 16)
        if not piece:
            raise WorkerGoneError
        self._raw += piece
        while len(self._raw) >= _FRAME.size:
            stream, size = _FRAME.unpack_from(self._raw)
            if len(self._raw) < _FRAME.size + size:
                return
            data = self._raw[_FRAME.size : _FRAME.size + size]
            del self._raw[: _FRAME.size + size]
            if stream == _OUT:
                self._held += data
            elif stream == _ERR and self._log.tell() < 1 << 20:
                self._log.write(data)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort()
        self._channel.close()


def _countdown(timeout_s: float) -> Callable[[], float]:
    give_up = time.monotonic() + timeout_s

    def left() -> float:
        remaining = give_up - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    return left


def _read_message(read: Callable[[int], bytes]) -> dict[str, Any]:
    size = struct.unpack("=I", _exactly(read, 4))[0]
    if size > _MOST_ANSWER_BYTES:
        raise WorkerGoneError
    message = json.loads(_exactly(read, size))
    if not isinstance(message, dict):
        raise WorkerGoneError
    return message


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = read(size - len(data))
        if not piece:
            raise WorkerGoneError
        data += piece
    return bytes(data)


def _contents(fd: int, most_bytes: int) -> bytes:
    """What a passed descriptor holds; kind and size are checked again on this side of the wall."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size > most_bytes:
        raise WorkerGoneError
    return os.pread(fd, found.st_size, 0)
