"""MLE-bench's validation server: is this file a submission that can be graded, yes or no.

``POST /validate`` with a form field ``file``, ``GET /health``. The real grader runs, in another
process that does not even report the score, and its error text is passed on: that text may say
something of the answers, as it may in MLE-bench, so whoever writes a grader keeps them out of it.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench.folders import FolderCompetition
from agent_tools.mle_bench.grade_process import (
    GRADE_SECONDS,
    SIZE_A_BYTE,
    SIZE_FREE,
    Scored,
    score_submission,
)

VALID = "Submission is valid."
INVALID = "Submission invalid!"
FORM_BYTES = 64 << 10  # what a form may have around its file
HEADER_END = b"\r\n\r\n"


def make_app(competition: FolderCompetition, *, timeout: float = GRADE_SECONDS) -> FastAPI:
    """The server of one prepared competition; `UserError` if it is not prepared."""
    competition.require_prepared()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = asyncio.Lock()
    limit = SIZE_FREE + SIZE_A_BYTE * competition.answers.stat().st_size + FORM_BYTES

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "running"}

    @app.post("/validate")
    async def validate(request: Request) -> JSONResponse:
        with tempfile.TemporaryDirectory(prefix="validate-") as scratch:
            path = Path(scratch) / "submission.csv"
            with (Path(scratch) / "form").open("w+b") as form:
                if not await _receive(request, form, limit):
                    message = f"{INVALID} The file has more than {limit:,} bytes."
                    return JSONResponse({"result": message})
                if not extract_file(form, request.headers.get("content-type", ""), path):
                    told = "send a multipart form with a field `file`"
                    return JSONResponse({"error": "no file", "details": told}, status_code=400)
            try:
                async with one_at_a_time:
                    scored = await asyncio.to_thread(
                        score_submission, competition.spec, path, tell_score=False, timeout=timeout
                    )
            except (UserError, InfraError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                told = "the grader does not work: tell whoever runs the server"
                return JSONResponse(
                    {"error": "An unexpected error occurred.", "details": told}, status_code=500
                )
        return JSONResponse({"result": verdict(scored)})

    return app


def verdict(scored: Scored) -> str:
    """The reply's text: valid, or the grader's error; never a score."""
    if scored.score is not None:
        return VALID
    return f"{INVALID} The attempt to grade it gave this error:\n{scored.error}"


def serve(
    competition: FolderCompetition, *, host: str = "127.0.0.1", port: int = 5000
) -> None:  # pragma: no cover - blocks; tests run it as a process
    """Serve until interrupted; prints the address. Port 0 takes a free one.

    Raises `UserError` if the port is taken.
    """
    app = make_app(competition)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be used ({error.strerror}): choose another --port"
        ) from None
    print(f"validating {competition.id} at http://{host}:{listener.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listener])


async def _receive(request: Request, form: IO[bytes], limit: int) -> bool:
    """Write the body to ``form``; False as soon as it is larger than ``limit`` bytes."""
    size = 0
    async for block in request.stream():
        size += len(block)
        if size > limit:
            return False
        form.write(block)
    form.flush()
    return True


def extract_file(form: IO[bytes], content_type: str, path: Path) -> bool:
    """Copy the field ``file`` of a multipart body to ``path``; False if there is none.

    The body stays on disk: a part ends at the next boundary, which a sender chooses so that it
    does not occur in the file.
    """
    _, found, rest = content_type.partition("boundary=")
    boundary = rest.partition(";")[0].strip().strip('"').encode("latin-1", "replace")
    form.seek(0, 2)
    if not found or not boundary or not form.tell():
        return False
    with mmap.mmap(form.fileno(), 0, access=mmap.ACCESS_READ) as body:
        at = body.find(b"--" + boundary)
        while at >= 0:
            head_end = body.find(HEADER_END, at)
            if head_end < 0:
                return False
            start = head_end + len(HEADER_END)
            end = body.find(b"\r\n--" + boundary, head_end + 2)
            if end < 0:
                return False
            if _is_file_field(body[at:head_end]):
                path.write_bytes(body[start : max(start, end)])
                return True
            at = end + 2
    return False


def _is_file_field(head: bytes) -> bool:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            parts: Any = (part.strip() for part in value.split(";"))
            return any(part in ('name="file"', "name=file") for part in parts)
    return False
