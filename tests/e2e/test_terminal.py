"""A person types at a terminal, a real one as far as the program can tell: `longlive live` with random weights."""

import json
import os
import pty
import re
import select
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from longlive.programs.terminal import half_blocks
from tests.processes import start_on_terminal


class Screen:
    """The other end of a terminal."""

    def __init__(self):
        self.end, self.terminal = pty.openpty()
        self.text = ""

    def type(self, keys):
        os.write(self.end, keys.encode())

    def until(self, pattern, seconds=240):
        """Read until `pattern` is there."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"no {pattern} in:\n{self.text}"
            self.read(0.2)

    def read(self, seconds):
        """Read what comes within so many seconds; answer, as terminals do, where the cursor is."""
        if select.select([self.end], [], [], seconds)[0]:
            data = os.read(self.end, 65536).decode(errors="replace")
            self.text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data)
            if "\x1b[6n" in data:
                self.type("\x1b[1;1R")


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
    count = len(screen.text)
    while not re.search(r"[3-9]\.\d s of video", screen.text[count:]):
        screen.read(0.2)
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
