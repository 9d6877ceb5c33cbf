"""Processes of their own for tests, forked from a server that has imported everything once: a new interpreter takes ten seconds for it."""

import importlib.util
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
IMPORTED = ["longlive.evaluation.commands", "longlive.programs.inference", "longlive.serving.app", "longlive.training.stages"]

assert all(map(importlib.util.find_spec, IMPORTED))  # the server would pass over a module that does not exist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", *IMPORTED])


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A function in a new process, in the current folder; it ends with the tests at the latest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # what the server imports is found from here
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = CONTEXT.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def start_program(name: str, *words: Any, output: Path, stdin: Path | None = None, environment: dict[str, str] | None = None):
    """`python name words …` for a file of the repository, `python -m name words …` for a module; what it says is added to `output`.

    `stdin`: a named pipe or a file to read from.
    """
    return start(_run_program, name, list(map(str, words)), output, stdin, environment or {})


def start_on_terminal(name: str, words: Sequence[str], terminal: int) -> ForkServerProcess:
    """`python name words …` whose input, output and messages are a terminal."""
    return start(_run_on_terminal, name, list(words), DupFd(terminal))


def _run_on_terminal(name: str, words: Sequence[str], terminal: Any) -> None:
    descriptor = terminal.detach()
    os.setsid()
    for stream in (0, 1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["TERM"] = "xterm-256color"
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(stream, mode, buffering=1) for stream, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.argv = [name, *words]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def _run_program(name: str, words: Sequence[str], output: Path, stdin: Path | None, environment: dict[str, str]) -> None:
    _set_up(output, environment)
    if stdin is not None:
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
    sys.argv = [name, *words]
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def run_ranks(target: Callable[..., None], *arguments: Any, size: int = 2) -> None:
    """`target(*arguments)` in processes that are ranks of one world; raises AssertionError, with what they said, when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        ranks = [start(_run_rank, target, arguments, said, environment) for environment in rank_environments(size)]
        for rank in ranks:
            rank.join(300)
        assert [rank.exitcode for rank in ranks] == [0] * size, said.read_text()


def rank_environments(size: int) -> list[dict[str, str]]:
    """What torchrun tells the ranks of one world."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _run_rank(target: Callable[..., None], arguments: Sequence[Any], output: Path, environment: dict[str, str]) -> None:
    _set_up(output, environment)
    target(*arguments)


def _set_up(output: Path, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
    os.environ |= environment
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
