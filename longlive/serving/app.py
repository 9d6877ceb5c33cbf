"""The server's routes: the page, the HTTP interface for programs, and the WebSocket of a session."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from longlive.config import ServeConfig
from longlive.miniature.captions import understood
from longlive.miniature.language import is_miniature
from longlive.serving.access import Access, is_local
from longlive.serving.connection import Connection
from longlive.serving.messages import Refused
from longlive.serving.metrics import Metrics
from longlive.serving.scheduler import SessionScheduler

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; connect-src 'self'; style-src 'self'; script-src 'self'; "
    "frame-ancestors 'none'"
)

log = logging.getLogger(__name__)


@dataclass
class Server:
    """What the routes share; `scheduler` and `model`, its description, once the model is loaded."""

    config: ServeConfig
    token: str | None
    scheduler: SessionScheduler | None = None
    model: dict[str, Any] = field(default_factory=dict)
    load_error: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    started_at: float = field(default_factory=time.monotonic)

    def loaded(self) -> SessionScheduler:
        """The scheduler. Raises HTTPException (503) while the model is loading, or when that failed."""
        if self.scheduler is None:
            raise HTTPException(503, self.load_error or "loading")
        return self.scheduler

    async def load(self, load: Callable[[Metrics], SessionScheduler], address: str) -> None:
        """Load the model in another thread, and start its scheduler."""
        try:
            scheduler = await asyncio.to_thread(load, self.metrics)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            self.load_error = f"the model could not be loaded: {error}"
            log.error("error: %s", self.load_error)
            return
        self.model = describe(scheduler, model_name(self.config))
        scheduler.start()
        self.scheduler = scheduler
        seconds = time.monotonic() - self.started_at
        log.info("ready after %.1f s, up to %d sessions at a time: %s", seconds, scheduler.max_sessions, address)


def token_for(config: ServeConfig) -> str | None:
    """The token that clients must present: the configured one, or a random one; None when only this machine can reach the server."""
    if config.token is not None:
        return config.token
    return None if is_local(config.host) else secrets.token_urlsafe(16)


def model_name(config: ServeConfig) -> str:
    """The name of the model that is served."""
    return config.video.model or config.video.wan_dir or "miniature"


def describe(scheduler: SessionScheduler, name: str) -> dict[str, Any]:
    """The description of the model that clients get."""
    info = scheduler.pipe.info
    return {
        **info._asdict(),
        "name": name,
        "height": scheduler.height,
        "width": scheduler.width,
        "scale": scheduler.scale,
        "frames_per_segment": info.block * info.temporal_stride,
        "max_sessions": scheduler.max_sessions,
        "words": understood() if is_miniature(scheduler.pipe.tokenizer) else None,
    }


def http_routes(server: Server, access: Access) -> APIRouter:
    """The page and the HTTP interface for programs."""

    async def require_token(request: Request) -> None:
        if not access.has_token(request.headers.get("authorization"), request.query_params.get("token")):
            raise HTTPException(401, "the token is missing or wrong; the server printed it when it started")

    routes, needs_token = APIRouter(), [Depends(require_token)]

    @routes.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether sessions can start; 503 while the model is loading."""
        server.loaded()
        return {"status": "ok"}

    @routes.get("/models", dependencies=needs_token)
    async def models() -> list[dict[str, Any]]:
        """The model that is served."""
        server.loaded()
        return [server.model]

    @routes.get("/sessions", dependencies=needs_token)
    async def sessions() -> dict[str, Any]:
        """The running sessions, each with what it has cost, and how many clients are queued."""
        scheduler = server.loaded()
        running = [session.summary() for session in list(scheduler.sessions.values())]
        return {"max_sessions": scheduler.max_sessions, "queued_clients": scheduler.queue_length, "sessions": running}

    @routes.get("/timeline/{name}", dependencies=needs_token)
    async def timeline(name: str) -> FileResponse:
        """The timeline, from which `interactive_inference.py --timeline FILE` makes the same video again."""
        files = server.loaded().files_of(name)
        if files is None or not files.timeline_file.is_file():
            raise HTTPException(404, f"there is no timeline of a session {name}")
        return FileResponse(files.timeline_file, media_type="application/json", filename=files.timeline_file.name)

    @routes.get("/recording/{name}.mp4", dependencies=needs_token)
    async def recording(name: str) -> FileResponse:
        """The video so far."""
        files = server.loaded().files_of(name)
        if files is None or not files.recording.is_file():
            raise HTTPException(404, f"there is no recording of a session {name}")
        return FileResponse(files.recording, media_type="video/mp4", filename=files.recording.name)

    @routes.get("/metrics", dependencies=needs_token)
    async def metrics() -> Response:
        """Counters, in the format of Prometheus."""
        return Response(server.metrics.text(server.loaded()), media_type="text/plain; version=0.0.4")

    return routes


async def serve_live(socket: WebSocket, server: Server, access: Access) -> None:
    """One client, from its connection to its end; refused without the token, from another site, and while there is no model."""
    headers, host = socket.headers, socket.headers.get("host")
    has_token = access.has_token(headers.get("authorization"), socket.query_params.get("token"))
    if not (has_token and access.is_own_host(host) and access.is_own_origin(headers.get("origin"), host)):
        await socket.close(1008)
        return
    await socket.accept()
    if server.scheduler is None:
        await socket.send_json(Refused("busy", server.load_error or "the model is loading", fatal=True).to_message())
        await socket.close()
        return
    await Connection(socket, server.scheduler, server.config, server.metrics, server.model).run()


def create_app(config: ServeConfig, load: Callable[[Metrics], SessionScheduler], *, token: str | None, address: str) -> FastAPI:
    """The application.

    Args:
        load: loads the model; runs in another thread, while `/health` answers that the model is loading.
        address: where the page can be opened, for the log.
    """
    server, access = Server(config, token), Access(token, host=config.host)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(server.load(load, address))
        yield
        await task
        if server.scheduler is not None:
            await asyncio.to_thread(server.scheduler.stop)

    app = FastAPI(title="LongLive", description="Live interactive video; sessions are on the WebSocket /live.", lifespan=lifespan)
    app.state.server = server

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Any]) -> Response:
        if not access.is_own_host(request.headers.get("host")):
            return JSONResponse({"detail": "this host name is not the server's own"}, 421)
        response = await call_next(request)
        if not request.url.path.startswith(("/docs", "/redoc", "/openapi")):  # FastAPI's own pages load scripts from other hosts
            response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await serve_live(socket, server, access)

    app.include_router(http_routes(server, access))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app
