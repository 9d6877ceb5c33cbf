"""`python -m longlive.evaluation measure VIDEO…` and `… score FOLDER`: what can be said of videos without weights, and VBench's totals."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av

from longlive import video
from longlive.evaluation import metrics, vbench_score


def switches_of(path: Path) -> list[int]:
    """Images at which prompts begin, the first aside, from the JSON file that the programs leave beside a video; none without it."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return []
    try:
        return [entry["image"] for entry in json.loads(beside.read_text(encoding="utf-8"))["prompts"][1:]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{beside} does not say when prompts began: {error}") from error


def measure(arguments: argparse.Namespace) -> None:
    """A line of JSON a video."""
    for path in arguments.videos:
        try:
            images, info = video.read_video(path), video.probe(path)
        except (av.FFmpegError, FileNotFoundError, IndexError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a video: {error}") from error
        found = metrics.measure(images, switches=switches_of(path), block=arguments.block, fps=info.fps or 16.0)
        sys.stdout.write(json.dumps({"video": str(path)} | {name: _plain(value) for name, value in found._asdict().items()}) + "\n")


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def score(arguments: argparse.Namespace) -> None:
    """A table; with every dimension there also a line of JSON."""
    results = vbench_score.read_results(arguments.folder)
    sys.stdout.write(vbench_score.table(results, name=arguments.name))
    totals: dict[str, Any] = {name: round(value, 2) for name, value in vbench_score.score(results)._asdict().items()}
    sys.stdout.write(json.dumps(totals | {"dimensions": results}) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive.evaluation", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure", help="flicker, drift, collapse and motion of videos, without weights")
    one.add_argument("videos", nargs="+", type=Path)
    one.add_argument("--block", type=int, default=3, help="latent frames a block (default %(default)s)")
    one.set_defaults(run=measure)
    two = commands.add_parser("score", help="Quality, Semantic and Total of vbench's results in a folder")
    two.add_argument("folder", type=Path)
    two.add_argument("--name", default="this run", help="for the table")
    two.set_defaults(run=score)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
