"""The parts of the server one by one: fragments, messages, access, flow control, and sessions that share a model."""

import io
import threading
import time
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace

import av
import numpy as np
import pytest

from longlive import LongLivePipeline, video
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Transition
from longlive.serving.access import Access, RateLimiter, is_local
from longlive.serving.flow_control import MARGIN, MAX_UNACKNOWLEDGED, FlowControl
from longlive.serving.fragments import FragmentEncoder, jpegs, move_fragment
from longlive.serving.live_session import LiveSession
from longlive.serving.messages import Refused, parse_first, parse_later, prompt_text
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
    assert closed.has_token("Bearer secret-token", None) and closed.has_token(None, "secret-token")
    assert not closed.has_token(None, None) and not closed.has_token("Bearer secret-toke", "é")
    assert closed.is_own_host("video.example:8000")
    local = Access(None, host="127.0.0.1")
    assert local.has_token(None, None) and local.is_own_host("localhost:8000") and local.is_own_host("[::1]:8000")
    assert not local.is_own_host("evil.example:8000") and not local.is_own_host(None)
    assert local.is_own_origin(None, "localhost:8000") and local.is_own_origin("http://localhost:8000", "localhost:8000")
    assert not local.is_own_origin("http://evil.example", "localhost:8000") and not local.is_own_origin("null", "localhost:8000")


def test_rate_limiter():
    limiter = RateLimiter(50, burst=0.1)
    assert limiter.allow() and [limiter.allow() for _ in range(20)].count(True) <= 6
    time.sleep(limiter.wait + 0.01)
    assert limiter.wait == 0 and limiter.allow()


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
        self.positions.append(position)

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
    assert three.positions[-1] == 1 and four.positions[-1] == 2
    scheduler.leave(three)
    assert four.positions[-1] == 1
    one.session.end("stopped")
    scheduler.wake()
    four.wait(lambda: len(four.segments) >= 1)


def test_ended_sessions_make_room_while_another_is_always_ready(scheduler):
    """And only the names of their files are kept."""
    busy, short = begin(scheduler), begin(scheduler)
    after = begin(scheduler)
    for watcher in (busy, short):
        watcher.wait(lambda w=watcher: len(w.segments) >= 2)
    short.session.end("stopped")
    after.wait(lambda: len(after.segments) >= 2)
    after.wait(lambda: short.session.name in scheduler.ended_sessions, 5)
    assert short.session.name not in scheduler.sessions
    files = scheduler.files_of(short.session.name)
    assert files.recording.is_file() and files.timeline_file.is_file()
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
    session.detach(watcher)
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
    session.detach(back)  # has no effect: another client has replaced it
    assert session.disconnected_at is None
    session.detach(other)
    deadline = time.monotonic() + 10
    while session.ended is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session.ended == "the connection was lost"
    with pytest.raises(Refused, match="has ended"):
        scheduler.running(session.name)
    assert scheduler.files_of(session.name) is not None


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
    watcher = begin(scheduler)
    watcher.wait(lambda: bool(watcher.segments))

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watcher.session._recorder, "_write", full)
    watcher.wait(lambda: any(message.get("code") == "disk_full" for message in watcher.messages))
    before = len(watcher.segments)
    watcher.wait(lambda: len(watcher.segments) >= before + 3)
    assert sum(message.get("code") == "disk_full" for message in watcher.messages) == 1


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
