"""The page in a real Chromium, with the miniature: what a person sees is read from the screen's pixels by the oracle.

Run by `bash scripts/test.sh --browser`, which installs Playwright; Chromium itself must be there.
"""

import contextlib
import json
import shutil
import signal
import socket
import threading
import time
from collections import Counter

import pytest
import torch

from longlive import video
from longlive.miniature import oracle
from longlive.miniature.world import ATTRIBUTES
from tests.e2e.test_serving import Served

pytestmark = pytest.mark.browser

FIRST = "a red circle moving right on a black background"
SECOND = "a blue circle moving right on a white background"
SEEN = """async (count) => {
  const screen = document.querySelector('#video:not([hidden])') ?? document.querySelector('canvas#canvas');
  const canvas = new OffscreenCanvas(64, 64), pen = canvas.getContext('2d', {willReadFrequently: true});
  const images = [];
  for (let n = 0; n < count; n++) {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(screen, 0, 0, 64, 64);
    images.push(Array.from(pen.getImageData(0, 0, 64, 64).data));
    await new Promise(done => setTimeout(done, 62.5));
  }
  return images;
}"""


class Cable:
    """Passes bytes between the browser and the server, until it is cut; mended, new connections get through again."""

    def __init__(self, port):
        self.port, self.whole, self.ends = port, True, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, _ = self.listener.accept()
            if not self.whole:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            self.ends += [near, far]
            for one, two in ((near, far), (far, near)):
                threading.Thread(target=self.carry, args=(one, two), daemon=True).start()

    @staticmethod
    def carry(one, two):
        try:
            while data := one.recv(65536):
                two.sendall(data)
        except OSError:
            pass
        for end in (one, two):
            end.close()

    def cut(self):
        self.whole = False
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.ends.clear()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    server = Served("miniature", tmp_path_factory.mktemp("live"), "scale=4")
    yield server
    assert server.process.is_alive(), server.output
    server.end(signal.SIGINT)
    assert "Traceback" not in server.output, server.output


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="bash scripts/test.sh --browser installs it")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("there is no Chromium on the path")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def seen(page, count=24):
    """What is on the screen, `[1, count, 3, 64, 64]` uint8."""
    pixels = torch.tensor(page.evaluate(SEEN, count), dtype=torch.uint8).view(1, count, 64, 64, 4)
    return pixels[..., :3].movedim(-1, 2)


def read(images):
    """Background and colour that the oracle reads in most of the images."""
    reading = oracle.read(images)
    return {name: Counter(getattr(reading, name)[0].tolist()).most_common(1)[0][0] for name in ("background", "color")}


def until(page, expression, seconds=30):
    """Waits until it is true in the page, whose policy forbids Playwright's own way of waiting."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, (expression, page.evaluate("({...window.longlive, state: window.longlive.state})"))
        time.sleep(0.05)


def until_state(page, state):
    until(page, f"window.longlive.state === {state!r}")


def switch_to(page, prompt):
    """Type a prompt in place of the one in the line, and wait until the video shows it."""
    started = page.evaluate("window.longlive.latency")
    page.keyboard.press("Control+A")
    page.keyboard.type(prompt)
    page.keyboard.press("Enter")
    until(page, f"![null, {json.dumps(started)}].includes(window.longlive.latency) && window.longlive.state === 'generating'")
    time.sleep(1.5)


@pytest.mark.parametrize("format", ["mp4", "jpeg"])
def test_type_and_watch(served, browser, tmp_path, format):
    cable = Cable(int(served.url.rsplit(":", 1)[1]))
    context = browser.new_context(accept_downloads=True, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{cable.url}/?format={format}")
    until_state(page, "idle")
    page.keyboard.type(FIRST)  # the prompt line has the focus
    page.keyboard.press("Enter")
    until_state(page, "generating")
    until(page, "window.longlive.segments >= 3")
    before = seen(page)
    assert (before[:, 1:] != before[:, :-1]).flatten(2).any(dim=2).sum() >= 8  # it moves

    switch_to(page, SECOND)
    one, two = read(before), read(seen(page))
    assert all(one[name] != two[name] for name in ("background", "color")), (one, two)
    assert 0 < page.evaluate("window.longlive.latency") < 5

    page.keyboard.press("Escape")
    until_state(page, "paused")
    time.sleep(1.0)
    still = seen(page, 12)
    assert (still == still[:, :1]).all()
    page.keyboard.press("Escape")
    until_state(page, "generating")

    segments = page.evaluate("window.longlive.segments")
    cable.cut()
    until_state(page, "reconnecting")
    cable.whole = True
    until_state(page, "generating")
    until(page, f"window.longlive.segments > {segments} + 2")
    assert read(seen(page)) == two

    with page.expect_download() as waited:
        page.click("#download-recording")
    waited.value.save_as(tmp_path / "recording.mp4")
    info = video.probe(tmp_path / "recording.mp4")
    assert info.images > 60 and (info.height, info.width) == (256, 256)
    assert not wrong, wrong
    context.close()


def test_what_the_model_understands_and_what_it_does_not(served, browser):
    page = browser.new_page()
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(served.url)
    until_state(page, "idle")
    page.click("#help")
    assert page.is_visible("#words")
    rows = page.evaluate("[...document.querySelectorAll('#word-list > div')].map((row) => row.innerText.replace(/\\s+/g, ' '))")
    assert [row.split()[0] for row in rows] == list(ATTRIBUTES) and "circle, square, triangle, cross, ring" in rows[0]
    assert page.get_attribute("#word-list span >> nth=0", "title") == "circle, disc, disk, ball, dot"
    page.keyboard.press("Escape")
    page.keyboard.type("a red dragon")
    page.keyboard.press("Enter")
    until(page, "!document.getElementById('notice').hidden", 60)
    assert 'does not know "dragon"; it understands shape (circle' in page.inner_text("#notice")
    assert not wrong, wrong
    page.close()


@pytest.mark.parametrize("format", ["mp4", "jpeg"])
def test_look_back_while_it_goes_on_and_let_others_watch(served, browser, format):
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{served.url}/?format={format}")
    until_state(page, "idle")
    page.click(f"text={FIRST}")  # an example starts at a click
    until(page, "window.longlive.segments >= 4")
    switch_to(page, SECOND)
    live = read(seen(page))

    page.keyboard.press("Escape")
    until_state(page, "paused")
    page.click("#timeline .entry >> nth=0")
    until(page, "window.longlive.lookingBack")
    assert page.inner_text("#state") == "Looking back" and page.is_enabled("#live") and not page.is_visible("#held")
    time.sleep(1.0)
    back, before = read(seen(page, 4)), page.evaluate("({...window.longlive.span, segments: window.longlive.segments})")
    assert (back["background"], live["background"]) == (palette("black"), palette("white"))
    assert before["end"] - before["time"] > 1
    page.keyboard.press("Escape")  # plays on from there, and the video goes on too
    until(page, f"window.longlive.segments > {before['segments']} + 2 && window.longlive.span.time > {before['time']} + 0.5")
    page.keyboard.press("Alt+l")
    until(page, "!window.longlive.lookingBack")
    time.sleep(1.0)
    assert read(seen(page)) == live and page.evaluate("window.longlive.span.time") > before["time"]

    page.click("#share")
    link = page.input_value("#share-link")
    page.keyboard.press("Escape")
    other = browser.new_page()
    other.goto(link)
    until(other, "window.longlive.segments >= 2")
    time.sleep(1.0)
    assert read(seen(other)) == live and other.inner_text("#state") == "Watching"
    assert not other.is_visible("#prompt") and not other.is_visible("#pause") and other.is_visible("#download-recording")
    page.keyboard.press("Escape")
    until_state(other, "paused")
    assert (page.inner_text("#held"), other.inner_text("#held")) == ("Paused", "Paused by its owner")

    page.fill("#seed", "12x")
    page.press("#seed", "Enter")
    assert page.get_attribute("#seed", "aria-invalid") == "true" and "whole number" in page.inner_text("#notice")
    assert page.evaluate("window.longlive.state") == "paused"  # nothing was restarted
    page.fill("#prompt", "red " * 40)
    until(page, "document.getElementById('pieces').classList.contains('cut')")
    assert page.inner_text("#pieces").endswith("/32")
    page.click("#stop")
    until_state(other, "ended")
    assert not wrong, wrong
    other.close()
    page.close()


def palette(name):
    """The number that the oracle gives a background."""
    return list(ATTRIBUTES["background"]).index(name)


def test_twenty_prompts_can_be_read_and_a_phone_held_sideways_shows_everything(served, browser):
    context = browser.new_context(viewport={"width": 844, "height": 390}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(served.url)
    until_state(page, "idle")
    entries = [
        {
            "prompt": f"{n}: a blue circle moving right on a white background",
            "videoIndex": 0,
            "firstSegment": n,
            "start": 3 * n,
            "end": 3 * n + 3,
        }
        for n in range(20)
    ]
    stored = {"session": "nobody", "key": "none", "next": 20, "seconds": 60, "entries": entries}
    page.evaluate("(stored) => sessionStorage.setItem('longlive.session', JSON.stringify({...stored, at: Date.now()}))", stored)
    page.reload()
    until_state(page, "ended")  # the server has no such session
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight && document.documentElement.scrollWidth <= innerWidth")
    shown = "[...document.querySelectorAll('.entry')].map((one) => [one.clientWidth, one.querySelector('small').textContent])"
    assert page.evaluate(shown)[:2] == [[page.evaluate(shown)[0][0], "0:00"], [page.evaluate(shown)[1][0], "0:03"]]
    assert all(width >= 160 for width, _ in page.evaluate(shown))
    page.click("#as-list")
    cut = "[...document.querySelectorAll('.entry span')].filter((one) => one.scrollHeight > one.clientHeight + 1).length"
    assert page.evaluate(cut) == 0 and len(page.evaluate(shown)) == 20
    context.close()
