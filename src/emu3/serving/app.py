"""The app: its routes, its guard, and the worker that lives with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from emu3 import __version__
from emu3.options import Serve
from emu3.serving import browser, completions, images, live, videos
from emu3.serving.errors import Refused, on_error
from emu3.serving.guard import Guard
from emu3.serving.jobs import Draining, QueueFull
from emu3.serving.service import Service, service_of

if TYPE_CHECKING:
    from emu3.pipeline import Emu3Pipeline

router = APIRouter()


@router.get("/v1/models", tags=["server"])
@router.get("/models", tags=["server"])
async def models(request: Request) -> dict[str, Any]:
    """The model that is loaded."""
    service = service_of(request)
    model = {"id": service.name, "object": "model", "created": service.began, "owned_by": "emu3"}
    return {"object": "list", "data": [model]}


@router.get("/v1/models/{name:path}", tags=["server"])
async def model(request: Request, name: str) -> dict[str, Any]:
    """The model that is loaded, under any name."""
    return cast(dict[str, Any], (await models(request))["data"][0])


@router.head("/health", include_in_schema=False)
@router.get("/health", tags=["server"])
async def health(request: Request) -> Response:
    """Whether the server lives."""
    alive = service_of(request).worker.alive
    return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)


@router.get("/ready", tags=["server"])
async def ready(request: Request) -> Response:
    """Whether it takes new work."""
    worker = service_of(request).worker
    takes = worker.alive and not worker.draining
    return JSONResponse({"status": "ready" if takes else "stopping"}, 200 if takes else 503)


@router.get("/metrics", tags=["server"])
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return PlainTextResponse(service_of(request).worker.metrics.text(), media_type="text/plain; version=0.0.4")


def create_app(pipeline: Emu3Pipeline, name: str, serve: Serve | None = None) -> FastAPI:
    """The server as an ASGI app. It works from its start-up on, until its shut-down.

    Args:
        pipeline: that draws and answers.
        name: under which clients see the model.
        serve: limits, and who may use it.
    """
    serve = serve or Serve()
    service = Service(pipeline, name, serve)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(title="emu3", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for each in (router, images.router, videos.router, completions.router, live.router, browser.router):
        app.include_router(each)
    for kind in (Refused, QueueFull, Draining, ValueError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, on_error)
    app.add_middleware(
        Guard,
        key=serve.api_key,
        hosts=serve.names("allow_host"),
        origins=serve.names("allow_origin"),
    )
    return app
