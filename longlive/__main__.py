"""The program `longlive`: `longlive COMMAND --help` lists what a command can be told.

generate   makes videos from prompts
live       makes a video whose prompt changes while you watch and type
serve      serves live sessions to browsers
train      trains a stage
evaluate   measures a model: VBench, and what needs no weights
convert    converts weights between layouts
doctor     says what this machine can run, and what is missing
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import longlive

COMMANDS = {  # the module whose `main` is the command; imported only when it is wanted, since torch takes seconds
    "generate": "longlive.programs.generate",
    "live": "longlive.live",
    "serve": "longlive.serving.__main__",
    "train": "longlive.training.__main__",
    "evaluate": "longlive.evaluation.__main__",
    "convert": "longlive.convert",
    "doctor": "longlive.doctor",
}


def run(command: str, words: Sequence[str], *, prog: str) -> int:
    """Run a command; returns its exit status. Ctrl-C ends it quietly at any time, and so does a reader that wants no more output."""
    try:
        status = import_module(COMMANDS[command]).main(words, prog=prog)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python writes at its end goes nowhere
        return 141


def main(words: Sequence[str] | None = None) -> int:
    command, *rest = [*(sys.argv[1:] if words is None else words)] or ["--help"]
    if command in COMMANDS:
        return run(command, rest, prog=f"longlive {command}")
    if command in ("--help", "-h", "help"):
        print(__doc__.strip())
        return 0
    if command == "--version":
        print(longlive.__version__)
        return 0
    print(f"error: longlive has no command {command!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
