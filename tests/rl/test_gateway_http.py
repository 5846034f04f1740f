"""rl.gateway.http_client against raw sockets: every form of an answer, and ways to lose one."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.gateway.http_client import ConnectionLostError, HttpClient, Response

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n"
)
TRAILED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n"
TO_END = b"HTTP/1.0 200 OK\r\n\r\nhello"
CONTINUED = b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


async def ask(pieces: Sequence[bytes], *, close: bool = False, times: int = 1) -> list[Response]:
    """What the client makes of an answer that comes in these pieces."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                break
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            return [await client.request("GET", "/", timeout_s=5) for _ in range(times)]
        finally:
            client.close()


@given(st.sampled_from([LENGTH, CHUNKED, TRAILED, CONTINUED, TO_END]), st.data())
@settings(max_examples=30)
def test_an_answer_is_the_same_however_it_is_cut(whole: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) if b > a]
    (answer,) = asyncio.run(ask(pieces, close=whole == TO_END))
    assert (answer.status, answer.body) == (200, b"hello")


def test_a_connection_is_kept_and_one_that_was_closed_meanwhile_replaced() -> None:
    assert len(asyncio.run(ask([LENGTH], times=3))) == 3
    assert len(asyncio.run(ask([LENGTH], times=3, close=True))) == 3
    assert asyncio.run(ask([EMPTY]))[0].body == b""


@pytest.mark.parametrize(
    "pieces",
    [
        [LENGTH[:-1]],
        [CHUNKED[:-2]],
        [CHUNKED.replace(b"2\r\nhe", b"x\r\nhe")],
        [b"hello\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000],
        [],
    ],
)
def test_an_answer_that_is_not_whole_is_lost(pieces: Sequence[bytes]) -> None:
    with pytest.raises(ConnectionLostError):
        asyncio.run(ask(pieces, close=True))


def test_waiting_ends() -> None:
    async def wait() -> None:
        async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
            client = HttpClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await client.request("GET", "/", timeout_s=0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    with pytest.raises(ConnectionLostError):
        asyncio.run(HttpClient("http://127.0.0.1:9").request("GET", "/", timeout_s=1))
    with pytest.raises(ValueError, match="is no http"):
        HttpClient("localhost:80")
