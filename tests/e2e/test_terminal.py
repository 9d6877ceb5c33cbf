"""A person types at a terminal, a real one as far as the program can tell: `longlive live` with random weights."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from pathlib import Path

import numpy as np
import pyte
import pytest

from longlive.programs.terminal import half_blocks
from tests.processes import start_on_terminal


class Screen(pyte.Screen):
    """The other end of a terminal, as a person sees it."""

    def __init__(self):
        super().__init__(columns=120, lines=40)
        self.end, self.terminal = pty.openpty()
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", self.lines, self.columns, 0, 0))
        self._stream = pyte.ByteStream(self)

    def write_process_input(self, data):
        os.write(self.end, data.encode())  # where the cursor is, for example

    def type(self, keys):
        os.write(self.end, keys.encode())

    @property
    def text(self):
        return "\n".join(line.rstrip() for line in self.display)

    def until(self, pattern, seconds=240):
        """Read until `pattern` is shown."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"no {pattern} in:\n{self.text}"
            self.read(0.2)

    def read(self, seconds):
        """Read what comes within so many seconds."""
        if select.select([self.end], [], [], seconds)[0]:
            self._stream.feed(os.read(self.end, 65536))


@pytest.mark.parametrize("end", ["\x04", "\x03"], ids=["Ctrl-D", "Ctrl-C"])
def test_a_line_of_ones_own(tiny, tmp_path, end):
    screen = Screen()
    words = ["--model", str(tiny), "--output", str(tmp_path / "made"), "scale=1", "device=cpu"]
    process = start_on_terminal("interactive_inference.py", words, screen.terminal)
    screen.until("the video begins with the first prompt")
    screen.type("a red circle\r")
    screen.until(r"[1-9]\.\d s of video, \d+ frames/s; Ctrl-D")
    screen.type("a blu")  # while messages and the status change
    time.sleep(0.5)
    screen.type("e square\r")
    screen.until('from the next block on: "a blue square"')
    screen.until(r"[3-9]\.\d s of video")
    screen.type(end)
    deadline = time.monotonic() + 120
    while process.exitcode is None and time.monotonic() < deadline:
        process.join(0.1)
        screen.read(0)
    assert process.exitcode == (0 if end == "\x04" else 128 + signal.SIGINT), screen.text
    assert "Traceback" not in screen.text
    (written,) = [path for path in Path(tmp_path / "made").glob("*.json") if "timeline" not in path.name]
    assert [entry["prompt"] for entry in json.loads(written.read_text())["prompts"]] == ["a red circle", "a blue square"]


def test_a_picture_in_characters():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:4] = (255, 0, 0)
    lines = half_blocks(image, 16).split("\n")
    assert len(lines) == 4 and all(line.count("▀") == 16 for line in lines)
    assert lines[0].startswith("\x1b[38;2;255;0;0;48;2;255;0;0m▀") and lines[3].startswith("\x1b[38;2;0;0;0;48;2;0;0;0m▀")
