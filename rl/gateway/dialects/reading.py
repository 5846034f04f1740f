"""Fields of a request: the value, or an error that says what was expected."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson

from rl.gateway.types import GatewayError, Json, refused


def text(body: Json, name: str, default: str = "") -> str:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise refused(name, "expected text")
    return value


def flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise refused(name, "expected true or false")
    return bool(value)


def count(body: Json, *names: str) -> int | None:
    """The first of several fields that is there: a whole number from 1 on."""
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise refused(name, "expected a whole number from 1 on")
        return value
    return None


def objects(body: Json, name: str, *, least: int = 0) -> list[Json]:
    """A list of JSON objects; absent is empty."""
    value = body.get(name)
    if value is None:
        value = []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise refused(name, "expected a list of objects")
    if len(value) < least:
        raise refused(name, "expected at least one object")
    return value


def stops(body: Json, name: str) -> tuple[str, ...]:
    value = body.get(name)
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise refused(name, "expected a text or a list of texts")
    return tuple(item for item in found if item)


def parse(raw: bytes) -> Json:
    """The body of a request."""
    try:
        body: Any = orjson.loads(raw)
    except ValueError as error:
        raise GatewayError(400, f"the body is not JSON: {error}", "invalid_body") from error
    if not isinstance(body, dict):
        raise GatewayError(400, "the body must be a JSON object", "invalid_body")
    return body


def dumps(body: Any) -> bytes:
    """JSON; a number that is none becomes null."""
    try:
        return orjson.dumps(body)
    except TypeError:  # a number above 64 bits, or half a surrogate pair, in a call's arguments
        return json.dumps(body).encode()


def event(body: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return head + b"data: " + dumps(body) + b"\n\n"


def pieces(whole: str, size: int = 512) -> Iterable[str]:
    """A text in parts, for events."""
    return (whole[at : at + size] for at in range(0, len(whole), size))
