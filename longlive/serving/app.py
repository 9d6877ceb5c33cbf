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
from longlive.generation.cues import check_prompt
from longlive.miniature.captions import understood
from longlive.miniature.language import is_miniature
from longlive.serving.access import Access, is_local
from longlive.serving.connection import Connection, about_prompt
from longlive.serving.downloads import download
from longlive.serving.messages import Refused
from longlive.serving.metrics import Metrics
from longlive.serving.recorder import recording_of, takes_of, timeline_of
from longlive.serving.scheduler import SessionScheduler

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'self'; media-src 'self' blob:; img-src 'self' blob: data:; connect-src 'self'; style-src 'self'; script-src 'self'; "
    "frame-ancestors 'none'"
)

MAX_BODY_BYTES = 65_536

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

    def check_health(self) -> None:
        """Raises HTTPException (503) when no session can make blocks, which says why."""
        if (failure := self.loaded().failure) is not None:
            raise HTTPException(503, failure)

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
        "prompt_pieces": scheduler.pipe.transformer.config.text_len,
        "words": understood() if is_miniature(scheduler.pipe.tokenizer) else None,
    }


def http_routes(server: Server, access: Access) -> APIRouter:
    """The page and the HTTP interface for programs."""

    async def require_token(request: Request) -> None:
        if (problem := access.token_problem(request.headers.get("authorization"), request.query_params.get("token"))) is not None:
            raise HTTPException(401, problem, {"WWW-Authenticate": "Bearer"})

    routes, needs_token = APIRouter(), [Depends(require_token)]

    @routes.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether sessions can start; 503 while the model is loading."""
        server.check_health()
        return {"status": "ok"}

    @routes.get("/models", dependencies=needs_token)
    async def models() -> list[dict[str, Any]]:
        """The model that is served."""
        server.loaded()
        return [server.model]

    @routes.get("/sessions", dependencies=needs_token)
    async def sessions() -> dict[str, Any]:
        """The running sessions, each with what it has cost, but neither keys nor prompts; how many clients are queued."""
        scheduler = server.loaded()
        running = [session.summary() for session in list(scheduler.sessions.values())]
        return {"max_sessions": scheduler.max_sessions, "queued_clients": scheduler.queue_length, "sessions": running}

    @routes.post("/pieces", dependencies=needs_token)
    async def pieces(request: Request) -> dict[str, Any]:
        """How much of a prompt, the body of the request, the model reads: `pieces`; `notice`: what its author should know, if anything."""
        scheduler, body = server.loaded(), b""
        async for part in request.stream():
            if len(body := body + part) > MAX_BODY_BYTES:
                raise HTTPException(413, f"a prompt has at most {server.config.prompt_chars} characters")
        try:
            check_prompt(text := body.decode())
        except ValueError as error:  # also of the decoding
            raise HTTPException(422, str(error)) from error
        return await asyncio.to_thread(about_prompt, scheduler.pipe, text, few_words=server.model["words"] is not None)

    if access.needs_token:  # otherwise FastAPI has a route of its own

        @routes.get("/openapi.json", dependencies=needs_token, include_in_schema=False)
        async def openapi(request: Request) -> dict[str, Any]:
            return request.app.openapi()

    @routes.get("/metrics", dependencies=needs_token)
    async def metrics() -> Response:
        """Counters, in the format of Prometheus."""
        return Response(server.metrics.text(server.loaded()), media_type="text/plain; version=0.0.4")

    return routes


def file_routes(server: Server) -> APIRouter:
    """What sessions have left on the disk, for whoever has a key of the session. Also of sessions of an earlier run of the server.

    Its functions run in threads: they read files.
    """
    routes = APIRouter()

    def folder_of(request: Request, name: str) -> Path:
        """Where the files are. Raises HTTPException without a key of the session."""
        scheduler, key = server.loaded(), request.headers.get("x-session-key") or request.query_params.get("key")
        if scheduler.keys.role(name, key) is None:
            problem = "the key of the session is wrong" if key else "the key of the session is missing; hello has it"
            raise HTTPException(403, problem)
        return scheduler.folder

    def take_of(folder: Path, name: str, take: int | None) -> int:
        """The take that is asked for, or the last one."""
        takes = takes_of(folder, name)
        if not takes or take not in (None, *takes):
            raise HTTPException(404, f"the session {name} has no such recording; /takes/{name} lists them")
        return takes[-1] if take is None else take

    @routes.get("/takes/{name}")
    def takes(request: Request, name: str) -> list[dict[str, Any]]:
        """The recordings of a session, one for its first video and one for each restart, with the bytes that each has so far."""
        folder = folder_of(request, name)
        files = {take: recording_of(folder, name, take) for take in takes_of(folder, name)}
        return [{"take": take, "bytes": file.stat().st_size if file.is_file() else 0} for take, file in files.items()]

    @routes.get("/timeline/{name}")
    def timeline(request: Request, name: str, take: int | None = None) -> FileResponse:
        """The timeline, from which `interactive_inference.py --timeline FILE` makes the same video again."""
        folder = folder_of(request, name)
        file = timeline_of(folder, name, take_of(folder, name, take))
        if not file.is_file():
            raise HTTPException(404, f"the session {name} has no timeline yet")
        return FileResponse(file, media_type="application/json", filename=file.name)

    @routes.api_route("/recording/{name}.mp4", methods=["GET", "HEAD"])
    def recording(request: Request, name: str, take: int | None = None) -> Response:
        """What has been shown until now, up to the last whole segment; also a part of it (Range)."""
        folder = folder_of(request, name)
        headers = request.headers
        try:
            file = recording_of(folder, name, take_of(folder, name, take))
            parts = {"range_header": headers.get("range"), "if_range": headers.get("if-range")}
            return download(file, **parts, only_headers=request.method == "HEAD")
        except FileNotFoundError as error:
            raise HTTPException(404, f"the session {name} has no recording yet") from error

    return routes


async def serve_live(socket: WebSocket, server: Server, access: Access) -> None:
    """One client, from its connection to its end; refused without a token or key, from another site, and while there is no model."""
    headers, query, host = socket.headers, socket.query_params, socket.headers.get("host")
    problem = access.token_problem(headers.get("authorization"), query.get("token"))
    if not (access.is_own_host(host) and access.is_own_origin(headers.get("origin"), host)):
        await socket.send_denial_response(JSONResponse({"detail": "this host name or page is not the server's own"}, 403))
        return
    has_key = server.scheduler is not None and server.scheduler.keys.role(query.get("session", ""), query.get("key")) is not None
    if problem is not None and not has_key:
        await socket.send_denial_response(JSONResponse({"detail": problem}, 401))
        return
    await socket.accept()
    if server.scheduler is None:
        await socket.send_json(Refused("busy", server.load_error or "the model is loading", fatal=True).to_message())
        await socket.close()
        return
    may_start = problem is None
    await Connection(socket, server.scheduler, server.config, server.metrics, server.model, may_start=may_start).run()


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

    app = FastAPI(
        title="LongLive",
        description="Live interactive video; sessions are on the WebSocket /live.",
        lifespan=lifespan,
        openapi_url=None if access.needs_token else "/openapi.json",  # without it there is no /docs, which loads scripts from other hosts
        redoc_url=None,
    )
    app.state.server = server

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Any]) -> Response:
        if not access.is_own_host(request.headers.get("host")):
            return JSONResponse({"detail": "this host name is not the server's own"}, 421)
        response = await call_next(request)
        if not request.url.path.startswith("/docs"):  # FastAPI's own page loads scripts from other hosts
            response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await serve_live(socket, server, access)

    app.include_router(http_routes(server, access))
    app.include_router(file_routes(server))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app
