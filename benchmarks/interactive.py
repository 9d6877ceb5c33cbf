"""Latency and speed of live sessions, as their users see them.

    python benchmarks/interactive.py [--clients N] [--minutes M] [arguments of the server]

Starts the server, and clients that play like a browser: a segment is shown once it has arrived and the one before has been played.
Prints a table and one line of JSON: time from a prompt until it is shown, by part; time to the first image; images per second; memory of
the server over time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import websockets

ROOT = Path(__file__).parents[1]
PROMPTS = (
    "a red circle moving right on a black background",
    "a blue square moving up on a white background",
    "a yellow triangle moving left on a gray background",
    "a green ring standing still on a pink background",
)
PARTS = ("wait", "text", "switch", "denoise", "decode", "encode", "shown late")


@dataclass
class Player:
    """One client. `played_at`: when the newest segment will have been played."""

    number: int
    began: float = 0.0
    first: float | None = None
    played_at: float = 0.0
    frames: int = 0
    stalls: int = 0
    switches: list[dict[str, float]] = field(default_factory=list)
    requested: tuple[str, float] | None = None  # prompt that is not shown yet, and when it was sent

    def play(self, segment: dict[str, Any], now: float) -> float:
        """Play a segment that has arrived; returns the seconds left to play."""
        if self.first is None:
            self.first = now - self.began
        elif now > self.played_at:
            self.stalls += 1
        shows = max(now, self.played_at)
        self.played_at = shows + segment["seconds"]
        self.frames += segment["num_frames"]
        if self.requested is not None and segment["switched"] and segment["prompt"] == self.requested[0]:
            parts = {name: segment["timings"][name] for name in ("text", "switch", "denoise", "decode", "encode")}
            parts["wait"] = now - self.requested[1] - sum(parts.values())
            self.switches.append(parts | {"shown late": shows - now, "total": shows - self.requested[1]})
            self.requested = None
        return self.played_at - now


async def play(url: str, player: Player, seconds: float, every: float, playing: bool) -> None:
    """A session of `seconds`, with a new prompt about every `every` seconds, not at the same time in all clients."""
    async with websockets.connect(url, max_size=None) as connection:
        player.began = time.perf_counter()
        await connection.send(json.dumps({"type": "start", "prompts": [PROMPTS[player.number % len(PROMPTS)]], "seed": player.number}))
        number, due = player.number, player.began + every * (1 + 0.37 * (player.number % 5))
        while (now := time.perf_counter()) < player.began + seconds:
            message = await connection.recv()
            if isinstance(message, bytes):
                continue
            content = json.loads(message)
            if content["type"] == "error" and content["fatal"]:
                raise RuntimeError(content["message"])
            if content["type"] != "segment":
                continue
            await connection.recv()  # the fragment: only now it can be shown
            now = time.perf_counter()
            left = player.play(content, now)
            await connection.send(json.dumps({"type": "ack", "segment": content["index"]} | ({"buffered": left} if playing else {})))
            if now > due and player.requested is None:
                # A user sends a prompt at any moment, not just when a segment has arrived.
                await asyncio.sleep(0.11 * (len(player.switches) % 7))
                number, due = number + 1, now + every
                player.requested = (PROMPTS[number % len(PROMPTS)], time.perf_counter())
                await connection.send(json.dumps({"type": "update", "prompts": [player.requested[0]]}))


async def watch(process: psutil.Process, memory: list[tuple[float, float]], every: float) -> None:
    """Append the server's memory in MiB, with its time, every `every` seconds."""
    began = time.perf_counter()
    while True:
        memory.append((round(time.perf_counter() - began, 1), round(process.memory_info().rss / 2**20, 1)))
        await asyncio.sleep(every)


async def measure(
    url: str, players: list[Player], seconds: float, every: float, playing: bool, process: psutil.Process
) -> list[tuple[float, float]]:
    memory: list[tuple[float, float]] = []
    watching = asyncio.create_task(watch(process, memory, max(1.0, seconds / 60)))
    await asyncio.gather(*(play(url, player, seconds, every, playing) for player in players))
    watching.cancel()
    return memory


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 90th percentile and maximum."""
    ordered = sorted(values)
    ninth = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median": round(statistics.median(ordered), 3), "p90": round(ninth, 3), "max": round(ordered[-1], 3)}


def report(found: dict[str, Any], file: Path | None) -> None:
    """Print what was measured, as a table and as a line of JSON, which is also appended to `file`."""
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    print(json.dumps(found))
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=4.0, help="seconds between the prompts of a client (default %(default)s)")
    parser.add_argument("--as-fast-as-possible", action="store_true", help="acknowledge segments at once, without playing them")
    parser.add_argument("--json", type=Path, help="file to which the line of JSON is appended")
    parser.add_argument("words", nargs="*", help="passed to the server: --model …, key=value")
    arguments, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "longlive.serving", "--port", "0", "--output", folder, f"max_sessions={arguments.clients}"]
        server = subprocess.Popen([*command, *arguments.words, *rest], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            output, start = "", time.perf_counter()
            while "ready after" not in output:
                line = server.stderr.readline()
                if not line:
                    sys.stderr.write(output)
                    return 1
                output += line
            url = re.sub("^http", "ws", re.search(r"open (\S+)", output)[1]) + "live"  # type: ignore[index]
            ready = time.perf_counter() - start
            players = [Player(number) for number in range(arguments.clients)]
            playing, process = not arguments.as_fast_as_possible, psutil.Process(server.pid)
            memory = asyncio.run(measure(url, players, 60 * arguments.minutes, arguments.every, playing, process))
        finally:
            server.terminate()
            server.wait()
    switches = [switch for player in players for switch in player.switches]
    totals = quantiles([switch["total"] for switch in switches]) if switches else None
    seconds = 60 * arguments.minutes
    third = max(1, len(memory) // 3)
    found = {
        "benchmark": "interactive",
        "clients": arguments.clients,
        "minutes": arguments.minutes,
        "playing": playing,
        "ready_seconds": round(ready, 2),
        "first_image_seconds": quantiles([player.first for player in players if player.first is not None]),
        "images_per_second": round(sum(player.frames for player in players) / seconds, 1),
        "images_per_second_of_the_slowest": round(min(player.frames for player in players) / seconds, 1),
        "stalls": sum(player.stalls for player in players),
        "switches": len(switches),
        "switch_seconds": totals,
        "switch_parts": {name: round(statistics.mean(switch[name] for switch in switches), 3) for name in PARTS} if switches else None,
        "memory_mib": {
            "second_third": round(statistics.mean(value for _, value in memory[third : 2 * third] or memory), 1),
            "last_third": round(statistics.mean(value for _, value in memory[-third:]), 1),
            "most": max(value for _, value in memory),
        },
    }
    report(found, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
