"""`python -m longlive.serving`: type prompts into a running video, in the browser."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from longlive.config import ServeConfig
from longlive.files import check_writable
from longlive.parallel.world import choose_device, configure_logging, free_memory, get_world
from longlive.programs import loading
from longlive.programs.configs import find_config
from longlive.serving.app import create_app, model_name, token_for
from longlive.serving.keys import Keys
from longlive.serving.metrics import Metrics
from longlive.serving.scheduler import SessionScheduler
from longlive.settings import described, load

FLAGS = ("host", "port", "token", "max_sessions", "output")
DEFAULT_MAX_SESSIONS = 8
MAX_MESSAGE_BYTES = 65_536  # a client that sends a longer message loses its connection

log = logging.getLogger("longlive.serving")  # this module's own name is __main__


def parse(argv: Sequence[str] | None, *, prog: str | None = None) -> ServeConfig:
    """Settings from the command line: flags, `key=value` words, and the YAML file that `--config` names."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m longlive.serving",
        description=__doc__,
        epilog=described(ServeConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="settings that differ from the defaults (without it: the miniature)")
    parser.add_argument("--model", help="the same as video.model=…: a folder in diffusers layout, or miniature")
    parser.add_argument("--device", help="the same as video.device=…")
    for name in FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=name.upper(), help=f"the same as {name}=…")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any of the settings below")
    arguments = vars(parser.parse_intermixed_args(argv))
    flags: dict[str, Any] = {name: arguments[name] for name in FLAGS if arguments[name] is not None}
    words = [f"video.{name}={arguments[name]}" for name in ("model", "device") if arguments[name] is not None]
    return load(ServeConfig, arguments["config"] and find_config(arguments["config"]), [*words, *arguments["settings"]], flags)


def load_scheduler(config: ServeConfig, metrics: Metrics) -> SessionScheduler:
    """Load the model and find out how many sessions fit into memory. Raises ValueError when none does."""
    device = choose_device(config.video.device, get_world())
    pipe = loading.load_pipeline(config.video, device)
    config = dataclasses.replace(config, video=loading.fit_into_memory(config.video, pipe, device))
    loading.use_positions(pipe, relative=loading.relative_positions(config.video, pipe, None))
    height, width = loading.video_size(config.video, pipe)
    loading.move_to_device(config.video, pipe, device)
    decoders = 1 if device.type != "cpu" else DEFAULT_MAX_SESSIONS  # on a GPU one at work fills it, and needs more memory than a session
    per_session, once = pipe.session_bytes(height, width), pipe.transient_bytes(height, width, decoders=decoders)
    free = free_memory(device) - once
    fit = int(0.8 * free // per_session)
    if fit < 1:
        wanted = f"{per_session / 2**30:.2f} GiB on {device}, beside {once / 2**30:.2f} GiB for all sessions together"
        raise ValueError(f"a session needs about {wanted}; {(free + once) / 2**30:.2f} GiB are free")
    words = "%s on %s: %.1f MiB per session and %.1f MiB for all together, %d fit"
    log.info(words, model_name(config), device, per_session / 2**20, once / 2**20, fit)
    loading.warm_up(config.video, pipe)
    return SessionScheduler(
        pipe,
        folder=Path(config.output),
        max_sessions=min(fit, config.max_sessions or DEFAULT_MAX_SESSIONS),
        height=height,
        width=width,
        scale=config.scale or loading.pixel_scale(config.video, height, width),
        idle_seconds=60 * config.idle_minutes,
        realtime=config.realtime,
        decoders=decoders,
        observe=metrics.observe,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ValueError when it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OverflowError):
            raise ValueError(f"port {port} is no port; choose --port from 0 to 65535") from error
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or --host") from error
    return bound


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    configure_logging(get_world())
    loading.quiet_libraries()
    try:
        config = parse(argv, prog=prog)
    except (ValueError, FileNotFoundError) as error:
        log.error("error: %s", error)
        return 2
    return serve(config)


def serve(config: ServeConfig) -> int:
    """Serve until Ctrl-C; returns the exit status."""
    try:
        check_writable(config.output)
        Keys(Path(config.output))  # raises when they cannot be kept there
        bound = listen(config.host, config.port)
    except (ValueError, FileNotFoundError) as error:
        log.error("error: %s", error)
        return 2
    token = token_for(config)
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'?token={token}' if token else ''}"
    log.info("open %s (the model is loading)", address)
    if config.open_page:
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()  # the page waits for the model
    app = create_app(config, lambda metrics: load_scheduler(config, metrics), token=token, address=address)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_ping_interval=20.0,
            ws_per_message_deflate=False,  # video is compressed already, and this would be done for one client while the others wait
            timeout_graceful_shutdown=10,
        )
    )
    try:
        server.run(sockets=[bound])
    except KeyboardInterrupt:
        return 130
    finally:  # also when a second Ctrl-C interrupts the server's own shutdown
        if (scheduler := app.state.server.scheduler) is not None:
            scheduler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
