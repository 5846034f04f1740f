"""Routes that hold a server and give it other weights, for whoever trains what it serves.

POST /pause, POST /load, POST /resume, GET /is_paused. They trust whoever can reach them: off unless
asked for, and on a loopback address only. What was asked for happens, though its client may leave.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from pydantic import BaseModel, ConfigDict, Field

from model.batching import BatcherClosedError, PauseMode, ResumedError
from model.serve_types import Json
from model.service import Service, failure


class PauseBody(BaseModel):
    """Body of POST /pause."""

    model_config = ConfigDict(extra="forbid")

    mode: PauseMode = "abort"


class LoadBody(BaseModel):
    """Body of POST /load: a checkpoint's folder, and the version that its tokens carry."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1)
    version: int = Field(ge=0, strict=True)


def add_control(app: FastAPI, service: Service) -> None:
    """Add the routes to a server's application."""
    batcher = service.batcher
    one_load = asyncio.Lock()  # loads take effect in the order in which they came

    def state() -> Json:
        running, waiting = batcher.counts
        mode = batcher.paused
        return {
            "is_paused": mode is not None,
            "mode": mode,
            "running": running,
            "waiting": waiting,
            "version": batcher.version,
        }

    @app.post("/pause")
    async def pause(
        body: PauseBody | None = None, mode: Annotated[PauseMode | None, Query()] = None
    ) -> Json:
        wanted = body.mode if body is not None else mode or "abort"
        try:
            await asyncio.wrap_future(batcher.pause(wanted))
        except (BatcherClosedError, ResumedError) as error:
            raise failure(error) from error
        return {"status": "paused"} | state()

    @app.post("/resume")
    async def resume() -> Json:
        batcher.resume()
        return {"status": "resumed"} | state()

    @app.get("/is_paused")
    async def is_paused() -> Json:
        return state()

    @app.post("/load")
    async def load(body: LoadBody) -> Json:
        async with one_load:
            seconds = await service.load(Path(body.path), body.version)
        return {
            "status": "loaded",
            "path": body.path,
            "version": body.version,
            "seconds": round(seconds, 4),
        }
