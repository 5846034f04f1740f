"""Errors in OpenAI's shape, which three of the dialects share."""

from __future__ import annotations

from rl.gateway.dialects.reading import event
from rl.gateway.types import GatewayError, Json

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error: GatewayError) -> Json:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    kind = _KINDS.get(error.status, kind)
    inner = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": inner}


class OpenAIErrors:
    """Base of dialects: not for their own logic, which no two share."""

    ping = b": still working\n\n"

    def error(self, error: GatewayError) -> Json:
        return error_body(error)

    def late_error(self, error: GatewayError) -> bytes:
        """An error after the answer has begun."""
        return event(error_body(error))
