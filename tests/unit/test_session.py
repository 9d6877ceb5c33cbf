"""Sessions: prompts, pause, restart and stop from any thread, and the same video again from a timeline."""

import json
import threading
import time
import weakref
from concurrent.futures import Future, wait

import pytest
import torch

from longlive import LongLivePipeline
from longlive.generation.conditioning import Conditioner
from longlive.generation.cues import Cue, PromptQueue
from longlive.generation.session import SessionFailed, SessionVideo
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Transition

PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


@pytest.fixture(scope="module")
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


def images(blocks):
    return torch.cat([block.images for block in blocks], dim=1)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_timeline_makes_the_same_video_again(pipe, tmp_path, ahead):
    session = pipe.session(PROMPT, seed=3, ahead=ahead)
    blocks = [next(session), next(session)]
    session.prompt(OTHER, transition=Transition(False))
    blocks += [next(session) for _ in range(4)]
    session.stop()
    assert next(session, None) is None
    shown = blocks[-1].latent_frames.stop
    switch = next(block.latent_frames.start for block in blocks if block.prompt == OTHER)
    assert switch == 6 if not ahead else switch in (6, 9)
    session.timeline.save(tmp_path / "timeline.json")
    timeline = Timeline.load(tmp_path / "timeline.json")
    assert timeline.cues == [Cue(0, PROMPT), Cue(switch, OTHER, Transition(False))]
    assert timeline.seed == 3 and shown <= timeline.num_latent_frames <= shown + (3 if ahead else 0)
    again = list(pipe.session(timeline.schedule, num_latent_frames=timeline.num_latent_frames, seed=timeline.seed))
    assert torch.equal(images(again)[:, : images(blocks).shape[1]], images(blocks))
    assert [block.prompt for block in again[: len(blocks)]] == [block.prompt for block in blocks]


def test_a_session_without_a_seed_draws_one(pipe):
    one, two = pipe.session(PROMPT, num_latent_frames=3), pipe.session(PROMPT, num_latent_frames=3)
    assert one.timeline.seed != two.timeline.seed
    assert torch.equal(next(one).images, next(pipe.session(PROMPT, num_latent_frames=3, seed=one.timeline.seed)).images)
    with pytest.raises(ValueError, match="both seed and generator"):
        pipe.session(PROMPT, seed=1, generator=torch.Generator())


@pytest.mark.parametrize("ahead", [False, True])
def test_iteration_waits_while_a_session_is_paused(pipe, ahead):
    with pipe.session(PROMPT, num_latent_frames=12, seed=0, ahead=ahead) as session:
        first = next(session)
        session.pause()
        assert session.paused
        rest, begun = [], threading.Event()

        def go():
            begun.set()
            rest.extend(session)

        thread = threading.Thread(target=go)
        thread.start()
        begun.wait()
        time.sleep(0.3)
        assert len(rest) <= (1 if ahead else 0)  # the block that was being made
        session.prompt(OTHER)
        session.resume()
        thread.join(30)
        assert not thread.is_alive() and len(rest) == 3
        assert (first.prompt, rest[-1].prompt) == (PROMPT, OTHER)


@pytest.mark.parametrize("ahead", [False, True])
def test_stop_ends_a_paused_session(pipe, ahead):
    session = pipe.session(PROMPT, seed=0, ahead=ahead)
    next(session)
    session.pause()
    left = []
    thread = threading.Thread(target=lambda: left.extend(session))
    thread.start()
    time.sleep(0.1)
    session.stop()
    session.stop()
    thread.join(30)
    assert not thread.is_alive() and len(left) <= 1 and session.stopped


def test_stop_does_not_wait_for_the_block_that_is_being_made(pipe, monkeypatch):
    """As Ctrl-C does not; also when the block begins a prompt, which a newer one would not interrupt."""
    forward, passes, begun = pipe.transformer.forward, [], threading.Event()
    for at_a_switch in (False, True):
        session = pipe.session(PROMPT, seed=0, ahead=True)
        next(session)
        while session.timeline.num_latent_frames < 6:
            time.sleep(0.001)
        if at_a_switch:
            session.prompt(OTHER)

        def slow(*inputs, session=session):
            passes.append(begun.set())
            while not session.stopped:
                time.sleep(0.001)
            return forward(*inputs)

        monkeypatch.setattr(pipe.transformer, "forward", slow)
        next(session)
        assert begun.wait(30)
        session.stop()
        assert len(passes) == 1 and next(session, None) is None
        monkeypatch.setattr(pipe.transformer, "forward", forward)
        passes.clear()
        begun.clear()


def test_restart_is_another_video_with_the_prompt_in_force(pipe):
    session = pipe.session(PROMPT, seed=0)
    first = [next(session), next(session)]
    session.restart()
    again = [next(session), next(session)]
    assert torch.equal(images(again), images(first)) and [block.video_index for block in again] == [1, 1]
    assert again[0].latent_frames == range(3) and session.timeline.num_latent_frames == 6
    session.prompt(OTHER)
    session.restart(7)  # what was typed before it was shown counts
    other = next(session)
    assert (other.prompt, other.video_index, session.timeline.seed) == (OTHER, 2, 7)
    assert torch.equal(other.images, next(pipe.session(OTHER, seed=7)).images)
    session.prompt(PROMPT)
    next(session)
    session.restart()
    assert next(session).prompt == PROMPT


def test_a_block_is_made_again_with_a_prompt_that_comes_meanwhile(pipe, monkeypatch):
    """The prompt comes during the first pass of the third block, which then shows it; the timeline still makes the same video."""
    passes, session = [], None
    forward = type(pipe.transformer).forward

    def watched(network, x, t, *rest, **settings):
        passes.append(float(t.flatten()[0]))
        if session is not None and passes.count(1000.0) == 3 and session.newest_prompt == PROMPT:
            session.prompt(OTHER)
        return forward(network, x, t, *rest, **settings)

    monkeypatch.setattr(type(pipe.transformer), "forward", watched)
    asked = []
    session = pipe.stepped_session(PROMPT, num_latent_frames=15, seed=4, preempt=lambda: asked.append(1) is None)
    blocks = []
    while (step := session.advance()) is not None:
        video, block = step
        blocks.append(video.decode(block))
    assert asked and [block.prompt for block in blocks] == [PROMPT] * 2 + [OTHER] * 3
    assert passes.count(1000.0) == 6  # five blocks, one of them made twice
    monkeypatch.undo()
    again = list(pipe.session(session.timeline.schedule, num_latent_frames=15, seed=4))
    assert torch.equal(images(again), images(blocks))


def test_a_transition_is_one(pipe):
    session = pipe.session(PROMPT, seed=0)
    with pytest.raises(ValueError, match="True is no Transition; write Transition"):
        session.prompt(OTHER, transition=True)
    with pytest.raises(ValueError, match="keep_sink 'yes' is neither True nor False"):
        Transition("yes")


def test_a_stepped_session_switches_once_the_prompt_is_encoded_and_the_newest_wins(pipe):
    session, encodings = pipe.stepped_session(PROMPT, seed=0), {}
    session._encode = lambda text: encodings.setdefault(text, Future())

    def prompt_shown():
        return session.advance()[1].cue.prompt

    assert session.newest_prompt == PROMPT and prompt_shown() == PROMPT
    first, second = session.prompt_when_encoded("first"), session.prompt_when_encoded("second", transition=Transition(False))
    assert prompt_shown() == session.newest_prompt == PROMPT  # goes on with it meanwhile
    encodings["first"].set_result(None)
    assert first.result(0) is False and not second.done() and prompt_shown() == PROMPT
    encodings["second"].set_result(None)
    assert second.result(0) is True and session.newest_prompt == "second" and prompt_shown() == "second"
    assert session.timeline.cues[-1].transition == Transition(False)
    third = session.prompt_when_encoded("third")
    session.prompt(OTHER)  # does not wait, and is newer
    encodings["third"].set_result(None)
    assert third.result(0) is False and prompt_shown() == OTHER
    fourth = session.prompt_when_encoded("fourth")
    encodings["fourth"].set_exception(RuntimeError("no"))
    assert isinstance(fourth.exception(0), RuntimeError) and prompt_shown() == OTHER
    for put in (session.prompt, session.prompt_when_encoded):
        with pytest.raises(ValueError, match="the prompt is empty"):
            put("  ")


def test_a_slow_consumer_slows_generation(pipe):
    with pipe.session(PROMPT, seed=0, ahead=True) as session:
        next(session)
        time.sleep(0.5)
        assert session.timeline.num_latent_frames <= 6  # one block shown, one ahead


def test_an_error_in_a_block_is_raised_by_the_iteration(pipe, monkeypatch):
    session = pipe.session(PROMPT, seed=0, ahead=True)
    next(session)
    broken = RuntimeError("the device is gone")

    def fail(*_):
        raise broken

    monkeypatch.setattr(SessionVideo, "next_block", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        for _ in range(3):
            next(session)
    session.stop()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("where", ["block", "decode"])
def test_a_session_that_failed_says_so_at_every_use(pipe, monkeypatch, where, ahead):
    """An error or Ctrl-C within a block: no silence afterwards, and no block that was made from half a state."""
    session = pipe.session(PROMPT, seed=0, num_latent_frames=12, ahead=ahead)
    next(session)
    broken = RuntimeError("the device is gone") if ahead and where == "block" else KeyboardInterrupt()

    def fail(*_):
        raise broken

    monkeypatch.setattr(SessionVideo, "next_block" if where == "block" else "decode", fail)
    with pytest.raises(type(broken)):
        for _ in range(3):
            next(session)
    monkeypatch.undo()
    for use in (
        lambda: next(session),
        lambda: list(session),
        lambda: session.prompt(PROMPT),
        session.pause,
        session.resume,
        session.restart,
        lambda: session._steps.prompt_when_encoded(PROMPT),
    ):
        with pytest.raises(SessionFailed) as failed:
            use()
        assert "this session ended within a block" in str(failed.value) and failed.value.__cause__ is broken
    assert session.timeline.num_latent_frames >= 3
    session.stop()


def test_an_interrupted_wait_loses_no_block(pipe, monkeypatch):
    """Ctrl-C while another thread makes the block: iteration continues with that block."""
    expected = images(pipe.session(PROMPT, seed=0, num_latent_frames=12))
    session = pipe.session(PROMPT, seed=0, num_latent_frames=12, ahead=True)
    blocks, interrupted = [], []

    def interrupt(futures):
        if len(interrupted) <= len(blocks):
            interrupted.append(len(blocks))
            raise KeyboardInterrupt
        return wait(futures)

    monkeypatch.setattr("longlive.generation.session.wait", interrupt)
    for _ in range(9):
        try:
            blocks.append(next(session))
        except KeyboardInterrupt:
            continue
        except StopIteration:
            break
    assert len(blocks) == 4 and interrupted[:4] == [0, 1, 2, 3]
    assert torch.equal(images(blocks), expected)


@pytest.mark.parametrize("seed", [2**70, 2**63, -1, 1.5, "1", True])
def test_a_seed_is_checked_when_it_is_given(pipe, seed):
    session = pipe.session(PROMPT, seed=0)
    with pytest.raises(ValueError, match=r"choose a whole number from 0 to 2.63 - 1"):
        session.restart(seed)
    with pytest.raises(ValueError, match=r"choose a whole number from 0 to 2.63 - 1"):
        pipe.session(PROMPT, seed=seed)
    assert next(session).video_index == 0


def test_what_a_session_is_given_is_checked_at_once(pipe):
    for settings, words in (
        ({"batch": 0}, "batch 0"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ({"height": 32.0}, "height 32.0"),
        ({"num_latent_frames": True}, "num_latent_frames True"),
        ({"prompt": None}, "the prompt .*is a NoneType, not text"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.session(**{"prompt": PROMPT} | settings)
    session = pipe.session(PROMPT, seed=0)
    with pytest.raises(ValueError, match="is a int, not text"):
        session.prompt(3)


class SlowEncoder:
    """Keeps the prompts that it is asked for, and waits for `go`."""

    def __init__(self, encoder):
        self.encoder, self.asked, self.go = encoder, [], threading.Event()

    def encode(self, prompts):
        self.asked += prompts
        assert self.go.wait(30)
        if prompts == ["bad"]:
            raise RuntimeError("no")
        return self.encoder.encode(prompts)


def test_prompts_are_encoded_in_another_thread_and_only_the_newest_of_many(pipe):
    encoder = SlowEncoder(pipe._text.text_encoder)
    conditioner = Conditioner(encoder, pipe.transformer)
    futures = [conditioner.submit(f"prompt {n}", owner="one") for n in range(100)]
    assert conditioner.submit("prompt 99", owner="one") is futures[99] and not futures[99].done()
    encoder.go.set()
    newest = conditioner.project("prompt 99")
    assert len(encoder.asked) <= 6 and encoder.asked[-1] == "prompt 99"
    found = pipe.transformer.project_text(encoder.encoder.encode(["prompt 99"]))
    torch.testing.assert_close(newest, found, atol=0, rtol=0)
    for _ in range(2):  # after an error it is tried again
        with pytest.raises(RuntimeError, match="no"):
            conditioner.project("bad")
    assert encoder.asked.count("bad") == 2


def test_prompts_of_others_are_never_cancelled(pipe):
    """However many wait, and also when one of them has the same prompt as somebody who asks for another one."""
    encoder = SlowEncoder(pipe._text.text_encoder)
    conditioner = Conditioner(encoder, pipe.transformer)
    futures = [conditioner.submit(f"prompt {n}", owner=n) for n in range(8)]
    shared = conditioner.submit("prompt 5", owner="another")
    conditioner.submit("prompt 8", owner="another")
    replaced = conditioner.submit("prompt 9", owner=7)
    encoder.go.set()
    wait([*futures, shared, replaced], timeout=30)
    assert [future.cancelled() for future in futures] == [False] * 7 + [True]  # the owner of the last one replaced it
    assert shared.result() is futures[5].result() and replaced.result() is not None
    assert not conditioner._newest and len(conditioner._cache) == conditioner.cached_prompts


def test_a_queue_of_prompts_goes_on_after_a_restart(pipe):
    queue = PromptQueue(PROMPT)
    session = pipe.session(queue, seed=1)
    assert next(session).prompt == PROMPT
    session.restart()
    again = next(session)
    assert (again.prompt, again.video_index, again.latent_frames.start) == (PROMPT, 1, 0)
    queue.put(OTHER)
    assert next(session).prompt == OTHER
    queue.put(PROMPT)
    session.restart()  # a prompt that waits in the queue is newer than the one in force
    again = next(session)
    assert again.prompt == PROMPT and again.video_index == 2 and next(session).prompt == PROMPT
    session.stop()


def test_a_restart_frees_the_cache_before_it_makes_another(pipe, monkeypatch):
    make, made, alive = pipe._cache, [], []

    def counted(*size):
        alive.append(sum(cache() is not None for cache in made))
        made.append(weakref.ref(cache := make(*size)))
        return cache

    monkeypatch.setattr(pipe, "_cache", counted)
    steps = pipe.stepped_session(PROMPT, seed=0)
    video, block = steps.advance()
    steps.restart()
    steps.advance()
    assert alive == [0, 0] and video.decode(block).images.shape[1] == 9  # the last block of the video before is still to be decoded


def test_a_timeline_of_version_1(tmp_path):
    path = tmp_path / "timeline.json"
    path.write_text(
        """{
  "version": 1,
  "seed": 7,
  "settings": {"height": 64, "width": 64, "block": 3, "window": 9, "sink": 3, "keep_sink": false},
  "cues": [
    {"frame": 0, "prompt": "a red circle", "keep_sink": null},
    {"frame": 6, "prompt": "a blue square", "keep_sink": true}
  ],
  "num_frames": 12
}
"""
    )
    timeline = Timeline.load(path)
    assert timeline.cues == [Cue(0, "a red circle"), Cue(6, "a blue square", Transition(True))]
    assert (timeline.seed, timeline.num_latent_frames) == (7, 12) and timeline.settings["recache"] == "joint"
    timeline.save(path)
    assert json.loads(path.read_text())["version"] == 2 and Timeline.load(path) == timeline


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "is not a timeline: it is of version 3, and this program reads versions 1 and 2"),
        ({"cues": None}, "is not a timeline: TypeError"),
        ({"num_latent_frames": 0}, "ended before its first block"),
        ({"cues": [{"latent_frame": 3, "prompt": "a", "transition": None}]}, "must begin at latent frame 0"),
        (
            {"num_latent_frames": 3, "cues": [{"latent_frame": n, "prompt": "a", "transition": None} for n in (0, 3)]},
            "beyond the video's end",
        ),
    ],
)
def test_files_that_are_not_timelines(pipe, tmp_path, change, words):
    session = pipe.session(PROMPT, seed=0)
    next(session)
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps(session.timeline.to_json() | change))
    with pytest.raises(ValueError, match=words):
        Timeline.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a timeline"):
        Timeline.load(path)
    with pytest.raises(ValueError, match="there is no timeline"):
        Timeline.load(tmp_path / "other.json")
