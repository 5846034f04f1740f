"""A small HTTP/1.1 client for one server: connections are kept, a request is one write.

A general client costs more processor time than all else that the gateway does for a call. What is
understood: answers with Content-Length, chunked ones, and those that end with the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

CONNECT_S = 10.0
_MAX_HEAD = 65_536


class ConnectionLostError(Exception):
    """No connection, or one that ended before the answer was whole."""


@dataclass(frozen=True)
class Response:
    """`headers` have lower-case names."""

    status: int
    body: bytes
    headers: dict[bytes, bytes] = field(default_factory=dict)


class HttpClient:
    """Requests to one base URL. A cancelled request closes its connection, which ends it there."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no http:// or https:// URL")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/")
        self._idle: list[_Connection] = []
        self._name = parts.netloc.rpartition("@")[2].encode()

    async def request(
        self, method: str, path: str, body: bytes = b"", *, timeout_s: float
    ) -> Response:
        """The whole answer. Raises ConnectionLostError and TimeoutError."""
        head = (
            f"{method} {self._base}{path} HTTP/1.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        ).encode()
        message = b"%bHost: %b\r\n\r\n%b" % (head, self._name, body)
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                answer = await connection.ask(message, timeout_s)
            except ConnectionLostError:
                if kept and not connection.begun:
                    continue  # it was closed while idle: the request was never read
                raise
            if connection.reusable:
                self._idle.append(connection)
            return answer

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop, self._forget), self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            raise ConnectionLostError(f"no connection: {error or 'timed out'}") from error
        return connection

    def _forget(self, connection: _Connection) -> None:
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close(self) -> None:
        for connection in list(self._idle):
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, lost: Callable[[_Connection], None]
    ) -> None:
        self._loop = loop
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._buffer = bytearray()
        self._head: tuple[int, dict[bytes, bytes]] | None = None
        self._left: int | None = None
        self.begun = False  # whether any byte of the answer came
        self.reusable = True

    async def ask(self, message: bytes, timeout_s: float) -> Response:
        self._answer = self._loop.create_future()
        self._buffer.clear()
        self._head, self._left, self.begun = None, None, False
        if self._transport is None or self._transport.is_closing():
            raise ConnectionLostError("the connection was closed")
        self._transport.write(message)
        timer = self._loop.call_later(timeout_s, self._expire)
        try:
            return await self._answer
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def _expire(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(TimeoutError("no answer in time"))

    # ---------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has classes of its own

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        self.begun = True
        self._buffer += data
        try:
            self._parse()
        except (ValueError, IndexError) as error:
            self._fail(f"not an HTTP answer ({error})")

    def eof_received(self) -> None:
        self.reusable = False
        ends_here = self._head is not None and self._left is None
        if ends_here and b"chunked" not in self._header(b"transfer-encoding"):
            self._finish(bytes(self._buffer))

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._lost(self)
        self._fail(f"the connection ended ({error or 'closed by the server'})")

    # ---------------------------------------------------------- the answer

    def _parse(self) -> None:
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > _MAX_HEAD:
                    raise ValueError("its head has no end")
                return
            first, *lines = bytes(self._buffer[:end]).split(b"\r\n")
            del self._buffer[: end + 4]
            status = int(first.split(b" ", 2)[1])
            headers = {}
            for line in lines:
                name, _, value = line.partition(b":")
                headers[name.strip().lower()] = value.strip()
            if 100 <= status < 200:
                self._parse()
                return
            self._head = status, headers
            self.reusable = b"close" not in headers.get(b"connection", b"").lower()
            length = headers.get(b"content-length")
            self._left = int(length) if length is not None else None
            if status in (204, 304):
                self._left = 0
        if self._left is not None:
            if len(self._buffer) >= self._left:
                self._finish(bytes(self._buffer[: self._left]))
        elif b"chunked" in self._header(b"transfer-encoding"):
            self._parse_chunks()

    def _parse_chunks(self) -> None:
        """Reads from the beginning each time: answers to the gateway come in few pieces."""
        parts: list[bytes] = []
        at = 0
        while (end := self._buffer.find(b"\r\n", at)) >= 0:
            size = int(bytes(self._buffer[at:end]).split(b";")[0], 16)
            if size == 0:
                if self._buffer.find(b"\r\n\r\n", end) >= 0:
                    self._finish(b"".join(parts))
                return
            if len(self._buffer) < end + 2 + size + 2:
                return
            parts.append(bytes(self._buffer[end + 2 : end + 2 + size]))
            at = end + 2 + size + 2

    def _header(self, name: bytes) -> bytes:
        return b"" if self._head is None else self._head[1].get(name, b"").lower()

    def _finish(self, body: bytes) -> None:
        assert self._head is not None
        status, headers = self._head
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Response(status, body, headers))

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionLostError(reason))
