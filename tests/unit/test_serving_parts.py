"""Parts of the server one by one: fragments that play, messages, who may talk, and sessions that share a model."""

import io
import threading
import time
from concurrent.futures import Future

import av
import numpy as np
import pytest

from longlive import LongLivePipeline, video
from longlive.generation.timeline import Timeline
from longlive.serving import live as live_module
from longlive.serving.access import Access, Allowance, is_local
from longlive.serving.fragments import FragmentEncoder, jpegs, placed
from longlive.serving.hub import Hub
from longlive.serving.messages import Refused, prompt_of, read_first, read_later

PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


def moving(count, start=0):
    """Images of a bar that goes right, uint8 [count, 32, 32, 3]."""
    images = np.full((count, 32, 32, 3), 40, dtype=np.uint8)
    for n in range(count):
        images[n, :, (start + n) % 32] = (200, 60, 60)
    return images


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        return [(float(f.pts * f.time_base), f.key_frame, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


def test_fragments_play_alone_together_and_from_the_middle():
    encoder = FragmentEncoder(fps=16, scale=2, crf=0)
    chunks = [moving(9), moving(12, 9), moving(12, 21)]
    fragments = [encoder.encode(chunk) for chunk in chunks]
    assert encoder.mime.startswith('video/mp4; codecs="avc1.') and encoder.num_images == 33
    whole = decoded(encoder.header + b"".join(fragments))
    assert [round(16 * seconds) for seconds, _, _ in whole] == list(range(33))
    assert {0, 9, 21} <= {n for n, (_, key, _) in enumerate(whole) if key}
    for (_, _, image), wanted in zip(whole, np.concatenate(chunks)):
        assert np.abs(image[::2, ::2].astype(int) - wanted).mean() < 6  # colours go through 4:2:0
    middle = decoded(encoder.header + fragments[1])
    assert [(round(16 * seconds), image.tobytes()) for seconds, _, image in middle] == [
        (round(16 * seconds), image.tobytes()) for seconds, _, image in whole[9:21]
    ]
    moved = decoded(encoder.header + placed(fragments[2], 1, 0.0) + placed(fragments[1], 2, 0.75))
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
        ('{"type": "ack", "chunk": 1, "ahead": -2}', "greater than or equal to 0"),
        ('{"type": "start", "prompts": ["a"]}', "start"),
    ],
)
def test_messages_that_are_refused(text, words):
    with pytest.raises(Refused, match=words) as refused:
        read_later(text)
    assert refused.value.told()["code"] == "bad_message" and not refused.value.fatal
    if '"start"' not in text:
        with pytest.raises(Refused) as refused:
            read_first(text)
        assert refused.value.fatal


def test_prompts():
    assert prompt_of(read_first('{"type": "start", "prompts": [" one "]}').prompts, 10) == "one"
    assert prompt_of(read_later('{"type": "update", "prompts": [{"text": "two"}]}').prompts, 3) == "two"
    for text, words in (("  ", "empty"), ("four", "has 4 characters; at most 3")):
        with pytest.raises(Refused, match=words):
            prompt_of([text], 3)


def test_who_may_talk():
    assert is_local("127.0.0.1") and is_local("::1") and is_local("localhost") and not is_local("0.0.0.0")
    closed = Access("secret-token", host="0.0.0.0")
    assert closed.knows_token("Bearer secret-token", None) and closed.knows_token(None, "secret-token")
    assert not closed.knows_token(None, None) and not closed.knows_token("Bearer secret-toke", "é")
    assert closed.right_host("video.example:8000")
    local = Access(None, host="127.0.0.1")
    assert local.knows_token(None, None) and local.right_host("localhost:8000") and local.right_host("[::1]:8000")
    assert not local.right_host("evil.example:8000") and not local.right_host(None)
    assert local.right_origin(None, "localhost:8000") and local.right_origin("http://localhost:8000", "localhost:8000")
    assert not local.right_origin("http://evil.example", "localhost:8000") and not local.right_origin("null", "localhost:8000")


def test_allowance():
    allowance = Allowance(50, reserve=0.1)
    assert allowance.take() and [allowance.take() for _ in range(20)].count(True) <= 6
    time.sleep(allowance.wait + 0.01)
    assert allowance.take()


class Watcher:
    """A client that takes what comes, and acknowledges it unless it is told not to."""

    def __init__(self, *, takes=True, ahead=None):
        self.messages, self.pieces, self.places = [], [], []
        self.live, self.takes, self.ahead = None, takes, ahead
        self.news = threading.Condition()

    def changed(self):
        with self.news:
            if self.live is not None:
                for piece in self.live.pieces_from(len(self.pieces)):
                    self.pieces.append(piece)
                    if self.takes:
                        self.live.acknowledge(piece.number, self.ahead)
            self.news.notify_all()

    def told(self, message):
        with self.news:
            self.messages.append(message)
            self.news.notify_all()

    def place(self, number):
        self.places.append(number)

    def admitted(self, live):
        self.live = live
        live.attach(self)

    def wait(self, condition, seconds=30.0):
        with self.news:
            assert self.news.wait_for(condition, seconds), (self.messages, len(self.pieces), self.live and self.live.ended)


@pytest.fixture(scope="module")
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


@pytest.fixture
def hub(pipe, tmp_path):
    hub = Hub(pipe, folder=tmp_path, most=2, height=32, width=32, scale=1, reconnect_seconds=0.5)
    hub.start()
    yield hub
    hub.stop()


def begin(hub, watcher=None, prompt=PROMPT, seed=0):
    watcher = watcher or Watcher()
    hub.open(watcher, prompt, seed=seed, keep_sink=None)
    return watcher


def test_sessions_take_turns_and_their_recordings_are_what_was_shown(hub, pipe, tmp_path):
    one, two = begin(hub), begin(hub, prompt=OTHER, seed=1)
    for watcher in (one, two):
        watcher.wait(lambda w=watcher: len(w.pieces) >= 6)
    assert abs(one.live.cost.chunks - two.live.cost.chunks) <= 2
    one.live.update_prompt(OTHER, False)
    one.wait(lambda: any(message["type"] == "accepted" for message in one.messages))
    one.wait(lambda: one.pieces[-1].about["prompt"] == OTHER)
    for watcher in (one, two):
        watcher.live.end("stopped")
        watcher.live.join()
        shown = sum(piece.about["images"] for piece in watcher.pieces)
        assert video.probe(watcher.live.recording).images >= shown
    made = one.live.session.timeline
    again = list(pipe.session(made.schedule, num_latent_frames=made.num_latent_frames, seed=made.seed))
    for piece, chunk in zip(one.pieces, again):
        assert (piece.images == chunk.images[0].numpy()).all() and piece.about["prompt"] == chunk.prompt
    assert made.cues[-1].prompt == OTHER and made.cues[-1].keep_sink is False


def test_generation_waits_for_a_client_that_does_not_take_its_chunks(hub):
    slow, quick = begin(hub, Watcher(takes=False)), begin(hub)
    quick.wait(lambda: len(quick.pieces) >= 8)
    assert len(slow.pieces) == live_module.UNACKNOWLEDGED
    slow.live.acknowledge(0, None)
    slow.wait(lambda: len(slow.pieces) == live_module.UNACKNOWLEDGED + 1)


def test_generation_keeps_pace_with_who_plays(hub):
    watcher = begin(hub, Watcher(ahead=0.6))
    watcher.wait(lambda: len(watcher.pieces) >= 3)
    before, clock = len(watcher.pieces), time.monotonic()
    watcher.wait(lambda: len(watcher.pieces) >= before + 3)
    assert time.monotonic() - clock > 0.5  # far slower than it could
    for _ in range(3):  # and evenly: never several at once
        before = len(watcher.pieces)
        watcher.wait(lambda least=before: len(watcher.pieces) > least)
        time.sleep(0.1)
        assert len(watcher.pieces) == before + 1


def test_who_comes_too_many_waits_and_learns_the_place(hub):
    one, two, three, four = (begin(hub) for _ in range(4))
    assert (one.live and two.live) and three.live is four.live is None
    assert three.places[-1] == 1 and four.places[-1] == 2
    hub.leave(three)
    assert four.places[-1] == 1
    one.live.end("stopped")
    hub.wake()
    four.wait(lambda: len(four.pieces) >= 1)


def test_ended_sessions_make_room_while_others_are_always_ready(hub):
    """And leave no more behind than the names of their files."""
    busy, short = begin(hub), begin(hub)
    after = begin(hub)
    for watcher in (busy, short):
        watcher.wait(lambda w=watcher: len(w.pieces) >= 2)
    short.live.end("stopped")
    after.wait(lambda: len(after.pieces) >= 2)
    after.wait(lambda: short.live.name in hub.over, 5)
    files = hub.known(short.live.name)
    assert not isinstance(files, live_module.Live) and files.recording.is_file() and files.timeline_file.is_file()
    assert set(hub.sessions) == {busy.live.name, after.live.name} and busy.live.ended is None


def test_what_the_session_does_with_its_sink_unless_a_prompt_says(hub):
    watcher = Watcher()
    hub.open(watcher, PROMPT, seed=0, keep_sink=True)
    for prompt, said, wanted in ((OTHER, None, True), (PROMPT, False, False)):
        watcher.live.update_prompt(prompt, said)
        watcher.wait(lambda p=prompt: watcher.pieces and watcher.pieces[-1].about["prompt"] == p)
        assert watcher.live.session.timeline.cues[-1].keep_sink is wanted


def test_a_lost_client_comes_back_in_time_or_not(hub):
    watcher = begin(hub)
    watcher.wait(lambda: len(watcher.pieces) >= 3)
    live = watcher.live
    live.detach(watcher)
    back = Watcher()
    back.live, back.pieces = hub.find(live.name), list(watcher.pieces)
    live.attach(back, next_chunk=len(back.pieces))
    back.wait(lambda: len(back.pieces) >= len(watcher.pieces) + 3)
    numbers = [piece.number for piece in back.pieces]
    assert numbers == list(range(len(numbers)))
    other = Watcher()
    other.live = live
    live.attach(other)
    assert back.messages[-1]["code"] == "taken_over"
    live.detach(back)  # too late: it has the session no more
    assert live.lost_at is None
    live.detach(other)
    hub_deadline = time.monotonic() + 10
    while live.ended is None and time.monotonic() < hub_deadline:
        time.sleep(0.05)
    assert live.ended == "the connection was lost"
    with pytest.raises(Refused, match="has ended"):
        hub.find(live.name)
    assert hub.known(live.name) is not None


def test_a_model_that_fails_in_one_session_serves_the_other(hub, monkeypatch):
    bad, good = begin(hub), begin(hub)
    bad.wait(lambda: bool(bad.pieces))

    def fail():
        raise FloatingPointError("latents are not finite")

    monkeypatch.setattr(bad.live.session, "advance", fail)
    bad.wait(lambda: bad.live.ended == "failed")
    assert "latents are not finite" in bad.live.error
    before = len(good.pieces)
    good.wait(lambda: len(good.pieces) > before + 2)
    bad.live.join()
    assert video.probe(bad.live.recording).images >= sum(piece.about["images"] for piece in bad.pieces)


def test_an_encoder_that_fails_ends_its_session(hub, monkeypatch):
    bad = begin(hub)
    bad.wait(lambda: bool(bad.pieces))
    monkeypatch.setattr(bad.live._encoder, "encode", lambda images: 1 / 0)
    bad.wait(lambda: bad.live.ended == "failed")
    assert "cannot be encoded" in bad.live.error


def test_a_full_disk_ends_the_recording_and_not_the_session(hub, monkeypatch):
    watcher = begin(hub)
    watcher.wait(lambda: bool(watcher.pieces))

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watcher.live._recorder, "_write", full)
    watcher.wait(lambda: any(message.get("code") == "disk_full" for message in watcher.messages))
    before = len(watcher.pieces)
    watcher.wait(lambda: len(watcher.pieces) >= before + 3)
    assert sum(message.get("code") == "disk_full" for message in watcher.messages) == 1


def test_a_restart_begins_another_recording(hub):
    watcher = begin(hub)
    watcher.wait(lambda: len(watcher.pieces) >= 2)
    first = watcher.live.recording
    watcher.live.restart(5)
    watcher.wait(lambda: watcher.pieces[-1].about["take"] == 1)
    watcher.live.end("stopped")
    watcher.live.join()
    assert watcher.live.recording != first
    again = next(hub.pipe.session(PROMPT, num_latent_frames=3, seed=5)).images[0].numpy()
    piece = next(piece for piece in watcher.pieces if piece.about["take"] == 1)
    assert (piece.images == again).all() and piece.about["frames"] == [0, 3]
    for file, seed in ((first, 0), (watcher.live.recording, 5)):
        assert Timeline.load(file.with_suffix(".timeline.json")).seed == seed
    for file in (first, watcher.live.recording):
        images = video.read_video(file)
        assert len(images) in range(9, 12 * len(watcher.pieces))


def test_nobody_types_or_takes_anything(pipe, tmp_path):
    hub = Hub(pipe, folder=tmp_path, most=1, height=32, width=32, scale=1, idle_seconds=0.3)
    hub.start()
    try:
        watcher = begin(hub, Watcher(takes=False))
        watcher.wait(lambda: watcher.live.ended == "idle", 10)
    finally:
        hub.stop()


def test_a_prompt_that_cannot_be_read(pipe, tmp_path):
    failed: Future = Future()
    failed.set_exception(ValueError("no such words"))
    live = live_module.Live(
        "name",
        pipe.session(PROMPT, seed=0),
        first=(PROMPT, None),
        prepare=lambda text: failed,
        folder=tmp_path,
        fps=16,
        scale=1,
        realtime=True,
        wake=lambda: None,
    )
    assert live.ended == "failed" and "no such words" in live.error and live.ready_at() is None
