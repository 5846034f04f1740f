"""The one way out of a container: a socket in a folder that is shown there, and what answers on it.

GET  /health       "ok"
POST /validate     form field `file`: whether it could be graded, never a score
*    /v1/…         passed on to the model's endpoint, with its key; nothing else is reachable
"""

from __future__ import annotations

import email.parser
import email.policy
import http.client
import json
import shutil
import socketserver
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agent_tools.errors import UserError
from agent_tools.paths import repo_root

_MOST_BODY = 72 << 20
_MODEL_LIMIT_S = 1200.0
_VALIDATE_LIMIT_S = 300.0

Validate = Callable[[bytes], str]


class Bridge:
    """Serves on `folder / "s"` for a `with` block; counts calls and tokens of the model.

    validate     bytes of a submission → what the agent is told
    base_url     the model's endpoint, or None: then /v1 answers 503
    """

    def __init__(self, validate: Validate, base_url: str | None, api_key: str = "none") -> None:
        self.validate = validate
        self.api_key = api_key
        self.target = urllib.parse.urlsplit(base_url) if base_url else None
        if self.target is not None and self.target.scheme not in ("http", "https"):
            raise UserError(f"--base-url {base_url!r}: give a URL such as http://127.0.0.1:8000/v1")
        self.calls = 0
        self.tokens = 0
        self.failed = False  # whether the endpoint was away, or at fault, at the last request
        self._lock = threading.Lock()
        self.folder = Path(tempfile.mkdtemp(prefix="mle-"))  # short: a socket's path is limited
        self.folder.chmod(0o755)

    def __enter__(self) -> Self:
        path = self.folder / "s"
        self._server = _Server(str(path), _Handler)
        self._server.bridge = self
        path.chmod(0o666)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def count(self, body: bytes) -> None:
        """Add one call and the tokens that a reply reports."""
        try:
            usage = json.loads(body).get("usage") or {}
            tokens = int(usage.get("total_tokens") or 0)
        except (ValueError, AttributeError, TypeError):
            tokens = 0
        with self._lock:
            self.calls += 1
            self.tokens += tokens


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    bridge: Bridge


class _Handler(BaseHTTPRequestHandler):
    """One request of the agent: untrusted."""

    timeout = 300

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, b"ok\n")
        else:
            self._forward(b"")

    def do_POST(self) -> None:
        try:
            size = int(self.headers.get("Content-Length") or 0)
        except ValueError:
            size = -1
        if not 0 <= size <= _MOST_BODY:
            self._answer(413, f"at most {_MOST_BODY >> 20} MiB\n".encode())
            return
        body = self.rfile.read(size)
        if self.path == "/validate":
            self._validate(body)
        else:
            self._forward(body)

    def _validate(self, body: bytes) -> None:
        data = form_file(self.headers.get("Content-Type", ""), body)
        if data is None:
            self._answer(400, b"send the file as the form field `file`\n")
        else:
            self._answer(200, self._bridge.validate(data).encode() + b"\n")

    def _forward(self, body: bytes) -> None:
        target = self._bridge.target
        if not self.path.startswith("/v1/") or ".." in self.path or "%" in self.path:
            self._answer(404, b"no such place\n")
            return
        if target is None:
            self._answer(503, b"no model here\n")
            return
        port = target.port or (443 if target.scheme == "https" else 80)
        kind = (
            http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        )
        line = kind(str(target.hostname), port, timeout=_MODEL_LIMIT_S)
        headers = {"Authorization": f"Bearer {self._bridge.api_key}"}
        if body:
            headers["Content-Type"] = self.headers.get("Content-Type") or "application/json"
        path = target.path.removesuffix("/").removesuffix("/v1") + self.path
        try:
            line.request(self.command, path, body or None, headers)
            reply = line.getresponse()
            data = reply.read()
        except (OSError, http.client.HTTPException) as error:
            self._bridge.failed = True
            self._answer(502, f"the model did not answer: {type(error).__name__}\n".encode())
            return
        finally:
            line.close()
        self._bridge.failed = reply.status >= 500
        if self.command == "POST":
            self._bridge.count(data)
        self._answer(reply.status, data, reply.getheader("Content-Type") or "application/json")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def address_string(self) -> str:
        return "agent"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what the agent sends is not ours to print."""

    @property
    def _bridge(self) -> Bridge:
        server: Any = self.server
        bridge: Bridge = server.bridge
        return bridge


def form_file(content_type: str, body: bytes) -> bytes | None:
    """The form field `file` of a multipart body, or None."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1", "replace")
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    if not message.is_multipart():
        return None
    for part in message.iter_parts():
        if part.get_param("name", header="content-disposition") == "file":
            data = part.get_payload(decode=True)
            return data if isinstance(data, bytes) else None
    return None


def validate_elsewhere(competition: str, suite: str, data_dir: Path | None) -> Validate:
    """Validation by the real grader in a child process; the reply holds no score."""

    def validate(data: bytes) -> str:
        argv = [sys.executable, "-m", "agent_tools.mle_agent", "validate"]
        argv += ["--suite", suite, "--competition", competition]
        if data_dir is not None:
            argv += ["--data-dir", str(data_dir)]
        try:
            done = subprocess.run(
                argv, input=data, capture_output=True, timeout=_VALIDATE_LIMIT_S, cwd=repo_root()
            )
        except subprocess.TimeoutExpired:
            return "The validation took too long; try again."
        if done.returncode not in (0, 1):
            return "The validation failed; this says nothing about the file."
        return done.stdout.decode("utf-8", "replace").strip()

    return validate
