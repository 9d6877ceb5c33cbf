"""The parts of the server one by one: fragments, messages, access, flow control, and sessions that share a model."""

import asyncio
import io
import threading
import time
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace

import av
import numpy as np
import pytest
from fastapi import HTTPException

from longlive import LongLivePipeline, video
from longlive.config import ServeConfig
from longlive.generation.caches import decoder_activation_bytes, decoder_memory_bytes
from longlive.generation.session import SessionVideo
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Transition
from longlive.serving.access import Access, Intake, RateLimiter, is_local
from longlive.serving.app import Server
from longlive.serving.audience import MAX_WATCHERS
from longlive.serving.downloads import download, whole_length
from longlive.serving.flow_control import MARGIN, MAX_UNACKNOWLEDGED, FlowControl
from longlive.serving.fragments import FragmentEncoder, jpegs, move_fragment
from longlive.serving.keys import Keys
from longlive.serving.live_session import LiveSession
from longlive.serving.messages import Refused, parse_first, parse_later, prompt_text
from longlive.serving.recorder import NotRecorded, Recorder, Segment, recording_of, takes_of
from longlive.serving.scheduler import SessionScheduler

PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


def moving(count, start=0):
    """Images of a bar that moves right, uint8 [count, 32, 32, 3]."""
    images = np.full((count, 32, 32, 3), 40, dtype=np.uint8)
    for n in range(count):
        images[n, :, (start + n) % 32] = (200, 60, 60)
    return images


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        return [(float(f.pts * f.time_base), f.key_frame, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


def test_fragments_play_alone_together_and_from_the_middle():
    encoder = FragmentEncoder(fps=16, scale=2, crf=0)
    parts = [moving(9), moving(12, 9), moving(12, 21)]
    fragments = [encoder.encode(part) for part in parts]
    assert encoder.mime.startswith('video/mp4; codecs="avc1.') and encoder.num_images == 33
    whole = decoded(encoder.header + b"".join(fragments))
    assert [round(16 * seconds) for seconds, _, _ in whole] == list(range(33))
    assert {0, 9, 21} <= {n for n, (_, key, _) in enumerate(whole) if key}
    for (_, _, image), wanted in zip(whole, np.concatenate(parts)):
        assert np.abs(image[::2, ::2].astype(int) - wanted).mean() < 6  # colours go through 4:2:0
    middle = decoded(encoder.header + fragments[1])
    assert [(round(16 * seconds), image.tobytes()) for seconds, _, image in middle] == [
        (round(16 * seconds), image.tobytes()) for seconds, _, image in whole[9:21]
    ]
    moved = decoded(encoder.header + move_fragment(fragments[2], 1, 0.0) + move_fragment(fragments[1], 2, 0.75))
    assert [round(16 * seconds) for seconds, _, _ in moved] == list(range(24))


def test_fragments_of_odd_sizes_are_refused_and_jpegs_are_the_images():
    with pytest.raises(ValueError, match="even sizes"):
        FragmentEncoder(fps=16).encode(np.zeros((2, 15, 16, 3), np.uint8))
    for file, image in zip(jpegs(moving(3)), moving(3)):
        with av.open(io.BytesIO(file), format="image2pipe") as container:
            (frame,) = container.decode(video=0)
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - image).mean() < 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"type": "dance"}', "dance"),
        ('{"type": "update", "prompts": []}', "at least 1 item"),
        ('{"type": "update", "prompts": ["a", "b"]}', "at most 1 item"),
        ('{"type": "update", "prompts": [3]}', "valid string"),
        ('{"type": "update", "colour": 3}', "colour"),
        ('{"type": "update", "seed": -1}', "greater than or equal to 0"),
        ('{"type": "update", "paused": "yes"}', "valid boolean"),
        ('{"type": "ack", "segment": 1, "buffered": -2}', "greater than or equal to 0"),
        ('{"type": "ack", "segment": 1, "buffered": NaN}', "finite number"),
        ('{"type": "update", "prompts": ["\\ud800"]}', "Invalid JSON"),
        ('{"type": "start", "prompts": ["a"]}', "start"),
    ],
)
def test_messages_that_are_refused(text, words):
    with pytest.raises(Refused, match=words) as refused:
        parse_later(text)
    assert refused.value.to_message()["code"] == "bad_message" and not refused.value.fatal
    if '"start"' not in text:
        with pytest.raises(Refused) as refused:
            parse_first(text)
        assert refused.value.fatal


def test_prompts_of_messages():
    assert prompt_text(parse_first('{"type": "start", "prompts": [" one "]}').prompts, 10) == "one"
    assert prompt_text(parse_later('{"type": "update", "prompts": [{"text": "two"}]}').prompts, 3) == "two"
    for text, words in (("  ", "empty"), ("four", "has 4 characters; at most 3 are allowed")):
        with pytest.raises(Refused, match=words):
            prompt_text([text], 3)


def test_updates_that_come_too_fast_are_merged():
    """The newest value of every field; a transition belongs to the prompts that it came with."""
    first = parse_later('{"type": "update", "prompts": ["one"], "transition": {"keep_sink": true}, "paused": true}')
    paused = first.merged(parse_later('{"type": "update", "paused": false}'))
    assert prompt_text(paused.prompts, 3) == "one" and paused.transition.keep_sink is True and paused.paused is False
    again = first.merged(parse_later('{"type": "update", "prompts": [{"text": "two"}], "reset_cache": true}'))
    assert prompt_text(again.prompts, 3) == "two" and again.transition is None and again.paused is True and again.reset_cache is True
    assert first.merged(parse_later('{"type": "update", "prompts": null, "paused": null}')) == first  # a null is nothing


def test_access():
    assert is_local("127.0.0.1") and is_local("::1") and is_local("localhost") and not is_local("0.0.0.0")
    closed = Access("secret-token", host="0.0.0.0")
    for header, query in (("Bearer secret-token", None), ("bearer  secret-token", None), ("Basic YTpi", "secret-token")):
        assert closed.token_problem(header, query) is None
    for header, query, problem in (
        (None, None, "missing"), ("Basic YTpi", None, "missing"), ("Bearer", "", "missing"),
        ("Bearer secret-toke", None, "wrong"), (None, "é", "wrong"), ("Bearer wrong", "secret-token", "wrong"),
    ):  # fmt: skip
        assert f"the token is {problem}" in closed.token_problem(header, query)
    assert closed.is_own_host("video.example:8000")
    local = Access(None, host="127.0.0.1")
    assert not local.is_own_host("[") and not local.is_own_origin("http://[", "localhost")
    assert local.token_problem(None, None) is None and local.is_own_host("localhost:8000") and local.is_own_host("[::1]:8000")
    assert not local.is_own_host("evil.example:8000") and not local.is_own_host(None)
    assert local.is_own_origin(None, "localhost:8000") and local.is_own_origin("http://localhost:8000", "localhost:8000")
    assert not local.is_own_origin("http://evil.example", "localhost:8000") and not local.is_own_origin("null", "localhost:8000")


def test_rate_limiter():
    limiter = RateLimiter(50, burst=0.1)
    assert limiter.allow() and [limiter.allow() for _ in range(20)].count(True) <= 6
    time.sleep(limiter.wait + 0.01)
    assert limiter.wait == 0 and limiter.allow()


def test_everything_a_client_sends_is_limited_by_count_and_bytes():
    intake = Intake(messages_per_second=50, bytes_per_second=1000)
    for _ in range(100):
        assert intake.wait == 0
        intake.count(1)
    assert 0 < intake.wait < 0.03
    time.sleep(0.05)
    assert intake.wait == 0
    intake.count(10_000)
    assert 7 < intake.wait < 9.5  # a burst of two seconds is free


def test_keys_of_a_session(tmp_path):
    keys = Keys(tmp_path)
    owner, watcher = keys.key("owner", "one"), keys.key("watcher", "one")
    assert keys.role("one", owner) == "owner" and keys.role("one", watcher) == "watcher"
    for wrong in (None, "", "é", owner[:-1], keys.key("owner", "two"), "\ud800"):
        assert keys.role("one", wrong) is None
    assert Keys(tmp_path).role("one", owner) == "owner"  # after a restart of the server
    (secret,) = tmp_path.iterdir()
    assert secret.stat().st_mode & 0o077 == 0
    secret.write_bytes(b"short")
    with pytest.raises(ValueError, match="is not a secret of 32 bytes"):
        Keys(tmp_path)
    with pytest.raises(ValueError, match="choose another --output"):
        Keys(secret)


def recorded(encoder, number, video_index=0):
    images = moving(12, 12 * number)
    fragment = encoder.encode(images)
    return Segment({"index": number, "video_index": video_index, "seconds": 0.75}, fragment, images, seed=1)


def test_a_download_is_what_was_whole_when_it_began(tmp_path):
    encoder, recorder = FragmentEncoder(fps=16), Recorder(tmp_path, "one")
    for number in range(3):
        segment = recorded(encoder, number)
        recorder.write(segment, encoder.header)
    path, size = recorder.path, recorder.path.stat().st_size
    whole = path.read_bytes()
    for extra in (1, 7, 100, len(segment.fragment) - 1):  # half a fragment, as a reader sees it while it is written
        path.write_bytes(whole + segment.fragment[:extra])
        with path.open("rb") as file:
            assert whole_length(file) == size, extra
    path.write_bytes(whole[:40])
    with pytest.raises(FileNotFoundError):  # nothing that could be played
        download(path, range_header=None, if_range=None)
    path.write_bytes(whole)

    def get(range_header=None, if_range=None):
        answer = download(path, range_header=range_header, if_range=if_range)
        read = answer.body_iterator
        path.write_bytes(whole + segment.fragment)  # it grows while it is read
        data = asyncio.run(joined(read)) if answer.status_code != 416 else b""
        path.write_bytes(whole)
        return answer, data

    async def joined(parts):
        return b"".join([part async for part in parts])

    answer, data = get()
    assert answer.status_code == 200 and data == whole and answer.headers["content-length"] == str(size)
    tag = answer.headers["etag"]
    for asked, wanted in (
        ("bytes=10-19", whole[10:20]),
        ("bytes=100-", whole[100:]),
        ("bytes=-7", whole[-7:]),
        ("bytes=5-999999999", whole[5:]),
    ):
        answer, data = get(asked, tag)
        assert (answer.status_code, data) == (206, wanted)
        assert answer.headers["content-range"].endswith(f"/{size}")
    for asked in ("bytes=0-1,5-6", "bytes=-", "lines=1-2", "bytes=9-3"):
        assert get(asked)[1] == whole
    assert get("bytes=10-19", '"another"')[1] == whole  # the file is not the one that a part is there of
    answer = download(path, range_header="bytes=10-19", if_range=None, only_headers=True)
    assert answer.headers["content-length"] == "10" and answer.body == b""
    answer = download(path, range_header=f"bytes={size}-", if_range=None)
    assert answer.status_code == 416 and answer.headers["content-range"] == f"bytes */{size}"
    recorder.close()
    with recorder.path.open("rb") as file:
        assert whole_length(file) == recorder.path.stat().st_size  # a plain mp4


def disk_of(num_bytes):
    """io.FileIO on a disk that has so many bytes left: the write that does not fit writes a part."""

    class File(io.FileIO):
        def write(self, data):
            left = num_bytes - self.tell()
            if left <= 0:
                raise OSError(28, "No space left on device")
            return super().write(data[:left])

    return File


def test_a_full_disk_cuts_the_recording_back_and_the_next_one_works(tmp_path, monkeypatch):
    encoder, recorder = FragmentEncoder(fps=16), Recorder(tmp_path, "one")
    first, second = recorded(encoder, 0), recorded(encoder, 1)
    room = len(encoder.header) + len(first.fragment)
    with monkeypatch.context() as patch:
        patch.setattr("longlive.serving.recorder.io.FileIO", disk_of(room + 50))
        recorder.write(first, encoder.header)
        with pytest.raises(NotRecorded, match="the recording ends here: the disk is full") as ended:
            recorder.write(second, encoder.header)
        assert ended.value.code == "disk_full" and recorder.path.stat().st_size == room
        recorder.write(second, encoder.header)  # that is said once
        recorder.close()
        assert len(video.read_video(recorder.path)) == 12
        patch.setattr("longlive.serving.recorder.io.FileIO", disk_of(10))
        with pytest.raises(NotRecorded, match="the video is not recorded: the disk is full"):
            recorder.write(recorded(encoder, 2, video_index=1), encoder.header)
        assert not recorder.path.exists()  # and no file of 0 bytes
    recorder.write(recorded(encoder, 3, video_index=2), encoder.header)
    recorder.close()
    assert len(video.read_video(recorder.path)) == 12 and takes_of(tmp_path, "one") == [0, 2]
    assert recorder.path == recording_of(tmp_path, "one", 2)


def test_a_timeline_that_cannot_be_saved_is_said_once_and_not_instead_of_the_first_error(tmp_path, monkeypatch):
    encoder, recorder = FragmentEncoder(fps=16), Recorder(tmp_path, "one")
    recorder.write(recorded(encoder, 0), encoder.header)

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Timeline, "save", full)
    timeline = Timeline(1, {})
    with pytest.raises(NotRecorded, match="the timeline is not saved: the disk is full"):
        recorder.save_timeline(timeline)
    recorder.save_timeline(timeline)
    recorder.write(recorded(encoder, 1), encoder.header)  # the recording goes on
    monkeypatch.setattr("longlive.serving.recorder.io.FileIO", disk_of(0))
    with pytest.raises(NotRecorded, match="is not recorded"):
        recorder.write(recorded(encoder, 2, video_index=1), encoder.header)
    recorder.save_timeline(timeline)


class Watcher:
    """A client that takes every segment and, unless `takes` is false, acknowledges it."""

    def __init__(self, *, takes=True, buffered=None):
        self.messages, self.segments, self.positions = [], [], []
        self.session, self.takes, self.buffered = None, takes, buffered
        self.news = threading.Condition()

    def notify(self):
        with self.news:
            if self.session is not None:
                for segment in self.session.segments_from(len(self.segments)):
                    self.segments.append(segment)
                    if self.takes:
                        self.session.acknowledge(segment.index, self.buffered)
            self.news.notify_all()

    def send(self, message):
        with self.news:
            self.messages.append(message)
            self.news.notify_all()

    def queued(self, position):
        with self.news:
            self.positions.append(position)
            self.news.notify_all()

    def admitted(self, session):
        self.session = session
        session.attach(self)

    def wait(self, condition, seconds=30.0):
        with self.news:
            assert self.news.wait_for(condition, seconds), (self.messages, len(self.segments), self.session and self.session.ended)


@pytest.fixture(scope="module")
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


@pytest.fixture
def scheduler(pipe, tmp_path):
    scheduler = SessionScheduler(pipe, folder=tmp_path, max_sessions=2, height=32, width=32, scale=1, reconnect_seconds=0.5)
    scheduler.start()
    yield scheduler
    scheduler.stop()


def begin(scheduler, watcher=None, prompt=PROMPT, seed=0):
    watcher = watcher or Watcher()
    scheduler.open(watcher, prompt, seed=seed, transition=Transition())
    return watcher


def test_sessions_take_turns_and_recordings_hold_what_was_shown(scheduler, pipe, tmp_path):
    one, two = begin(scheduler), begin(scheduler, prompt=OTHER, seed=1)
    for watcher in (one, two):
        watcher.wait(lambda w=watcher: len(w.segments) >= 6)
    assert abs(one.session.cost.segments - two.session.cost.segments) <= 2
    one.session.update_prompt(OTHER, Transition(False))
    one.wait(lambda: any(message["type"] == "accepted" for message in one.messages))
    one.wait(lambda: one.segments[-1].message["prompt"] == OTHER)
    for watcher in (one, two):
        watcher.session.end("stopped")
        watcher.session.join()
        shown = sum(segment.message["num_frames"] for segment in watcher.segments)
        assert video.probe(watcher.session.recording).images >= shown
    made = one.session.stepped.timeline
    again = list(pipe.session(made.schedule, num_latent_frames=made.num_latent_frames, seed=made.seed))
    for segment, block in zip(one.segments, again):
        assert (segment.images == block.images[0].numpy()).all() and segment.message["prompt"] == block.prompt
    assert made.cues[-1].prompt == OTHER and made.cues[-1].transition == Transition(False)


def test_generation_waits_for_acknowledgements(scheduler):
    slow, quick = begin(scheduler, Watcher(takes=False)), begin(scheduler)
    quick.wait(lambda: len(quick.segments) >= 8)
    assert len(slow.segments) == MAX_UNACKNOWLEDGED
    slow.session.acknowledge(0, None)
    slow.wait(lambda: len(slow.segments) == MAX_UNACKNOWLEDGED + 1)


def test_generation_keeps_pace_with_playback(scheduler):
    watcher = begin(scheduler, Watcher(buffered=0.6))
    watcher.wait(lambda: len(watcher.segments) >= 3)
    before, clock = len(watcher.segments), time.monotonic()
    watcher.wait(lambda: len(watcher.segments) >= before + 3)
    assert time.monotonic() - clock > 0.5  # far more slowly than it could
    for _ in range(3):  # and evenly, never several at once
        before = len(watcher.segments)
        watcher.wait(lambda least=before: len(watcher.segments) > least)
        time.sleep(0.1)
        assert len(watcher.segments) == before + 1


def test_clients_beyond_the_maximum_are_queued_and_told_their_position(scheduler):
    one, two, three, four = (begin(scheduler) for _ in range(4))
    assert (one.session and two.session) and three.session is four.session is None
    assert three.positions == [1] and four.positions == [2]
    time.sleep(0.6)  # nothing is said again while nothing changes
    assert three.positions == [1] and four.positions == [2]
    scheduler.leave(three)
    assert four.positions[-1] == 1
    one.session.end("stopped")
    scheduler.wake()
    four.wait(lambda: len(four.segments) >= 1)


def test_ended_sessions_make_room_while_another_is_always_ready(scheduler):
    busy, short = begin(scheduler), begin(scheduler)
    after = begin(scheduler)
    for watcher in (busy, short):
        watcher.wait(lambda w=watcher: len(w.segments) >= 2)
    short.session.end("stopped")
    after.wait(lambda: len(after.segments) >= 2)
    after.wait(lambda: short.session.name not in scheduler.sessions, 5)
    assert takes_of(scheduler.folder, short.session.name) == [0]
    assert set(scheduler.sessions) == {busy.session.name, after.session.name} and busy.session.ended is None


def test_keep_sink_of_the_session_unless_a_prompt_says_it(scheduler):
    watcher = Watcher()
    scheduler.open(watcher, PROMPT, seed=0, transition=Transition(recache="causal"))
    for prompt, said, wanted in ((OTHER, None, True), (PROMPT, False, False)):
        watcher.session.update_prompt(prompt, watcher.session.transition.with_sink(said))
        watcher.wait(lambda p=prompt: watcher.segments and watcher.segments[-1].message["prompt"] == p)
        assert watcher.session.stepped.timeline.cues[-1].transition == Transition(wanted, "causal")


def test_every_prompt_is_encoded_once(scheduler, monkeypatch):
    encoded, prepare = Counter(), scheduler.pipe.prepare_prompt

    def counted(prompt, **settings):
        encoded[prompt] += 1
        return prepare(prompt, **settings)

    monkeypatch.setattr(scheduler.pipe, "prepare_prompt", counted)
    watcher = begin(scheduler)
    watcher.session.update_prompt(OTHER, Transition())
    watcher.wait(lambda: watcher.segments and watcher.segments[-1].message["prompt"] == OTHER)
    assert encoded == {PROMPT: 1, OTHER: 1}


def test_a_client_reconnects_in_time_or_too_late(scheduler):
    watcher = begin(scheduler)
    watcher.wait(lambda: len(watcher.segments) >= 3)
    session = watcher.session
    session.audience.leave(watcher)
    back = Watcher()
    back.session, back.segments = scheduler.running(session.name), list(watcher.segments)
    session.attach(back, next_segment=len(back.segments))
    back.wait(lambda: len(back.segments) >= len(watcher.segments) + 3)
    indices = [segment.index for segment in back.segments]
    assert indices == list(range(len(indices)))
    other = Watcher()
    other.session = session
    session.attach(other)
    assert back.messages[-1]["code"] == "taken_over"
    session.audience.leave(back)  # has no effect: another client has replaced it
    assert session.audience.owner_left_at is None
    session.audience.leave(other)
    deadline = time.monotonic() + 10
    while session.ended is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session.ended == "the connection was lost"
    with pytest.raises(Refused, match="has ended"):
        scheduler.running(session.name)
    assert takes_of(scheduler.folder, session.name) == [0]


def test_a_session_that_cannot_begin_harms_no_other(scheduler, monkeypatch):
    """Neither when it begins at once, nor when the thread that makes the blocks of the others admits it."""
    one, two, three = begin(scheduler), begin(scheduler), begin(scheduler)
    two.wait(lambda: len(two.segments) >= 1)

    def fail(*words, **settings):
        raise MemoryError("no room for a cache")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.pipe, "stepped_session", fail)
        one.session.end("stopped")
        three.wait(lambda: bool(three.messages))
        refused = three.messages[-1]
        assert refused["code"] == "failed" and refused["fatal"] and "MemoryError: no room for a cache" in refused["message"]
        assert begin(scheduler).messages[-1]["code"] == "failed"
    before = len(two.segments)
    two.wait(lambda: len(two.segments) > before + 2)
    assert begin(scheduler).session is not None


def test_when_no_blocks_can_be_made_any_more_everybody_is_told(scheduler, monkeypatch):
    one, two, three = begin(scheduler), begin(scheduler), begin(scheduler)
    one.wait(lambda: len(one.segments) >= 1)

    def fail():
        raise ZeroDivisionError("turns")

    monkeypatch.setattr(scheduler, "_next_ready", fail)
    for watcher in (one, two):
        watcher.wait(lambda w=watcher: w.session.ended == "failed" and not w.session.is_working)
        assert "restart it: ZeroDivisionError: turns" in watcher.session.error
    assert three.messages[-1]["code"] == "failed" and "restart it" in three.messages[-1]["message"]
    with pytest.raises(Refused, match="restart it"):
        begin(scheduler)
    server = Server(ServeConfig(), None, scheduler)
    with pytest.raises(HTTPException, match="restart it"):
        server.check_health()


def test_watchers_see_a_session_and_neither_pace_nor_keep_it(scheduler):
    owner = begin(scheduler, Watcher(takes=False))
    owner.wait(lambda: len(owner.segments) >= MAX_UNACKNOWLEDGED)
    watchers = [Watcher(takes=False) for _ in range(MAX_WATCHERS)]
    for watcher in watchers:
        watcher.session = owner.session
        owner.session.audience.watch(watcher)
    with pytest.raises(Refused, match="20 others watch"):
        owner.session.audience.watch(Watcher())
    assert len(watchers[-1].segments) == MAX_UNACKNOWLEDGED
    owner.session.pause(True)
    assert watchers[0].messages == [{"type": "state", "paused": True}]
    owner.session.update_prompt(OTHER, Transition())
    owner.wait(lambda: owner.messages[-1]["type"] == "accepted")
    assert len(watchers[0].messages) == 1
    owner.session.audience.leave(watchers[0])
    assert owner.session.summary()["watchers"] == MAX_WATCHERS - 1
    owner.session.audience.leave(owner)
    deadline = time.monotonic() + 10
    while owner.session.ended is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert owner.session.ended == "the connection was lost"


def test_a_newer_prompt_before_the_first_is_encoded(scheduler, monkeypatch):
    """The first is not encoded at all, and nobody else waits for it; when the newer one fails, the first begins after all."""
    asked, go = [], threading.Event()
    encode = scheduler.pipe._text.text_encoder.encode

    def slow(prompts):
        asked.extend(prompts)
        assert go.wait(30)
        if prompts == ["bad"]:
            raise ValueError("no such words")
        return encode(prompts)

    monkeypatch.setattr(scheduler.pipe._text.text_encoder, "encode", slow)
    other, one = begin(scheduler, prompt="somebody else's"), begin(scheduler, prompt="the first")
    one.session.update_prompt("bad", Transition())
    go.set()
    one.wait(lambda: len(one.segments) >= 1)
    other.wait(lambda: len(other.segments) >= 1)
    assert asked == ["somebody else's", "bad", "the first"] and one.segments[0].message["prompt"] == "the first"
    assert [message["code"] for message in one.messages] == ["bad_prompt"]


@pytest.mark.parametrize("decoders", [1, 2])
def test_as_many_sessions_decode_at_a_time_as_memory_is_reserved_for(pipe, tmp_path, monkeypatch, decoders):
    decode, working, most = SessionVideo.decode, [], []

    def slow(video, block):
        working.append(video)
        most.append(len(working))
        time.sleep(0.1)
        try:
            return decode(video, block)
        finally:
            working.remove(video)

    monkeypatch.setattr(SessionVideo, "decode", slow)
    scheduler = SessionScheduler(pipe, folder=tmp_path, max_sessions=2, height=32, width=32, scale=1, decoders=decoders)
    scheduler.start()
    try:
        for watcher in [begin(scheduler), begin(scheduler)]:
            watcher.wait(lambda w=watcher: len(w.segments) >= 6)
    finally:
        scheduler.stop()
    assert max(most) == decoders


def test_what_sessions_reserve(pipe):
    at_work = [pipe.transient_bytes(decoders=n) for n in range(3)]
    one = decoder_activation_bytes(pipe.vae, 32, 32, latent_frames=3)
    assert at_work[0] > 0 and at_work[2] - at_work[1] == at_work[1] - at_work[0] == one > 0
    assert pipe.session_bytes() > decoder_memory_bytes(pipe.vae, 32, 32) > 0


def test_a_model_failure_ends_only_its_session(scheduler, monkeypatch):
    bad, good = begin(scheduler), begin(scheduler)
    bad.wait(lambda: bool(bad.segments))

    def fail():
        raise FloatingPointError("latents are not finite")

    monkeypatch.setattr(bad.session.stepped, "advance", fail)
    bad.wait(lambda: bad.session.ended == "failed")
    assert "latents are not finite" in bad.session.error
    before = len(good.segments)
    good.wait(lambda: len(good.segments) > before + 2)
    bad.session.join()
    assert video.probe(bad.session.recording).images >= sum(segment.message["num_frames"] for segment in bad.segments)


def test_an_encoder_failure_ends_its_session(scheduler, monkeypatch):
    bad = begin(scheduler)
    bad.wait(lambda: bool(bad.segments))
    monkeypatch.setattr(bad.session._encoder, "encode", lambda images: 1 / 0)
    bad.wait(lambda: bad.session.ended == "failed")
    assert "cannot be encoded" in bad.session.error


def test_a_full_disk_ends_the_recording_and_not_the_session(scheduler, monkeypatch):
    monkeypatch.setattr("longlive.serving.recorder.io.FileIO", disk_of(3000))
    watcher = begin(scheduler)
    watcher.wait(lambda: any(message.get("code") == "disk_full" for message in watcher.messages))
    before = len(watcher.segments)
    watcher.wait(lambda: len(watcher.segments) >= before + 3)
    assert sum(message["type"] == "error" for message in watcher.messages) == 1
    monkeypatch.undo()
    watcher.session.restart(1)
    watcher.wait(lambda: watcher.segments[-1].message["video_index"] == 1)
    watcher.session.end("stopped")
    watcher.session.join()
    assert watcher.session.take == 1 and len(video.read_video(watcher.session.recording)) >= 9


def test_a_restart_begins_another_recording(scheduler):
    watcher = begin(scheduler)
    watcher.wait(lambda: len(watcher.segments) >= 2)
    first = watcher.session.recording
    watcher.session.restart(5)
    watcher.wait(lambda: watcher.segments[-1].message["video_index"] == 1)
    watcher.session.end("stopped")
    watcher.session.join()
    assert watcher.session.recording != first
    again = next(scheduler.pipe.session(PROMPT, num_latent_frames=3, seed=5)).images[0].numpy()
    segment = next(segment for segment in watcher.segments if segment.message["video_index"] == 1)
    assert (segment.images == again).all() and segment.message["latent_frames"] == [0, 3]
    for file, seed in ((first, 0), (watcher.session.recording, 5)):
        assert Timeline.load(file.with_suffix(".timeline.json")).seed == seed
    for file in (first, watcher.session.recording):
        images = video.read_video(file)
        assert len(images) in range(9, 12 * len(watcher.segments))


def test_an_idle_session_ends(pipe, tmp_path):
    scheduler = SessionScheduler(pipe, folder=tmp_path, max_sessions=1, height=32, width=32, scale=1, idle_seconds=0.3)
    scheduler.start()
    try:
        watcher = begin(scheduler, Watcher(takes=False))
        watcher.wait(lambda: watcher.session.ended == "idle", 10)
        assert watcher.messages[0]["type"] == "notice" and "because nobody takes its video" in watcher.messages[0]["message"]
    finally:
        scheduler.stop()


def test_a_paused_session_stays_until_others_wait(pipe, tmp_path):
    scheduler = SessionScheduler(pipe, folder=tmp_path, max_sessions=1, height=32, width=32, scale=1, idle_seconds=3.0)
    scheduler.start()
    try:
        watcher = begin(scheduler)
        watcher.wait(lambda: len(watcher.segments) >= 1)
        watcher.session.pause(True)
        said = len(watcher.messages)
        time.sleep(3.5)
        assert watcher.session.ended is None and len(watcher.messages) == said
        after = begin(scheduler)
        watcher.wait(lambda: watcher.session.ended == "idle", 20)
        assert "because it is paused and others wait" in watcher.messages[-1]["message"]
        after.wait(lambda: len(after.segments) >= 1)
    finally:
        scheduler.stop()


def test_a_prompt_that_cannot_be_encoded(pipe, tmp_path):
    """The first one ends the session; a later one is answered, and the session goes on with the prompt in force."""
    refused: Future = Future()
    refused.set_exception(ValueError("no such words"))

    def session(encode, name):
        stepped = pipe.stepped_session(PROMPT, seed=0)
        stepped._encode = encode
        return LiveSession(name, stepped, FlowControl(), transition=Transition(), folder=tmp_path, fps=16, scale=1, wake=lambda: None)

    first = session(lambda text: refused, "first")
    assert first.ended == "failed" and "no such words" in first.error and first.ready_at() is None
    done: Future = Future()
    done.set_result(None)
    later, watcher = session(lambda text: refused if text == OTHER else done, "later"), Watcher()
    watcher.admitted(later)
    later.update_prompt(OTHER, Transition())
    assert watcher.messages[-1]["code"] == "bad_prompt" and "no such words" in watcher.messages[-1]["message"]
    assert later.ended is None and later.stepped.newest_prompt == PROMPT
    later.end("stopped")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_segment(flow, clock, *, latency=0.5, seconds=0.75):
    due_at = flow.begin_block()
    flow.end_block()
    clock.now += latency
    flow.end_segment(due_at, seconds)


def test_flow_control_stops_until_segments_are_acknowledged():
    clock = Clock()
    flow = FlowControl(now=clock)
    for _ in range(MAX_UNACKNOWLEDGED):
        assert flow.ready_at() == 0.0  # at once: nothing is known of what the client plays
        make_segment(flow, clock)
    assert flow.ready_at() is None
    flow.acknowledge(7, None)  # of more than were made it cannot have any
    assert flow.ready_at() == 0.0
    for _ in range(MAX_UNACKNOWLEDGED):
        make_segment(flow, clock)
    flow.reconnect(4)
    assert flow.ready_at() == 0.0
    make_segment(flow, clock)
    assert flow.ready_at() is None


def test_flow_control_begins_a_block_as_late_as_its_segment_is_in_time():
    clock = Clock()
    flow = FlowControl(now=clock)
    make_segment(flow, clock)
    make_segment(flow, clock)
    flow.acknowledge(0, 2.0)  # and another segment of 0.75 s is on its way
    begin = clock.now + 2.75 - 1.1 * 0.5 - MARGIN
    assert flow.ready_at() == pytest.approx(begin)
    flow.end_block()
    assert flow.ready_at() == pytest.approx(begin + 0.75)
    flow.begin_at_once()
    assert flow.ready_at() == 0.0
    unpaced = FlowControl(realtime=False, now=clock)
    make_segment(unpaced, clock)
    unpaced.acknowledge(0, 2.0)
    assert unpaced.ready_at() == 0.0


def test_a_block_may_be_dropped_when_the_next_attempt_is_in_time_or_it_is_late_anyway():
    clock = Clock()
    flow = FlowControl(now=clock)
    make_segment(flow, clock)
    flow.acknowledge(0, 2.0)
    needed = clock.now + 2.0
    for left, allowed in ((1.9, True), (0.51, True), (0.49, False), (0.01, False), (-0.01, True)):
        clock.now = needed - left
        assert flow.may_preempt() is allowed, left


@pytest.mark.parametrize("allowed", [False, True])
def test_a_prompt_that_comes_while_a_block_is_made_drops_it_only_when_flow_control_allows_that(scheduler, monkeypatch, allowed):
    """The third block is held in its first denoising pass until the prompt has been accepted."""
    monkeypatch.setattr(FlowControl, "may_preempt", lambda self: allowed)
    forward, watcher, passes = type(scheduler.pipe.transformer).forward, Watcher(), []

    def held(network, x, t, *rest, **settings):
        passes.append(float(t.flatten()[0]))
        if passes.count(1000.0) == 3 and not any(message["type"] == "accepted" for message in watcher.messages):
            watcher.session.update_prompt(OTHER, Transition())
            watcher.wait(lambda: any(message["type"] == "accepted" for message in watcher.messages))
        return forward(network, x, t, *rest, **settings)

    monkeypatch.setattr(type(scheduler.pipe.transformer), "forward", held)
    begin(scheduler, watcher)
    watcher.wait(lambda: len(watcher.segments) >= 4)
    shown = [segment.message["prompt"] for segment in watcher.segments[:4]]
    assert shown == ([PROMPT, PROMPT, OTHER, OTHER] if allowed else [PROMPT, PROMPT, PROMPT, OTHER])


def test_sessions_that_are_always_ready_take_turns(pipe, tmp_path):
    """Round robin, also when the first of them would always have been ready first."""
    scheduler = SessionScheduler(pipe, folder=tmp_path, max_sessions=3, height=32, width=32, scale=1)
    sessions = [SimpleNamespace(name=name, ready_at=lambda: 0.0) for name in "abc"]
    scheduler.sessions.update({session.name: session for session in sessions})
    assert [scheduler._next_ready()[0].name for _ in range(7)] == list("abcabca")
    sessions[1].ready_at = lambda: None
    assert [scheduler._next_ready()[0].name for _ in range(4)] == list("caca")
    sessions[0].ready_at = sessions[2].ready_at = lambda: time.monotonic() + 0.1
    session, wait = scheduler._next_ready()
    assert session is None and 0 < wait < 0.11
