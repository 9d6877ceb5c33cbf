"""Two caches, one behaviour: both equal a naive one written from the specification, in every combination of settings."""

from contextlib import contextmanager

import pytest
import torch

from longlive.cache.history import HistoryCache
from longlive.cache.ring import RingCache
from longlive.cache.window import Window, block_mask
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.ops.rope import rotate, turn_in_time
from longlive.training.teacher_forcing import MaskedView

BLOCK, TOKENS, HEADS, HEAD_DIM, LAYERS = 3, 4, 2, 12, 2
STEPS = [1000.0, 833.0]


@pytest.fixture(autouse=True)
def _frozen(model):
    model.requires_grad_(False)


def ring(window, batch=2, relative=False):
    shape = {"num_layers": LAYERS, "batch": batch, "tokens_per_frame": TOKENS, "num_heads": HEADS, "head_dim": HEAD_DIM}
    return RingCache(**shape, window=window, relative=relative)


class NaiveCache:
    """The specification, frame by frame: remembers everything, lists what is visible, copies it together."""

    mask = None

    def __init__(self, window, relative=False):
        self.window, self.relative, self.end = window, relative, 0
        self.memory = {}  # (frame, layer) -> key, value
        self.sink = list(range(window.sink))
        self.oldest = 0  # frames before it are forgotten, but for the sink

    def view(self, span):
        self.frames = span
        recent = [f for f in range(max(self.oldest, span.stop - self.window.recent), span.start) if f not in self.sink]
        self.visible = [f for f in self.sink if f < span.start] + recent
        self.recording = False
        return self

    @contextmanager
    def record(self, span):
        self.view(span)
        self.recording = True
        yield self
        self.recording = False
        self.end = span.stop

    def extend(self, layer, k, v):
        keys, values = k.chunk(len(self.frames), 1), v.chunk(len(self.frames), 1)
        if self.recording:
            self.memory |= {(f, layer): (keys[i], values[i]) for i, f in enumerate(self.frames)}
        past = [self.memory[f, layer] for f in self.visible]
        if self.relative:  # number the visible frames in order, the span right after them
            start = self.frames.start - len(self.visible)
            past = [
                (rotate(key, turn_in_time(start + i - f, HEAD_DIM)), value) for i, (f, (key, value)) in enumerate(zip(self.visible, past))
            ]
        return torch.cat([*(key for key, _ in past), k], 1), torch.cat([*(value for _, value in past), v], 1)

    def forget(self, *, keep_sink):
        end = self.end
        if keep_sink and end > self.window.visible:
            self.end = end - self.window.recent
        else:
            self.end = end - min(end, self.window.visible)
            self.sink = list(range(self.end, self.end + self.window.sink))
        self.oldest = self.end
        return range(self.end, end)


def run(model, cache, *, num_blocks, switch=None, keep_sink=True, seed=0, texts=None):
    generator = torch.Generator().manual_seed(seed)
    texts = texts or [torch.randn(2, 5, 8, generator=generator) for _ in range(2)]
    rollout = Rollout(Denoiser(model), cache, steps=STEPS, draw=lambda like: torch.randn(like.shape, generator=generator))
    made, text = [], texts[0]
    for block in range(num_blocks):
        if switch is not None and block * BLOCK == switch:
            text = texts[1]
            rollout.switch(text, keep_sink=keep_sink)
        made.append(rollout.block(torch.randn(2, BLOCK, 4, 4, 4, generator=generator), text))
        rollout.remember(made[-1], text)
    return torch.cat(made, 1)


WINDOWS = [Window(sink, visible - sink) for sink in (0, 3) for visible in (6, 9, 12)] + [
    Window.full(24),
    Window(4, 7),
    Window(1, 3),
    Window(2, 5),
]


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_ring_and_history_equal_the_naive_cache(model, window, relative):
    for switch in (None, 3, 6, 9, 12, 15):  # before the window is full, when it is, and beyond
        for keep_sink in (True, False) if switch else (True,):
            settings = {"num_blocks": 7, "switch": switch, "keep_sink": keep_sink}
            expected = run(model, NaiveCache(window, relative), **settings)
            for cache in (ring(window, relative=relative), HistoryCache(window=window, relative=relative)):
                torch.testing.assert_close(
                    run(model, cache, **settings), expected, atol=2e-5, rtol=0, msg=f"{type(cache).__name__} {settings}"
                )


def test_a_switch_changes_the_video_and_the_sink_mode_matters(model):
    window = Window(3, 3)
    plain, kept, refreshed = (
        run(model, ring(window), num_blocks=6, switch=s, keep_sink=k) for s, k in ((None, True), (12, True), (12, False))
    )
    assert torch.equal(plain[:, :12], kept[:, :12])
    assert (plain[:, 12:] - kept[:, 12:]).abs().max() > 1e-3
    assert (refreshed[:, 12:] - kept[:, 12:]).abs().max() > 1e-3


def test_denoising_leaves_nothing_behind(model):
    """However many passes a block took, the next block sees only what `remember` wrote."""
    text = torch.randn(2, 5, 8)
    results = []
    for steps in ([1000.0], [1000.0, 700.0, 300.0]):
        torch.manual_seed(1)
        rollout = Rollout(Denoiser(model), ring(Window(3, 3)), steps=steps, draw=torch.zeros_like)
        x0 = torch.randn(6, 2, BLOCK, 4, 4, 4)
        for block in x0:
            rollout.block(block, text)
            rollout.remember(block, text)
        results.append(rollout.denoiser(x0[0], 500.0, text, rollout.cache.view(range(18, 21))).velocity)
    assert torch.equal(*results)


def test_kept_sink_stays_bit_identical_and_the_rest_is_rewritten(model):
    cache, texts = ring(Window(3, 6)), torch.randn(2, 2, 5, 8)
    rollout = Rollout(Denoiser(model), cache, steps=STEPS, draw=torch.zeros_like)
    for _ in range(5):
        rollout.remember(torch.randn(2, BLOCK, 4, 4, 4), texts[0])
    before = cache.keys.clone(), cache.values.clone()
    rollout.switch(texts[1], keep_sink=True)
    sink = slice(0, 3 * TOKENS)
    assert torch.equal(cache.keys[:, :, sink], before[0][:, :, sink])
    assert torch.equal(cache.values[:, :, sink], before[1][:, :, sink])
    changed = (cache.values[1] != before[1][1]).flatten(2).any(-1)[:, 3 * TOKENS :]
    assert changed.all()


def test_forget_says_what_to_read_again():
    for cache in (ring(Window(3, 9)), HistoryCache(window=Window(3, 9))):
        for end, keep_sink, expected in (
            (6, True, range(0, 6)),
            (12, True, range(0, 12)),
            (15, True, range(6, 15)),
            (15, False, range(3, 15)),
        ):
            cache.reset()
            cache.end = end
            assert cache.forget(keep_sink=keep_sink) == expected


@pytest.mark.parametrize("window", [Window(0, 6), Window(3, 3), Window(3, 6), Window.full(18)], ids=str)
def test_cache_path_equals_one_masked_pass(model, window):
    """Clean frames recorded block by block = the whole sequence at once under the mask of the window."""
    x0, text = torch.randn(2, 18, 4, 4, 4), torch.randn(2, 5, 8)
    mask = block_mask(range(18), range(18), block=BLOCK, window=window, tokens_per_frame=TOKENS)
    t = torch.full((2, 18), 400.0)
    whole = model(x0, t, text, MaskedView(tuple(range(18)), mask))
    cache, parts = ring(window), []
    for start in range(0, 18, BLOCK):
        span = range(start, start + BLOCK)
        with cache.record(span) as view:
            parts.append(model(x0[:, start : start + BLOCK], t[:, :BLOCK], text, view))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)


def test_recache_going_block_by_block_equals_the_masked_pass(model):
    """The causal recache: after `forget`, spans may be recorded one after the other; ring and history agree."""
    texts, x0 = torch.randn(2, 2, 5, 8), torch.randn(2, 18, 4, 4, 4)
    for keep_sink in (True, False):
        flows = []
        for cache in (ring(Window(3, 6)), HistoryCache(window=Window(3, 6)), NaiveCache(Window(3, 6))):
            rollout = Rollout(Denoiser(model), cache, steps=STEPS, draw=torch.zeros_like)
            for start in range(0, 15, BLOCK):
                rollout.remember(x0[:, start : start + BLOCK], texts[0])
            again = cache.forget(keep_sink=keep_sink)
            for start in range(again.start, again.stop, BLOCK):
                rollout.remember(x0[:, start : start + BLOCK], texts[1], range(start, start + BLOCK))
            flows.append(rollout.denoiser(x0[:, 15:], 500.0, texts[1], cache.view(range(15, 18))).velocity)
        torch.testing.assert_close(flows[0], flows[2], atol=2e-5, rtol=0)
        torch.testing.assert_close(flows[1], flows[2], atol=2e-5, rtol=0)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_beyond_1100_frames_memory_does_not_grow(model, relative):
    cache = ring(Window(3, 6), relative=relative)
    buffers = [cache.keys.data_ptr(), cache.values.data_ptr(), cache.num_bytes]
    rollout = Rollout(Denoiser(model), cache, steps=[1000.0], draw=torch.zeros_like)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, 8, generator=generator)
    history = Rollout(Denoiser(model), HistoryCache(window=Window(3, 6), relative=relative), steps=[1000.0], draw=torch.zeros_like)
    while rollout.end < 1110:
        noise = torch.randn(2, BLOCK, 4, 4, 4, generator=generator)
        x0 = rollout.block(noise, text)
        rollout.remember(x0, text)
        if rollout.end % 60 == 0 or rollout.end > 1098:
            rollout.switch(text, keep_sink=True)
        history.remember(x0, text)
        if history.end % 60 == 0 or history.end > 1098:
            history.switch(text, keep_sink=True)
    assert [cache.keys.data_ptr(), cache.values.data_ptr(), cache.num_bytes] == buffers
    assert len(history.cache._pages) <= 4
    noise = torch.randn(2, BLOCK, 4, 4, 4, generator=generator)
    torch.testing.assert_close(rollout.block(noise, text), history.block(noise, text), atol=5e-5, rtol=0)


def test_infinite_mode_repeats_itself_where_absolute_positions_do_not_matter(model):
    """In relative mode the same frames at any position of the video give the same next block."""
    text, x0 = torch.randn(2, 5, 8), torch.randn(2, 12, 4, 4, 4)
    flows = []
    for repeats in (1, 40):
        cache = ring(Window(3, 6), relative=True)
        rollout = Rollout(Denoiser(model), cache, steps=STEPS, draw=torch.zeros_like)
        rollout.remember(x0[:, :BLOCK], text)
        for _ in range(repeats):
            for start in range(3, 12, BLOCK):
                rollout.remember(x0[:, start : start + BLOCK], text)
        # the keys of a block depend on what it saw, and that repeats from the second round on
        for start in range(3, 12, BLOCK):
            rollout.remember(x0[:, start : start + BLOCK], text)
        flows.append(rollout.denoiser(x0[:, :BLOCK], 500.0, text, cache.view(range(cache.end, cache.end + BLOCK))).velocity)
    torch.testing.assert_close(*flows, atol=2e-5, rtol=0)


def test_ring_refuses_gradients_and_wrong_spans(model):
    cache = ring(Window(3, 6))
    with pytest.raises(ValueError, match="do not go on from frame 0"):
        cache.view(range(3, 6))
    with pytest.raises(ValueError, match="does not fit a window of 9"):
        cache.view(range(0, 12))
    with pytest.raises(RuntimeError, match="HistoryCache"):
        cache.view(range(0, 3)).extend(0, torch.randn(2, 12, HEADS, HEAD_DIM, requires_grad=True), torch.randn(2, 12, HEADS, HEAD_DIM))


def test_window_refuses_nonsense():
    with pytest.raises(ValueError, match="leaves no recent frame"):
        Window.of(3, 3)
    with pytest.raises(ValueError, match="recent >= 1"):
        Window(0, 0)


def test_a_recache_leaves_no_more_in_memory_than_is_visible(model):
    """Its page is as long as the window; once only the sink in it is seen, the rest is let go."""

    def held(switch):
        cache = HistoryCache(window=Window(3, 6))
        with torch.no_grad():
            run(model, cache, num_blocks=8, switch=switch, keep_sink=False)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for page in cache.state()["pages"] for t in page["keys"]}
        pages = cache.view(range(24, 27))
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in (*pages._sink, *pages._recent) for t in p.keys}
        return sum(storages.values()), sum(own.values())

    assert held(switch=12) == held(switch=None)
