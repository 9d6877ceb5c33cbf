"""The server in another process: what clients do wrong does not disturb other clients, and what was shown is never lost."""

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

import pytest
import websockets

from longlive import LongLivePipeline, video
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Transition
from longlive.miniature.world import ATTRIBUTES
from longlive.serving.__main__ import main
from tests.processes import ROOT, start_program

PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


class Served:
    """A running server; `output`: what it has printed."""

    def __init__(self, model, folder, *words):
        self.log = folder / "said"
        self.log.unlink(missing_ok=True)  # of an earlier server of the same folder
        words = ["--port", 0, "--output", folder, "--model", model, "scale=1", *words]
        self.process = start_program("longlive.serving", *words, output=self.log)
        while not re.search("ready after|error:", self.output):
            assert self.process.is_alive(), self.output
            time.sleep(0.05)
        self.url, self.query = re.search(r"open (http://\S+?)/(\S*)", self.output).groups()

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def get(self, path, **headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), dict(error.headers)

    def live(self, query="", **settings):
        return websockets.connect(self.url.replace("http", "ws") + "/live" + query, max_size=None, **settings)

    def end(self, number=signal.SIGINT):
        if self.process.is_alive():
            os.kill(self.process.pid, number)
            self.process.join(60)
        return self.process.exitcode


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    server = Served(tiny, tmp_path_factory.mktemp("live"), "max_sessions=40")  # a lost one keeps its place for a while
    yield server
    assert server.process.is_alive(), server.output
    server.end()
    assert "Traceback" not in server.output, server.output


class Client:
    """A client. It keeps all messages, and segments with their binary parts."""

    def __init__(self, connection, *, takes=True):
        self.connection, self.takes = connection, takes
        self.messages, self.segments, self.header = [], [], None

    async def send(self, **message):
        await self.connection.send(json.dumps(message))

    async def receive(self):
        """The next message; acknowledges a segment."""
        message = json.loads(await asyncio.wait_for(self.connection.recv(), 60))
        self.messages.append(message)
        if message["type"] == "header" and message["format"] == "mp4":
            self.header = await self.connection.recv()
        if message["type"] == "segment":
            count = 1 if self.header else message["num_frames"]
            self.segments.append((message, [await self.connection.recv() for _ in range(count)]))
            if self.takes:
                with contextlib.suppress(websockets.ConnectionClosed):  # messages from before the end can still be received
                    await self.send(type="ack", segment=message["index"])
        return message

    async def until(self, **wanted):
        """Receive messages until one has these values; returns it."""
        while True:
            message = await self.receive()
            if all(message.get(name) == value for name, value in wanted.items()):
                return message

    async def receive_segments(self, count):
        wanted = len(self.segments) + count
        while len(self.segments) < wanted:
            await self.receive()

    @property
    def hello(self):
        return next(message for message in self.messages if message["type"] == "hello")

    @property
    def owner(self):
        return {"session": self.hello["session"], "key": self.hello["owner_key"]}

    @property
    def watcher(self):
        return {"session": self.hello["session"], "key": self.hello["watch_key"]}


@contextlib.asynccontextmanager
async def connected(served, *, takes=True, **start):
    async with served.live() as connection:
        client = Client(connection, takes=takes)
        await client.send(type="start", prompts=[PROMPT], **start)
        yield client


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


def test_a_session_from_the_first_prompt_to_its_files(served, tiny, tmp_path):
    async def go():
        async with connected(served, seed=5) as client:
            await client.receive_segments(3)
            await client.send(type="update", prompts=[{"text": OTHER}], transition={"keep_sink": False})
            assert (await client.until(type="accepted"))["prompt"] == OTHER
            await client.until(type="segment", prompt=OTHER, switched=True)
            await client.send(type="update", paused=True)
            assert (await client.until(type="state"))["paused"]
            with pytest.raises(asyncio.TimeoutError):
                while True:
                    await asyncio.wait_for(client.receive(), 1.0)
            await client.send(type="update", paused=False)
            await client.receive_segments(2)
            await client.send(type="stop")
            await client.until(type="ended")
            return client

    client = run(go())
    name = client.hello["session"]
    assert client.hello["version"] == 3 and client.hello["seed"] == 5 and client.hello["model"]["fps"] == 16
    assert [about["index"] for about, _ in client.segments] == list(range(len(client.segments)))
    frames = [about["latent_frames"] for about, _ in client.segments]
    assert all(one[1] == two[0] for one, two in itertools.pairwise(frames))
    shown = tmp_path / "shown.mp4"
    shown.write_bytes(client.header + b"".join(part for _, parts in client.segments for part in parts))
    images = video.read_video(shown)
    assert len(images) == sum(about["num_frames"] for about, _ in client.segments)

    key = {"X-Session-Key": client.hello["watch_key"]}
    status, recording, headers = served.get(f"/recording/{name}.mp4", **key)
    (tmp_path / "recording.mp4").write_bytes(recording)
    recorded = video.read_video(tmp_path / "recording.mp4")
    assert status == 200 and headers["content-type"] == "video/mp4" and (recorded[: len(images)] == images).all()
    status, content, _ = served.get(f"/timeline/{name}?key={client.hello['owner_key']}")
    timeline = Timeline.from_json(json.loads(content), where="the server's")
    cues = [(cue.prompt, cue.transition) for cue in timeline.cues]
    assert cues == [(PROMPT, None), (OTHER, Transition(False))] and timeline.seed == 5
    pipe = LongLivePipeline.from_pretrained(tiny)
    session = pipe.session(timeline.schedule, num_latent_frames=timeline.num_latent_frames, seed=timeline.seed)
    prompts = [block.prompt for block in session]
    assert prompts[: len(client.segments)] == [about["prompt"] for about, _ in client.segments]


def test_jpeg_frames_and_another_video(served):
    async def go():
        async with connected(served, format="jpeg", seed=1) as client:
            await client.receive_segments(2)
            await client.send(type="update", reset_cache=True, seed=9)
            before = client.segments[-1][0]["index"]
            await client.send(type="update", paused=False)  # its state comes before the other video begins, and is that of this one
            states = [await client.until(type="state")]
            assert states[0]["video_index"] == 0 and states[0]["seed"] == 1
            while states[-1]["video_index"] == 0:
                states.append(await client.until(type="state"))
            assert states[-1]["seed"] == 9
            assert all(about["video_index"] == 0 for about, _ in client.segments[before:])
            segment = await client.until(type="segment")
            assert segment["video_index"] == 1 and segment["latent_frames"] == [0, 3] and segment["prompt"] == PROMPT
            return client

    client = run(go())
    assert all(part[:2] == b"\xff\xd8" for _, parts in client.segments for part in parts)
    assert [len(parts) for _, parts in client.segments[:2]] == [9, 12]


def test_bad_messages_are_answered_and_the_session_continues(served):
    bad = {
        "{": "bad_message",
        '{"type": "dance"}': "bad_message",
        '{"type": "update", "colour": 1}': "bad_message",
        '{"type": "update", "seed": 3}': "bad_message",
        '{"type": "update", "transition": {"keep_sink": true}}': "bad_message",
        '{"type": "update", "prompts": ["  "]}': "bad_prompt",
        json.dumps({"type": "update", "prompts": ["x" * 2001]}): "bad_prompt",
        b"\x00\x01": "bad_message",
    }

    async def go():
        async with connected(served) as client:
            for sent, code in bad.items():
                await client.receive_segments(1)
                await client.connection.send(sent)
                error = await client.until(type="error")
                assert error["code"] == code and not error["fatal"] and error["message"], sent
            await client.receive_segments(2)

    run(go())


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("hello", "bad_message"),
        ('{"type": "update", "paused": true}', "bad_message"),
        ('{"type": "start", "prompts": [""]}', "bad_prompt"),
        ('{"type": "resume", "session": "nobody"}', "bad_message"),
        ('{"type": "resume", "session": "nobody", "key": "secret"}', "wrong_key"),
        ('{"type": "watch", "session": "nobody", "key": ""}', "wrong_key"),
        (b"start", "bad_message"),
    ],
)
def test_a_bad_first_message_ends_the_connection(served, first, code):
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
        async with connected(served) as good, connected(served) as bad:
            await bad.connection.send("x" * 100_000)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                while True:
                    await bad.receive()
            assert closed.value.rcvd.code == 1009
            await good.receive_segments(3)

    run(go())


def test_a_bad_update_among_too_many_is_refused_alone(served):
    """The client stays connected, and what it asked for before takes effect."""

    async def go():
        async with connected(served) as client:
            await client.receive_segments(1)
            for _ in range(60):
                await client.send(type="update", paused=False)
            await client.send(type="update", prompts=[OTHER])
            await client.send(type="update", prompts=[""])
            await asyncio.sleep(0.5)  # until it would be answered
            for bad in ({"seed": 5}, {"transition": {}}):
                await client.send(type="update", **bad)
                assert not (await client.until(type="error", code="bad_message"))["fatal"]
            await client.until(type="segment", prompt=OTHER)

    run(go())


def test_a_thousand_prompts_at_once(served):
    async def go():
        async with connected(served) as good, connected(served) as bad:
            await bad.receive_segments(1)
            for n in range(1000):
                await bad.send(type="update", prompts=[f"prompt {n}"])
            await bad.until(type="segment", prompt="prompt 999")
            assert 1 <= sum(message.get("code") == "rate_limited" for message in bad.messages) <= 60
            assert sum(message["type"] in ("error", "accepted") for message in bad.messages) < 200
            await good.receive_segments(3)

    run(go())


def test_a_lost_connection_resumes_where_it_was(served):
    async def go():
        async with served.live() as connection:
            client = Client(connection)
            await client.send(type="start", prompts=[PROMPT], seed=2)
            await client.receive_segments(3)
            connection.transport.abort()  # without a close message, possibly in the middle of a segment
        got = [about["index"] for about, _ in client.segments]
        await asyncio.sleep(0.5)
        async with served.live() as connection:
            back = Client(connection)
            await back.send(type="resume", **client.owner, next=got[-1] + 1)
            await back.receive_segments(4)
        assert back.hello["resumed"] and back.hello["prompt"] == PROMPT and back.header == client.header
        assert got + [about["index"] for about, _ in back.segments] == list(range(len(got) + 4))

    run(go())


def test_two_windows_on_one_session(served):
    async def go():
        async with connected(served) as one:
            await one.receive_segments(2)
            async with served.live() as connection:
                two = Client(connection)
                await two.send(type="resume", **one.owner, next=2)
                await two.receive_segments(2)
                error = await one.until(type="error")
                assert error["code"] == "taken_over" and error["fatal"]
                await two.receive_segments(2)

    run(go())


def test_a_client_that_stops_reading_does_not_hold_up_others(served):
    async def go():
        async with connected(served, takes=False) as stuck, connected(served) as good:
            await good.receive_segments(8)
            while len(stuck.segments) < 3:
                await stuck.receive()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(stuck.receive(), 1.0)

    run(go())


def test_other_origins_and_hosts_are_refused(served):
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


def test_http_routes(served):
    status, page, headers = served.get("/")
    assert status == 200 and b"<html" in page and "script-src 'self'" in headers["content-security-policy"]
    assert json.loads(served.get("/health")[1]) == {"status": "ok"}
    (model,) = json.loads(served.get("/models")[1])
    assert (model["height"], model["width"], model["fps"]) == (32, 32, 16)
    assert model["prompt_pieces"] == 32
    assert model["words"]["color"]["red"] == ["red", "crimson", "scarlet"] and list(model["words"]["motion"]) == list(ATTRIBUTES["motion"])
    assert json.loads(served.get("/sessions")[1])["max_sessions"] >= 1
    assert b"longlive_segments_total" in served.get("/metrics")[1]
    assert "/timeline/{name}" in json.loads(served.get("/openapi.json")[1])["paths"] and served.get("/docs")[0] == 200
    for path in ("/timeline/nobody", "/recording/nobody.mp4", "/takes/nobody", "/recording/nobody.mp4?key=wrong"):
        assert served.get(path)[0] == 403
    for path in ("/recording/..%2F..%2Fetc%2Fpasswd.mp4", "/static/../app.py"):
        assert served.get(path)[0] == 404
    assert served.get("/health", Host="[")[0] == 421


def test_words_that_the_model_does_not_know_are_named(served):
    async def go():
        async with connected(served) as client:
            await client.receive_segments(1)
            assert not any(message["type"] == "notice" for message in client.messages)
            await client.send(type="update", prompts=["a red dragon"])
            assert (await client.until(type="notice"))["message"].startswith('the miniature does not know "dragon"; it understands shape')
            assert (await client.until(type="accepted"))["prompt"] == "a red dragon"

    run(go())


def test_how_much_of_a_prompt_is_read(served):
    long = "a red circle moving right on a black background " * 5

    def ask(body):
        request = urllib.request.Request(served.url + "/pieces", data=body)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    status, short = ask(PROMPT.encode())
    assert status == 200 and short["pieces"]["given"] == short["pieces"]["read"] < 32 and not short["pieces"]["cut"]
    status, found = ask(long.encode())
    assert found["pieces"]["given"] > 32 == found["pieces"]["read"] and found["pieces"]["cut"] and found["pieces"]["first_unread"]
    assert found["notice"].startswith(f"the model reads 32 of {found['pieces']['given']} pieces")
    assert ask(b" ")[0] == ask(b"\xff")[0] == 422 and ask(b"x" * 70_000)[0] == 413

    async def go():
        async with connected(served) as client:
            await client.receive_segments(1)
            assert client.hello["pieces"] == short["pieces"]
            await client.send(type="update", prompts=[long])
            assert found["notice"] in (await client.until(type="notice"))["message"]
            assert (await client.until(type="accepted"))["pieces"] == found["pieces"]

    run(go())


def test_a_stranger_sees_neither_keys_nor_prompts_and_a_watcher_changes_nothing(served):
    async def go():
        async with connected(served) as owner:
            await owner.receive_segments(2)
            listed = served.get("/sessions")[1].decode()
            assert owner.hello["session"] in listed
            assert not any(secret in listed for secret in (PROMPT, owner.hello["owner_key"], owner.hello["watch_key"]))
            for key in (owner.hello["session"], owner.hello["watch_key"]):
                async with served.live() as connection:
                    thief = Client(connection)
                    await thief.send(type="resume", session=owner.hello["session"], key=key)
                    assert (await thief.receive())["code"] == "wrong_key"
            async with served.live() as connection:
                watcher = Client(connection)
                await watcher.send(type="watch", **owner.watcher)
                watching = asyncio.create_task(watcher.receive_segments(3))
                await owner.receive_segments(6)
                await watching
                assert watcher.hello["role"] == "watcher" and "owner_key" not in watcher.hello
                for message in ({"type": "update", "prompts": [OTHER]}, {"type": "update", "paused": True}, {"type": "stop"}):
                    await watcher.send(**message)
                    refused = asyncio.create_task(watcher.until(type="error"))
                    await owner.receive_segments(3)
                    assert (await refused)["code"] == "watch_only"
                assert all(about["prompt"] == PROMPT for about, _ in owner.segments)
                await owner.send(type="stop")
                assert (await watcher.until(type="ended"))["reason"] == "stopped"

    run(go())


def test_resume_beyond_what_was_made_is_refused_and_the_owner_stays(served):
    async def go():
        async with connected(served) as owner:
            await owner.receive_segments(2)
            async with served.live() as connection:
                await connection.send(json.dumps({"type": "resume", **owner.owner, "next": 99}))
                error = json.loads(await connection.recv())
                assert error["code"] == "bad_message" and error["fatal"] and "next is 99, but the session has made" in error["message"]
            await owner.receive_segments(2)

    run(go())


def test_takes_and_parts_of_a_recording_also_after_the_server_has_restarted(tiny, tmp_path):
    server = Served(tiny, tmp_path)

    async def go():
        async with connected(server, seed=1) as client:
            await client.receive_segments(3)
            await client.send(type="update", reset_cache=True)
            await client.until(type="segment", video_index=1)
            address, key = f"/recording/{client.hello['session']}.mp4", {"X-Session-Key": client.hello["owner_key"]}
            (tmp_path / "first.mp4").write_bytes((await asyncio.to_thread(server.get, f"{address}?take=0", **key))[1])
            assert (await asyncio.to_thread(server.get, f"{address}?take=5", **key))[0] == 404
            await client.receive_segments(1)
            server.process.kill()
            return client, address, key

    client, address, key = run(go())
    assert len(video.read_video(tmp_path / "first.mp4")) >= 33
    server.process.join()
    name = client.hello["session"]
    growing = tmp_path / f"{name}-video1.mp4"
    whole = growing.read_bytes()
    growing.write_bytes(whole + b"\0\0\0\x60moof")  # as if it had been killed while it wrote
    again = Served(tiny, tmp_path)
    try:
        takes = json.loads(again.get(f"/takes/{name}", **key)[1])
        assert [take["take"] for take in takes] == [0, 1]
        assert again.get(address, **key)[1] == whole
        status, part, headers = again.get(address, Range="bytes=100-199", **key)
        assert status == 206 and part == whole[100:200] and headers["content-range"] == f"bytes 100-199/{len(whole)}"
        assert json.loads(again.get(f"/timeline/{name}?take=0", **key)[1])["seed"] == 1
        assert again.get(address)[0] == 403
    finally:
        again.end()


def test_a_flood_of_messages_is_left_unread_and_a_neighbour_is_not_slowed(tiny, tmp_path):
    """Acknowledgements and broken messages, as fast as the server takes them, from a process of their own."""
    server = Served(tiny, tmp_path, "max_sessions=2")

    def read():
        return float(re.search(r"^longlive_read_messages_total (\S+)", server.get("/metrics")[1].decode(), re.M)[1])

    async def speed(client, seconds):
        count, end = len(client.segments), time.monotonic() + seconds
        while time.monotonic() < end:
            await client.receive()
        return (len(client.segments) - count) / seconds

    async def flood(connection, sent):
        messages = itertools.cycle(['{"type": "ack", "segment": 0}', "{", '{"type": "ack", "segment": -1}', "x" * 1000])
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                await connection.send(next(messages))
                sent[0] += 1

    async def go():
        async with connected(server) as neighbour, connected(server, takes=False) as flooder:
            await flooder.receive_segments(1)
            await neighbour.receive_segments(3)
            alone, before, sent = await speed(neighbour, 4), await asyncio.to_thread(read), [0]
            flooding = asyncio.create_task(flood(flooder.connection, sent))
            began = time.monotonic()
            beside = await speed(neighbour, 8)
            messages, seconds = await asyncio.to_thread(read) - before, time.monotonic() - began
            flooding.cancel()
            return alone, beside, messages, seconds, sent[0]

    try:
        alone, beside, messages, seconds, sent = run(go())
        print(f"{alone:.1f} segments a second, {beside:.1f} beside a flood; {messages / seconds:.0f} messages read of {sent / seconds:.0f}")
        assert messages <= 200 * seconds + 400 + 50 * beside * seconds  # 200 a second, twice that at once, and the neighbour's own
        assert sent > 2 * messages  # it would have sent more
        assert beside > 0.6 * alone
    finally:
        server.end()


def test_a_token_is_required_on_other_addresses_and_ctrl_c_completes_recordings(tiny, tmp_path):
    server = Served(tiny, tmp_path, "host=0.0.0.0", "max_sessions=1")
    try:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        token = server.query.removeprefix("?token=")
        assert len(token) >= 16
        assert server.get("/health")[0] == server.get("/")[0] == 200
        for path, problem in (
            ("/sessions", b"the token is missing"),
            ("/sessions?token=wrong", b"the token is wrong"),
            ("/openapi.json", b"missing"),
        ):
            status, words, headers = server.get(path)
            assert status == 401 and problem in words and headers["www-authenticate"] == "Bearer"
        assert server.get("/docs")[0] == server.get("/redoc")[0] == 404 and server.get(f"/openapi.json?token={token}")[0] == 200
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert server.get("/sessions", Authorization=f"{scheme} {token}")[0] == 200
        assert server.get(f"/sessions?token={token}")[0] == 200

        async def go():
            for query, problem in (("", b"missing"), ("?token=wrong", b"wrong"), ("?session=nobody&key=wrong", b"missing")):
                with pytest.raises(websockets.InvalidStatus) as refused:
                    async with server.live(query):
                        pass
                assert refused.value.response.status_code == 401 and problem in refused.value.response.body
            address = f"{server.url.replace('http', 'ws')}/live?token={token}"
            async with websockets.connect(address, max_size=None) as one, websockets.connect(address, max_size=None) as two:
                first, second = Client(one), Client(two)
                for client in (first, second):
                    await client.send(type="start", prompts=[PROMPT])
                    await (client.receive_segments(2) if client is first else client.until(type="queued", position=1))
                keys = f"?session={first.hello['session']}&key={first.hello['watch_key']}"
                async with server.live(keys) as connection:  # whoever has the link needs no token, and can begin no session
                    watcher = Client(connection)
                    await watcher.send(type="watch", **first.watcher)
                    await watcher.receive_segments(1)
                async with server.live(keys) as connection:
                    await connection.send(json.dumps({"type": "start", "prompts": [PROMPT]}))
                    assert json.loads(await connection.recv())["code"] == "no_token"
                key = {"X-Session-Key": first.hello["watch_key"]}
                assert (await asyncio.to_thread(server.get, f"/recording/{first.hello['session']}.mp4", **key))[0] == 200
                os.kill(server.process.pid, signal.SIGINT)
                with pytest.raises(websockets.ConnectionClosed):
                    while True:
                        await first.receive()
                return first

        first = run(go())
        server.process.join(60)
        assert server.process.exitcode == 130 and "Traceback" not in server.output, server.output
        recording = tmp_path / f"{first.hello['session']}.mp4"
        assert video.probe(recording).images >= sum(about["num_frames"] for about, _ in first.segments)
        assert recording.read_bytes().find(b"moof") < 0  # rewritten with its index in front
    finally:
        server.end(signal.SIGKILL)


def test_recordings_of_a_killed_server_can_be_played(tiny, tmp_path):
    server = Served(tiny, tmp_path)

    async def go():
        async with connected(server) as client:
            await client.receive_segments(4)
            server.process.kill()
            return client

    client = run(go())
    server.process.join()
    name = client.hello["session"]
    shown = sum(about["num_frames"] for about, _ in client.segments)
    assert len(video.read_video(tmp_path / f"{name}.mp4")) >= shown
    assert Timeline.load(tmp_path / f"{name}.timeline.json").cues[0].prompt == PROMPT


def test_bad_settings_are_refused(tiny, caplog):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, message in (
            (["--port", "70000"], "port 70000: choose one from 0 (any that is free) to 65535"),
            (["--port", port, "--model", str(tiny)], f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another"),
            (["video.seconds=3"], "video.seconds is given, but clients decide what is shown"),
            (["video.crf=3"], "video.crf is given, but the server has its own settings for files"),
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


def test_health_says_why_the_model_could_not_be_loaded(tmp_path):
    server = Served(tmp_path / "nothing", tmp_path)
    time.sleep(0.1)
    status, why, _ = server.get("/health")
    assert status == 503 and b"the model folder" in why
    server.end()
