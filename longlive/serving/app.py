"""The server's routes: the page, what programs ask over HTTP, and the WebSocket of a session."""

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

from fastapi import Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from longlive.config import ServeConfig
from longlive.serving.access import Access, is_local
from longlive.serving.connection import Connection
from longlive.serving.hub import Hub
from longlive.serving.metrics import Metrics

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; connect-src 'self'; style-src 'self'; script-src 'self'; "
    "frame-ancestors 'none'"
)
OPEN = ("/", "/health", "/static/")

log = logging.getLogger(__name__)


@dataclass
class Server:
    """What the routes share: settings, and the hub once the model is loaded."""

    config: ServeConfig
    token: str | None
    hub: Hub | None = None
    model: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    began: float = field(default_factory=time.monotonic)

    @property
    def ready(self) -> Hub:
        """Raises HTTPException (503) while the model is loaded, or when it could not be."""
        if self.hub is None:
            raise HTTPException(503, self.failed or "loading")
        return self.hub


def token_for(config: ServeConfig) -> str | None:
    """The token that clients must know: the one that is set, or one drawn for this run; None when only this machine gets through."""
    if config.token is not None:
        return config.token
    return None if is_local(config.host) else secrets.token_urlsafe(16)


def model_name(config: ServeConfig) -> str:
    """What the model is called."""
    return config.video.model or config.video.wan_dir or "miniature"


def describe(hub: Hub, name: str) -> dict[str, Any]:
    """What is said of the model."""
    info = hub.pipe.info
    return {
        "name": name,
        "height": hub.height,
        "width": hub.width,
        "scale": hub.scale,
        "images_per_chunk": info.block * info.temporal_stride,
        "sessions": hub.most,
        **info._asdict(),
    } | {"height": hub.height, "width": hub.width}


def create_app(config: ServeConfig, load: Callable[[Metrics], Hub], *, token: str | None, address: str) -> FastAPI:
    """The application. `load` makes the hub, in a thread of its own while `/health` says that it is loading; then people are told to open
    `address`."""
    server = Server(config, token)
    access = Access(token, host=config.host)

    async def loading() -> None:
        try:
            hub = await asyncio.to_thread(load, server.metrics)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            server.failed = f"the model could not be loaded: {error}"
            log.error("error: %s", server.failed)
            return
        server.model = describe(hub, model_name(config))
        hub.start()
        server.hub = hub
        log.info("ready after %.1f s, up to %d sessions at a time: %s", time.monotonic() - server.began, hub.most, address)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(loading())
        yield
        await task
        if server.hub is not None:
            await asyncio.to_thread(server.hub.stop)

    async def allowed(request: Request) -> None:
        if not access.knows_token(request.headers.get("authorization"), request.query_params.get("token")):
            raise HTTPException(401, "the token is missing or wrong; the server printed it when it began")

    app = FastAPI(title="LongLive", description="Live interactive video; sessions are on the WebSocket /live.", lifespan=lifespan)
    app.state.server = server
    needs_token = [Depends(allowed)]

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Any]) -> Response:
        if not access.right_host(request.headers.get("host")):
            return JSONResponse({"detail": "this address is not the server's own"}, 421)
        response = await call_next(request)
        if not request.url.path.startswith(("/docs", "/redoc", "/openapi")):  # FastAPI's own pages load scripts from elsewhere
            response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether sessions can begin; 503 while the model is loaded."""
        _ = server.ready
        return {"status": "ok"}

    @app.get("/models", dependencies=needs_token)
    async def models() -> list[dict[str, Any]]:
        """The model that is served."""
        _ = server.ready
        return [server.model]

    @app.get("/sessions", dependencies=needs_token)
    async def sessions() -> dict[str, Any]:
        """Sessions that run, each with what it has cost, and how many clients wait for room."""
        hub = server.ready
        return {"most": hub.most, "waiting": hub.num_waiting, "sessions": [live.about() for live in list(hub.sessions.values())]}

    @app.get("/timeline/{name}", dependencies=needs_token)
    async def timeline(name: str) -> FileResponse:
        """What makes the same video again: `interactive_inference.py --timeline FILE`."""
        live = server.ready.known(name)
        if live is None or not live.timeline_file.is_file():
            raise HTTPException(404, f"there is no timeline of a session {name}")
        return FileResponse(live.timeline_file, media_type="application/json", filename=live.timeline_file.name)

    @app.get("/recording/{name}.mp4", dependencies=needs_token)
    async def recording(name: str) -> FileResponse:
        """What has been shown so far."""
        live = server.ready.known(name)
        if live is None or not live.recording.is_file():
            raise HTTPException(404, f"there is no recording of a session {name}")
        return FileResponse(live.recording, media_type="video/mp4", filename=live.recording.name)

    @app.get("/metrics", dependencies=needs_token)
    async def metrics() -> Response:
        """Prometheus."""
        return Response(server.metrics.text(server.ready), media_type="text/plain; version=0.0.4")

    @app.websocket("/live")
    async def live(socket: WebSocket) -> None:
        headers, host = socket.headers, socket.headers.get("host")
        known = access.knows_token(headers.get("authorization"), socket.query_params.get("token"))
        if not (known and access.right_host(host) and access.right_origin(headers.get("origin"), host)):
            await socket.close(1008)
            return
        await socket.accept()
        if server.hub is None:
            await socket.send_json({"type": "error", "code": "busy", "message": server.failed or "the model is loading", "fatal": True})
            await socket.close()
            return
        await Connection(socket, server.hub, config, server.metrics, server.model).run()

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app
