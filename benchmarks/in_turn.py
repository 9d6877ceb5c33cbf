"""How much faster is the transformer on a CPU than at another commit, and than the plain way? They make blocks in turn, in one run.

    git worktree add ../before ed2a1c8
    python benchmarks/in_turn.py --before ../before --height 64 --width 64

Each version is a process of its own with one thread, and all make the same video of random weights. A time is the thread's CPU seconds
for a block and a clean pass with a full window, so that other work on the machine counts as little as it can; a ratio is the median over
rounds of that version's seconds over this version's in the same round. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import report

from longlive.models.zoo import ZOO
from longlive.provenance import commit, processor

HERE = Path(__file__).parent
FILLING = 5  # blocks until the window is full and one has been overwritten


class Version:
    """A process that makes a block when it is told to."""

    def __init__(self, way: str, root: Path, shape: list[str], latents: Path) -> None:
        self.way, self.latents, self.seconds = way, latents, list[float]()
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "block_worker.py"), way, *shape, str(latents)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def block(self) -> float:
        """CPU seconds of the next block. Raises RuntimeError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(json.loads(self._process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise RuntimeError(f"the process of {self.way} ended with status {self._process.wait()}") from error

    def finish(self) -> torch.Tensor:
        """End the process; the latents of all of its blocks."""
        self._process.communicate()
        return torch.load(self.latents)


def measure(ways: list[str], before: Path | None, shape: list[str], rounds: int) -> dict[str, Any]:
    """Seconds per block of each way, ratios to "now", and how far its latents are from those of "now"."""
    with tempfile.TemporaryDirectory() as folder:
        roots = {way: before if way == "before" and before is not None else HERE.parent for way in ways}
        versions = [Version(way, root, shape, Path(folder) / way) for way, root in roots.items()]
        for number in range(FILLING + rounds):
            for version in versions:
                seconds = version.block()
                if number >= FILLING:
                    version.seconds.append(seconds)
        latents = {version.way: version.finish() for version in versions}
    now = next(version for version in versions if version.way == "now")
    return {
        version.way: {
            "seconds": statistics.median(version.seconds),
            "least": min(version.seconds),
            "most": max(version.seconds),
            "ratio": statistics.median(a / b for a, b in zip(version.seconds, now.seconds, strict=True)),
            "difference": (latents[version.way] - latents["now"]).abs().max().item(),
        }
        for version in versions
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; prints the table and returns the content of the JSON line."""
    if options.before is not None and not (options.before / "longlive").is_dir():
        raise ValueError(f"{options.before} holds no longlive; give a checkout of another commit")
    ways = ["now", *(["before"] if options.before is not None else []), *filter(None, options.ways.split(","))]
    shape = [options.size, str(options.layers), str(options.height), str(options.width)]
    found = measure(ways, options.before, shape, options.rounds)
    print(f"{options.size}, {options.layers} layers, {options.height} x {options.width}, float32, {options.rounds} rounds, {processor()}")
    print(f"{'':10} {'s per block':>12} {'least':>8} {'most':>8} {'ratio':>7} {'largest difference':>19}")
    for way, row in found.items():
        numbers = f"{row['seconds']:12.3f} {row['least']:8.3f} {row['most']:8.3f} {row['ratio']:7.2f} {row['difference']:19.1e}"
        print(f"{way:10} {numbers}")
    setting = {name: vars(options)[name] for name in ("size", "layers", "height", "width", "rounds")}
    return {**setting, "commit": commit(), "torch": torch.__version__, "machine": f"{processor()}, {platform.machine()}", "ways": found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another commit")
    parser.add_argument("--ways", default="reference", help="what else to measure: reference, int8, fp8, with commas (default %(default)s)")
    parser.add_argument("--size", choices=list(ZOO), default="1.3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--height", type=int, default=64, help="pixels")
    parser.add_argument("--width", type=int, default=64, help="pixels")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    return report(lambda: run(options), options.output)


if __name__ == "__main__":
    sys.exit(main())
