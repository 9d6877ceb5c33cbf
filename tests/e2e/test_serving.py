"""The server as a process of its own, and clients that behave and misbehave: nobody disturbs another, nothing shown is lost."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import websockets

from longlive import LongLivePipeline, video
from longlive.generation.timeline import Timeline
from longlive.serving.__main__ import main

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


class Served:
    """A running server."""

    def __init__(self, model, folder, *words):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "longlive.serving", "--port", "0", "--output", folder, "--model", model, "scale=1", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self.said = ""
        while "ready after" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
        self.url, self.query = re.search(r"open (http://\S+?)/(\S*)", self.said).groups()

    def get(self, path, **headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def live(self, **settings):
        return websockets.connect(self.url.replace("http", "ws") + "/live", max_size=None, **settings)

    def end(self, number=signal.SIGINT):
        if self.process.poll() is None:
            self.process.send_signal(number)
            rest, _ = self.process.communicate(timeout=60)
            self.said += rest
        return self.process.returncode


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    server = Served(tiny, tmp_path_factory.mktemp("live"))
    yield server
    assert server.process.poll() is None, server.said
    server.end()
    assert "Traceback" not in server.said, server.said


class Talk:
    """A client: JSON messages by type, segments with their binary parts."""

    def __init__(self, connection, *, takes=True):
        self.connection, self.takes = connection, takes
        self.messages, self.segments, self.header = [], [], None

    async def say(self, **message):
        await self.connection.send(json.dumps(message))

    async def hear(self):
        """The next message; a segment is acknowledged."""
        message = json.loads(await asyncio.wait_for(self.connection.recv(), 60))
        self.messages.append(message)
        if message["type"] == "header" and message["format"] == "mp4":
            self.header = await self.connection.recv()
        if message["type"] == "segment":
            count = 1 if self.header else message["num_frames"]
            self.segments.append((message, [await self.connection.recv() for _ in range(count)]))
            if self.takes:
                with contextlib.suppress(websockets.ConnectionClosed):  # what came before the end can still be heard
                    await self.say(type="ack", segment=message["index"])
        return message

    async def until(self, **wanted):
        """Hears until a message has these values; returns it."""
        while True:
            message = await self.hear()
            if all(message.get(name) == value for name, value in wanted.items()):
                return message

    async def hear_segments(self, count):
        wanted = len(self.segments) + count
        while len(self.segments) < wanted:
            await self.hear()

    @property
    def hello(self):
        return next(message for message in self.messages if message["type"] == "hello")


@contextlib.asynccontextmanager
async def talking(served, *, takes=True, **start):
    async with served.live() as connection:
        talk = Talk(connection, takes=takes)
        await talk.say(type="start", prompts=[PROMPT], **start)
        yield talk


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def test_a_session_from_the_first_prompt_to_its_files(served, tiny, tmp_path):
    async def go():
        async with talking(served, seed=5) as talk:
            await talk.hear_segments(3)
            await talk.say(type="update", prompts=[{"text": OTHER}], transition={"keep_sink": False})
            assert (await talk.until(type="accepted"))["prompt"] == OTHER
            await talk.until(type="segment", prompt=OTHER, switched=True)
            await talk.say(type="update", paused=True)
            assert (await talk.until(type="state"))["paused"]
            with pytest.raises(asyncio.TimeoutError):
                while True:
                    await asyncio.wait_for(talk.hear(), 1.0)
            await talk.say(type="update", paused=False)
            await talk.hear_segments(2)
            await talk.say(type="stop")
            await talk.until(type="ended")
            return talk

    talk = run(go())
    name = talk.hello["session"]
    assert talk.hello["version"] == 2 and talk.hello["seed"] == 5 and talk.hello["model"]["fps"] == 16
    assert [about["index"] for about, _ in talk.segments] == list(range(len(talk.segments)))
    frames = [about["latent_frames"] for about, _ in talk.segments]
    assert all(one[1] == two[0] for one, two in itertools.pairwise(frames))
    shown = tmp_path / "shown.mp4"
    shown.write_bytes(talk.header + b"".join(part for _, parts in talk.segments for part in parts))
    images = video.read_video(shown)
    assert len(images) == sum(about["num_frames"] for about, _ in talk.segments)

    status, recording, headers = served.get(f"/recording/{name}.mp4")
    (tmp_path / "recording.mp4").write_bytes(recording)
    recorded = video.read_video(tmp_path / "recording.mp4")
    assert status == 200 and headers["content-type"] == "video/mp4" and (recorded[: len(images)] == images).all()
    status, content, _ = served.get(f"/timeline/{name}")
    timeline = Timeline.from_json(json.loads(content), where="the server's")
    assert [(cue.prompt, cue.keep_sink) for cue in timeline.cues] == [(PROMPT, None), (OTHER, False)] and timeline.seed == 5
    pipe = LongLivePipeline.from_pretrained(tiny)
    session = pipe.session(timeline.schedule, num_latent_frames=timeline.num_latent_frames, seed=timeline.seed)
    prompts = [chunk.prompt for chunk in session]
    assert prompts[: len(talk.segments)] == [about["prompt"] for about, _ in talk.segments]


def test_jpeg_frames_and_another_video(served):
    async def go():
        async with talking(served, format="jpeg", seed=1) as talk:
            await talk.hear_segments(2)
            await talk.say(type="update", reset_cache=True, seed=9)
            assert (await talk.until(type="state", video_index=1))["seed"] == 9
            segment = await talk.until(type="segment")
            assert segment["video_index"] == 1 and segment["latent_frames"] == [0, 3] and segment["prompt"] == PROMPT
            return talk

    talk = run(go())
    assert all(part[:2] == b"\xff\xd8" for _, parts in talk.segments for part in parts)
    assert [len(parts) for _, parts in talk.segments[:2]] == [9, 12]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("{", "bad_message"),
        ('{"type": "dance"}', "bad_message"),
        ('{"type": "update", "colour": 1}', "bad_message"),
        ('{"type": "update", "seed": 3}', "bad_message"),
        ('{"type": "update", "transition": {"keep_sink": true}}', "bad_message"),
        ('{"type": "update", "prompts": ["  "]}', "bad_prompt"),
        (json.dumps({"type": "update", "prompts": ["x" * 2001]}), "bad_prompt"),
        (b"\x00\x01", "bad_message"),
    ],
)
def test_bad_messages_are_answered_and_the_session_goes_on(served, sent, code):
    async def go():
        async with talking(served) as talk:
            await talk.hear_segments(1)
            await talk.connection.send(sent)
            error = await talk.until(type="error")
            assert error["code"] == code and not error["fatal"] and error["message"]
            await talk.hear_segments(2)

    run(go())


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("hello", "bad_message"),
        ('{"type": "update", "paused": true}', "bad_message"),
        ('{"type": "start", "prompts": [""]}', "bad_prompt"),
        ('{"type": "resume", "session": "nobody"}', "unknown_session"),
        (b"start", "bad_message"),
    ],
)
def test_bad_beginnings_end_the_connection(served, first, code):
    async def go():
        async with served.live() as connection:
            await connection.send(first)
            error = json.loads(await connection.recv())
            assert error["code"] == code and error["fatal"]
            with pytest.raises(websockets.ConnectionClosed):
                await connection.recv()

    run(go())


def test_a_message_that_is_too_large_ends_its_connection_only(served):
    async def go():
        async with talking(served) as good, talking(served) as bad:
            await bad.connection.send("x" * 100_000)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                while True:
                    await bad.hear()
            assert closed.value.rcvd.code == 1009
            await good.hear_segments(3)

    run(go())


def test_a_thousand_prompts_at_once(served):
    async def go():
        async with talking(served) as good, talking(served) as bad:
            await bad.hear_segments(1)
            for n in range(1000):
                await bad.say(type="update", prompts=[f"prompt {n}"])
            await bad.until(type="segment", prompt="prompt 999")
            assert sum(message.get("code") == "rate_limited" for message in bad.messages) >= 1
            assert sum(message["type"] in ("error", "accepted") for message in bad.messages) < 200
            await good.hear_segments(3)

    run(go())


def test_a_connection_that_is_cut_goes_on_where_it_was(served):
    async def go():
        async with served.live() as connection:
            talk = Talk(connection)
            await talk.say(type="start", prompts=[PROMPT], seed=2)
            await talk.hear_segments(3)
            connection.transport.abort()  # no goodbye, perhaps in the middle of a segment
        got = [about["index"] for about, _ in talk.segments]
        await asyncio.sleep(0.5)
        async with served.live() as connection:
            back = Talk(connection)
            await back.say(type="resume", session=talk.hello["session"], next=got[-1] + 1)
            await back.hear_segments(4)
        assert back.hello["resumed"] and back.hello["prompt"] == PROMPT and back.header == talk.header
        assert got + [about["index"] for about, _ in back.segments] == list(range(len(got) + 4))

    run(go())


def test_two_windows_on_one_session(served):
    async def go():
        async with talking(served) as one:
            await one.hear_segments(2)
            async with served.live() as connection:
                two = Talk(connection)
                await two.say(type="resume", session=one.hello["session"], next=2)
                await two.hear_segments(2)
                error = await one.until(type="error")
                assert error["code"] == "taken_over" and error["fatal"]
                await two.hear_segments(2)

    run(go())


def test_a_client_that_stops_reading_does_not_hold_up_others(served):
    async def go():
        async with talking(served, takes=False) as stuck, talking(served) as good:
            await good.hear_segments(8)
            while len(stuck.segments) < 3:
                await stuck.hear()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(stuck.hear(), 1.0)

    run(go())


def test_pages_of_others_are_refused(served):
    async def go():
        host, port = served.url.removeprefix("http://").split(":")
        for name, settings in ((host, {"origin": "http://evil.example"}), ("evil.example", {})):
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with websockets.connect(f"ws://{name}:{port}/live", host=host, port=int(port), **settings):
                    pass
            assert refused.value.response.status_code == 403

    run(go())
    status, _, _ = served.get("/health", Host="evil.example")
    assert status == 421


def test_what_programs_ask(served):
    status, page, headers = served.get("/")
    assert status == 200 and b"<html" in page and "script-src 'self'" in headers["content-security-policy"]
    assert json.loads(served.get("/health")[1]) == {"status": "ok"}
    (model,) = json.loads(served.get("/models")[1])
    assert (model["height"], model["width"], model["fps"]) == (32, 32, 16)
    assert json.loads(served.get("/sessions")[1])["max_sessions"] >= 1
    assert b"longlive_segments_total" in served.get("/metrics")[1]
    assert "/timeline/{name}" in json.loads(served.get("/openapi.json")[1])["paths"]
    for path in ("/timeline/nobody", "/recording/nobody.mp4", "/recording/..%2F..%2Fetc%2Fpasswd.mp4", "/static/../app.py"):
        assert served.get(path)[0] == 404


def test_a_token_is_needed_elsewhere_and_ctrl_c_finishes_recordings(tiny, tmp_path):
    server = Served(tiny, tmp_path, "host=0.0.0.0", "max_sessions=1")
    try:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        token = server.query.removeprefix("?token=")
        assert len(token) >= 16
        assert server.get("/health")[0] == server.get("/")[0] == 200
        assert server.get("/sessions")[0] == server.get("/sessions?token=wrong")[0] == 401
        assert server.get(f"/sessions?token={token}")[0] == server.get("/sessions", Authorization=f"Bearer {token}")[0] == 200

        async def go():
            with pytest.raises(websockets.InvalidStatus):
                async with server.live():
                    pass
            address = f"{server.url.replace('http', 'ws')}/live?token={token}"
            async with websockets.connect(address, max_size=None) as one, websockets.connect(address, max_size=None) as two:
                first, second = Talk(one), Talk(two)
                for talk in (first, second):
                    await talk.say(type="start", prompts=[PROMPT])
                    await (talk.hear_segments(2) if talk is first else talk.until(type="queued", position=1))
                server.process.send_signal(signal.SIGINT)
                with pytest.raises(websockets.ConnectionClosed):
                    while True:
                        await first.hear()
                return first

        first = run(go())
        server.said += server.process.communicate(timeout=60)[0]
        assert server.process.returncode == 130 and "Traceback" not in server.said, server.said
        recording = tmp_path / f"{first.hello['session']}.mp4"
        assert video.probe(recording).images >= sum(about["num_frames"] for about, _ in first.segments)
        assert recording.read_bytes().find(b"moof") < 0  # rewritten with its index in front
    finally:
        server.end(signal.SIGKILL)


def test_what_a_killed_server_has_recorded_plays(tiny, tmp_path):
    server = Served(tiny, tmp_path)

    async def go():
        async with talking(server) as talk:
            await talk.hear_segments(4)
            server.process.kill()
            return talk

    talk = run(go())
    server.process.wait()
    name = talk.hello["session"]
    shown = sum(about["num_frames"] for about, _ in talk.segments)
    assert len(video.read_video(tmp_path / f"{name}.mp4")) >= shown
    assert Timeline.load(tmp_path / f"{name}.timeline.json").cues[0].prompt == PROMPT


def test_what_cannot_be_served_is_said(tiny, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, message in (
            (["--port", port, "--model", str(tiny)], f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another"),
            (["video.seconds=3"], "video.seconds is given, but what is shown comes from those who type"),
            (["video.crf=3"], "video.crf is given, but what is shown is the server's own matter"),
            (["--token", "short"], "shorter than 8 characters"),
            (["max_session=3"], "did you mean 'max_sessions'"),
            (["--output", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        ):
            caplog.clear()
            assert main(words) == 2 and message in caplog.text


def test_a_mistake_on_the_command_line_is_one_line_and_status_2():
    command = [sys.executable, "-m", "longlive.serving", "max_session=3"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 2 and "did you mean 'max_sessions'" in found.stderr and "Traceback" not in found.stderr, found.stderr


def test_a_model_that_cannot_be_loaded_is_said_where_people_look(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "longlive.serving", "--port", "0", "--output", tmp_path, "--model", str(tmp_path / "nothing")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while "error:" not in said:
        said += process.stderr.readline()
    url = re.search(r"open (http://\S+?)/", said)[1]
    with pytest.raises(urllib.error.HTTPError) as refused:
        time.sleep(0.1)
        urllib.request.urlopen(f"{url}/health", timeout=10)
    assert refused.value.code == 503 and b"there is no model folder" in refused.value.read()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
