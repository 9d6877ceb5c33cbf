"""Two caches, one behaviour: both equal a naive one written from the specification, in every combination of settings."""

from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental import _config as symbolic_shapes

from longlive.cache.history import HistoryCache
from longlive.cache.ring import RingCache
from longlive.cache.window import Extent, Window, block_mask
from longlive.generation.caches import cache_bytes, ring_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import Euler, FewStep
from longlive.generation.transition import Transition
from longlive.ops.attention import BACKENDS, SequenceView
from longlive.ops.rope import Rope, rotate

BLOCK, TOKENS, HEADS, HEAD_DIM, LAYERS = 3, 4, 2, 12, 2
STEPS = [1000.0, 833.0]


@pytest.fixture(autouse=True)
def _frozen(model):
    model.requires_grad_(False)


ROPE = Rope(2, 2, HEAD_DIM)
SHAPE = {"num_layers": LAYERS, "num_heads": HEADS, "rope": ROPE}


def ring(window, batch=2, **settings):
    return RingCache(**SHAPE, batch=batch, window=window, **settings)


def history(window, batch=2, **settings):
    return HistoryCache(**SHAPE, batch=batch, window=window, **settings)


class NaiveCache:
    """The specification, frame by frame: remembers everything, lists what is visible, copies it together."""

    def __init__(self, window, relative=False):
        self.window, self.relative, self.end = window, relative, 0
        self.memory = {}  # (frame, layer) -> key, value
        self.sink = list(range(window.sink))
        self.oldest = 0  # frames before it are forgotten, but for the sink

    def view(self, span):
        self.frames, self.rotation = span, ROPE.at(span)
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

    def at(self, layer):
        def write(k, v):
            keys, values = k.chunk(len(self.frames), 1), v.chunk(len(self.frames), 1)
            if self.recording:
                self.memory |= {(f, layer): (keys[i], values[i]) for i, f in enumerate(self.frames)}

        def attend(q, k, v, attend):
            write(k, v)
            past = [self.memory[f, layer] for f in self.visible]
            if self.relative:  # number the visible frames in order, the span right after them
                start = self.frames.start - len(self.visible)
                shifts = [start + i - f for i, f in enumerate(self.visible)]
                past = [(rotate(key, ROPE.time_shift(by)), value) for by, (key, value) in zip(shifts, past)]
            return attend(q, torch.cat([*(key for key, _ in past), k], 1), torch.cat([*(value for _, value in past), v], 1))

        return SimpleNamespace(attend=attend, write=write)

    def forget(self, *, keep_sink):
        end = self.end
        if keep_sink and end > self.window.visible:
            self.end = end - self.window.recent
        else:
            self.end = end - min(end, self.window.visible)
            self.sink = list(range(self.end, self.end + self.window.sink))
        self.oldest = self.end
        return range(self.end, end)


def run(model, cache, *, num_blocks, switches=(), keep_sink=True, seed=0, width=4):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randn(2, 5, 8, generator=generator) for _ in range(1 + max(1, len(switches)))]
    rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, lambda like: torch.randn(like.shape, generator=generator)))
    made, text = [], texts[0]
    for block in range(num_blocks):
        if block * BLOCK in switches:
            text = texts[1 + switches.index(block * BLOCK)]
            rollout.switch(text, Transition(keep_sink))
        made.append(rollout.block(torch.randn(2, BLOCK, 4, 4, width, generator=generator), text))
        rollout.remember(made[-1], text)
    return torch.cat(made, 1)


@contextmanager
def use_duck_shape(value):
    before, symbolic_shapes.use_duck_shape = symbolic_shapes.use_duck_shape, value
    yield
    symbolic_shapes.use_duck_shape = before


WINDOWS = [Window(sink, visible - sink) for sink in (0, 3) for visible in (6, 9, 12)] + [
    Window.full(24),
    Window(4, 7),
    Window(1, 3),
    Window(2, 5),
]


@torch.inference_mode()
def with_every_switch(model, cache):
    """Latents of 7 blocks without a switch, and those after a switch of either kind before each of the blocks 1 to 5."""
    generator = torch.Generator().manual_seed(0)
    texts = [model.project_text(torch.randn(2, 5, 8, generator=generator)) for _ in range(2)]
    noise = torch.randn(7, 2, BLOCK, 4, 4, 4, generator=generator)
    trunk = Rollout(Denoiser(model), cache, Euler([1000.0]))

    def add(rollout, number, text):
        x0 = rollout.block(noise[number], text)
        rollout.remember(x0, text)
        return x0

    made = {"no switch": []}
    for number in range(7):
        for keep_sink in (True, False) if 1 <= number <= 5 else ():  # before the window is full, when it is, and beyond
            branch = Rollout(trunk.denoiser, deepcopy(trunk.cache), trunk.solver)
            branch.load(trunk.state())
            branch.switch(texts[1], Transition(keep_sink))
            made[f"{number=} {keep_sink=}"] = [add(branch, later, texts[1]) for later in range(number, 7)]
        made["no switch"].append(add(trunk, number, texts[0]))
    return {switch: torch.cat(parts, 1) for switch, parts in made.items()}


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_ring_and_history_equal_the_naive_cache(model, window, relative):
    expected = with_every_switch(model, NaiveCache(window, relative))
    for cache in (ring(window, relative=relative), *([] if relative else [history(window)])):
        for switch, latents in with_every_switch(model, cache).items():
            torch.testing.assert_close(latents, expected[switch], atol=2e-5, rtol=0, msg=f"{type(cache).__name__} {switch}")


def test_a_switch_changes_the_video_and_the_sink_mode_matters(model):
    window = Window(3, 3)
    plain, kept, refreshed = (
        run(model, ring(window), num_blocks=6, switches=s, keep_sink=k) for s, k in (((), True), ((12,), True), ((12,), False))
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
        rollout = Rollout(Denoiser(model), ring(Window(3, 3)), FewStep(steps, torch.zeros_like))
        x0 = torch.randn(6, 2, BLOCK, 4, 4, 4)
        for block in x0:
            rollout.block(block, text)
            rollout.remember(block, text)
        results.append(rollout.denoiser(x0[0], 500.0, text, rollout.cache.view(range(18, 21))).velocity)
    assert torch.equal(*results)


def test_kept_sink_stays_bit_identical_and_the_rest_is_rewritten(model):
    cache, texts, sinks = ring(Window(3, 6)), torch.randn(2, 2, 5, 8), []
    rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
    for _ in range(5):
        rollout.remember(torch.randn(2, BLOCK, 4, 4, 4), texts[0])
        sinks.append(cache.keys[:, :, : 3 * TOKENS].clone())
    before = cache.keys.clone(), cache.values.clone()
    rollout.switch(texts[1], Transition(True))
    sink = slice(0, 3 * TOKENS)
    assert all(torch.equal(one, cache.keys[:, :, sink]) for one in sinks)
    assert torch.equal(cache.keys[:, :, sink], before[0][:, :, sink])
    assert torch.equal(cache.values[:, :, sink], before[1][:, :, sink])
    changed = (cache.values[1] != before[1][1]).flatten(2).any(-1)[:, 3 * TOKENS :]
    assert changed.all()


def test_forget_says_what_to_read_again():
    for end, keep_sink, expected in (
        (6, True, range(0, 6)),
        (12, True, range(0, 12)),
        (15, True, range(6, 15)),
        (15, False, range(3, 15)),
    ):
        extent = Extent(Window(3, 9))
        extent.end = end
        assert extent.forget(keep_sink=keep_sink) == expected and extent.end == expected.start


def test_what_a_span_may_see():
    extent = Extent(Window(3, 6))
    seen = []
    for start in range(0, 18, 3):
        seen.append([frame for region in extent.visible(range(start, start + 3)) for frame in region])
        extent.end = start + 3
    assert seen[:3] == [list(range(3)), list(range(6)), list(range(9))]
    assert seen[3:] == [[0, 1, 2, *range(end - 6, end)] for end in (12, 15, 18)]

    again = extent.forget(keep_sink=True)
    assert again == range(12, 18) and [list(r) for r in extent.visible(range(12, 15))] == [[0, 1, 2], [12, 13, 14]]
    extent.load(Extent.state(extent))  # the same three numbers
    assert [list(r) for r in extent.visible(range(12, 15))] == [[0, 1, 2], [12, 13, 14]]
    extent.clear()
    assert extent.sink == range(12, 15) and [list(r) for r in extent.visible(range(12, 15))] == [[12, 13, 14], []]


@pytest.mark.parametrize("window", [Window(0, 6), Window(3, 3), Window(3, 6), Window.full(18)], ids=str)
def test_cache_path_equals_one_masked_pass(model, window):
    """Clean frames recorded block by block = the whole sequence at once under the mask of the window."""
    x0, text = torch.randn(2, 18, 4, 4, 4), torch.randn(2, 5, 8)
    mask = block_mask(range(18), range(18), block=BLOCK, window=window, tokens_per_frame=TOKENS)
    t = torch.full((2, 18), 400.0)
    whole = model(x0, t, text, SequenceView(ROPE.at(range(18)), mask))
    cache, parts = ring(window), []
    for start in range(0, 18, BLOCK):
        span = range(start, start + BLOCK)
        with cache.record(span) as view:
            parts.append(model(x0[:, start : start + BLOCK], t[:, :BLOCK], text, view))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=0)


def test_recache_going_block_by_block_equals_the_masked_pass(model):
    """The causal recache: after `forget`, spans may be recorded one after the other; ring and history agree."""
    texts, x0 = torch.randn(2, 2, 5, 8), torch.randn(2, 21, 4, 4, 4)
    for keep_sink in (True, False):
        flows = []
        for cache in (ring(Window(3, 6)), history(Window(3, 6)), NaiveCache(Window(3, 6))):
            rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
            for start in range(0, 18, BLOCK):  # the ring's slots are then written from the middle
                rollout.remember(x0[:, start : start + BLOCK], texts[0])
            again = cache.forget(keep_sink=keep_sink)
            for start in range(again.start, again.stop, BLOCK):
                rollout.remember(x0[:, start : start + BLOCK], texts[1])
            flows.append(rollout.denoiser(x0[:, 18:], 500.0, texts[1], cache.view(range(18, 21))).velocity)
        torch.testing.assert_close(flows[0], flows[2], atol=2e-5, rtol=0)
        torch.testing.assert_close(flows[1], flows[2], atol=2e-5, rtol=0)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@torch.inference_mode()
def test_beyond_1100_frames_memory_does_not_grow(relative):
    """Whatever a layer writes, frame after frame, in blocks and again at a switch: the queries get what the specification says."""
    window = Window(3, 6)
    caches = [ring(window, relative=relative), NaiveCache(window, relative), *([] if relative else [history(window)])]
    buffers = [caches[0].keys.data_ptr(), caches[0].values.data_ptr()]
    generator = torch.Generator().manual_seed(0)

    def add(span):
        made = torch.randn(3, 2, len(span) * TOKENS, HEADS, HEAD_DIM, generator=generator)
        found = []
        for cache in caches:
            with cache.record(span) as view:
                q, k = (rotate(one, view.rotation) for one in made[:2])
                seen = [view.at(layer).attend(q, k + layer, made[2] + layer, BACKENDS["sdpa"]) for layer in range(LAYERS)]
            found.append(torch.stack(seen))
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, atol=5e-5, rtol=0, msg=str(span))

    for start in (*range(48), *range(48, 1110, BLOCK)):
        add(range(start, start + (1 if start < 48 else BLOCK)))
        if start % (15 if start < 48 else 60) == 0 or start > 1095:
            (again,) = {cache.forget(keep_sink=start % 2 == 0) for cache in caches}
            add(again)
    assert [caches[0].keys.data_ptr(), caches[0].values.data_ptr()] == buffers
    if not relative:
        assert caches[2]._keys[0].shape == (2, 19 * TOKENS, HEADS, HEAD_DIM) and len(caches[2]._slot) == 8


def test_in_the_ring_nothing_is_copied_to_be_seen():
    """Neither while it fills nor when it is full, also where sink and window are no multiples of the block."""
    cache = ring(Window(4, 7))
    q, seen = torch.zeros(2, BLOCK * TOKENS, HEADS, HEAD_DIM), []
    for start in range(0, 30, BLOCK):
        with cache.record(range(start, start + BLOCK)) as view:
            for layer in range(LAYERS):
                view.at(layer).attend(q, q, q, lambda q, *kv: (seen.append(kv), q)[1])
                keys, values = seen.pop()
                assert keys.data_ptr() == cache.keys[layer].data_ptr() and values.data_ptr() == cache.values[layer].data_ptr()
                assert keys.shape[1] == min(start + BLOCK, 11) * TOKENS


def test_the_infinite_mode_keeps_the_keys_of_the_sink_once_more(model):
    for relative in (False, True):
        cache = ring_cache(model, 4, 4, window=Window(3, 6), batch=2, relative=relative)
        held = sum(part.nbytes for part in vars(cache).values() if isinstance(part, torch.Tensor))
        assert held == cache_bytes(model, 4, 4, visible=9, sink_copies=3 * relative, batch=2)


def test_in_the_buffers_of_a_video_the_next_one_is_made_as_in_new_ones(model):
    for cache in (ring(Window(3, 3)), ring(Window(3, 3), relative=True), history(Window(3, 3))):
        first, second = run(model, cache, num_blocks=4), (cache.reset(), run(model, cache, num_blocks=4))[1]
        assert torch.equal(first, second)


def test_infinite_mode_repeats_itself_where_absolute_positions_do_not_matter(model):
    """In relative mode the same frames at any position of the video give the same next block."""
    text, x0 = torch.randn(2, 5, 8), torch.randn(2, 12, 4, 4, 4)
    flows = []
    for repeats in (1, 40):
        cache = ring(Window(3, 6), relative=True)
        rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
        rollout.remember(x0[:, :BLOCK], text)
        for _ in range(repeats):
            for start in range(3, 12, BLOCK):
                rollout.remember(x0[:, start : start + BLOCK], text)
        # the keys of a block depend on what it saw, and that repeats from the second round on
        for start in range(3, 12, BLOCK):
            rollout.remember(x0[:, start : start + BLOCK], text)
        flows.append(rollout.denoiser(x0[:, :BLOCK], 500.0, text, cache.view(range(cache.end, cache.end + BLOCK))).velocity)
    torch.testing.assert_close(*flows, atol=2e-5, rtol=0)


def test_wrong_spans_and_gradients_are_refused(model):
    for cache in (ring(Window(3, 6)), history(Window(3, 6))):
        with pytest.raises(ValueError, match="ends before frame 0"):
            cache.view(range(3, 6))
        for span in (range(0, 12), range(0)):
            with pytest.raises(ValueError, match=f"a span of {len(span)} frames does not fit a window of 9"):
                cache.view(span)
        assert len(cache.view(range(1)).rotation.cos) == TOKENS
    with pytest.raises(ValueError, match="3 frames does not fit a window of 5 whose sink has 3"):
        extent = Extent(Window(3, 2))
        extent.end = 3
        extent.visible(range(3, 6))  # its own first frame would not be seen
    q = torch.randn(2, 12, HEADS, HEAD_DIM, requires_grad=True)
    with pytest.raises(RuntimeError, match="HistoryCache"):
        ring(Window(3, 6)).view(range(0, 3)).at(0).attend(q, q, q, lambda *_: None)


@pytest.mark.parametrize("kind", [RingCache, HistoryCache])
def test_keys_and_values_are_stored_in_the_dtype_of_the_cache(kind):
    """Under autocast a layer may compute them in another."""
    cache, seen = kind(**SHAPE, batch=2, window=Window(3, 6), dtype=torch.bfloat16), []
    k, v = torch.randn(2, 2, 2 * BLOCK * TOKENS, HEADS, HEAD_DIM).unbind()
    for start in (0, BLOCK):
        own = slice(start * TOKENS, (start + BLOCK) * TOKENS)
        with cache.record(range(start, start + BLOCK)) as view:
            view.at(0).attend(k[:, own], k[:, own], v[:, own], lambda *qkv: seen.append(qkv) or qkv[0])
    assert torch.equal(seen[1][1], k.bfloat16()) and torch.equal(seen[1][2], v.bfloat16())


@pytest.mark.parametrize("kind", [RingCache, HistoryCache])
def test_a_cache_is_on_the_device_of_its_rope(kind):
    """On the meta device, where a tensor of another one is refused; block by block after a clear, so that the ring has holes."""
    rope = Rope(2, 2, HEAD_DIM, device="meta")
    cache = kind(**SHAPE | {"rope": rope}, batch=2, window=Window(3, 6))
    for start in range(0, 24, BLOCK):
        if start == 15:
            cache.clear()
        q = torch.empty(2, BLOCK * TOKENS, HEADS, HEAD_DIM, device="meta")
        with cache.record(range(start, start + BLOCK)) as view:
            assert view.at(1).attend(q, q, q, BACKENDS["sdpa"]).device.type == view.rotation.cos.device.type == "meta"


def test_the_window_of_the_paper_and_the_smallest_one():
    assert Window() == Window.of(12, 3) == Window(sink=3, recent=9) and Window().visible == 12
    assert Window.of(1, 0) == Window(0, 1)


def test_which_frames_a_block_sees_under_the_mask():
    """Blocks of 2 under a sink of 1 and a window of 2 recent frames, the block's own."""
    seen = [[key for key, sees in enumerate(row) if sees] for row in block_mask(range(6), range(6), block=2, window=Window(1, 2)).tolist()]
    assert seen == [[0, 1], [0, 1], [0, 2, 3], [0, 2, 3], [0, 4, 5], [0, 4, 5]]


def test_window_refuses_nonsense():
    with pytest.raises(ValueError, match="leaves no recent frame"):
        Window.of(3, 3)
    with pytest.raises(ValueError, match="recent >= 1"):
        Window(0, 0)


def test_a_view_of_the_history_stays_what_it_was(model):
    """Whatever is recorded afterwards, also into new buffers: what a recomputed layer reads is what the forward pass read."""
    cache, text = history(Window(3, 3)), torch.randn(2, 5, 8)
    rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
    noisy, views, seen = torch.randn(2, BLOCK, 4, 4, 4), [], []
    with torch.no_grad():
        for number in range(12):
            rollout.remember(torch.randn(2, BLOCK, 4, 4, 4), text)
            if number == 6:
                rollout.switch(torch.randn(2, 5, 8), Transition(keep_sink=False))
            views.append(cache.view(range(cache.end, cache.end + BLOCK)))
            seen.append(rollout.denoiser(noisy, 500.0, text, views[-1]).velocity)
        for view, expected in zip(views, seen):
            assert torch.equal(rollout.denoiser(noisy, 500.0, text, view).velocity, expected)


def test_a_recache_soon_after_a_clear_reads_only_what_is_held(model):
    """Frames from before the clear are gone: neither caches nor rollout may ask for them."""
    texts, blocks = torch.randn(3, 2, 5, 8), torch.randn(8, 2, BLOCK, 4, 4, 4)
    for keep_sink in (True, False):
        found = []
        for cache in (ring(Window(3, 6)), history(Window(3, 6)), ring(Window(3, 6), relative=True)):
            rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
            for block in blocks[:5]:  # the ring's next slots are then in its middle
                rollout.remember(block, texts[0])
            rollout.switch(texts[1], Transition(recache="clear"))
            rollout.switch(texts[1], Transition(keep_sink))  # nothing is held: nothing to read
            for block in blocks[5:7]:
                rollout.remember(block, texts[1])
            rollout.switch(texts[2], Transition(keep_sink))
            assert rollout.end == 21
            found.append(rollout.denoiser(blocks[7], 500.0, texts[2], cache.view(range(21, 24))).velocity)
        fresh = Rollout(Denoiser(model), ring(Window(3, 6), relative=True), FewStep(STEPS, torch.zeros_like))
        fresh.remember(blocks[5:7].transpose(0, 1).flatten(1, 2), texts[2])  # positions do not matter, only their differences
        expected = fresh.denoiser(blocks[7], 500.0, texts[2], fresh.cache.view(range(6, 9))).velocity
        for velocity in found:
            torch.testing.assert_close(velocity, expected, atol=2e-5, rtol=0)


def test_a_block_that_is_abandoned_before_a_switch_leaves_the_sink_where_it_was(model):
    """In the infinite mode a view moves the sink's keys; a recache that records the sink again must not take them for moved."""
    texts, blocks = torch.randn(2, 2, 5, 8), torch.randn(5, 2, BLOCK, 4, 4, 4)
    found = []
    for abandoned in (False, True):
        cache = ring(Window(3, 9), relative=True)
        rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
        for block in blocks[:4]:
            rollout.remember(block, texts[0])
        if abandoned:
            rollout.block(blocks[4], texts[0])
        rollout.switch(texts[1], Transition())
        found.append(rollout.denoiser(blocks[4], 500.0, texts[1], cache.view(range(12, 15))).velocity)
    assert torch.equal(*found)


def test_history_goes_on_from_its_state(model):
    def made(stop_at=None):
        cache, parts, generator = history(Window(3, 3)), [], torch.Generator().manual_seed(3)
        text = torch.randn(2, 2, 5, 8, generator=generator)
        rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
        for block in range(8):
            if block == stop_at:
                again = history(Window(3, 3))
                again.load(cache.state())
                fresh = Rollout(Denoiser(model), again, FewStep(STEPS, torch.zeros_like))
                fresh.load(rollout.state())
                cache, rollout = again, fresh
            if block == 5:
                rollout.switch(text[1], Transition(keep_sink=False))
            parts.append(rollout.block(torch.randn(2, BLOCK, 4, 4, 4, generator=generator), text[int(block >= 5)]))
            rollout.remember(parts[-1], text[int(block >= 5)])
        return torch.cat(parts, 1)

    whole = made()
    for stop_at in (0, 1, 4, 5, 6, 7):
        assert torch.equal(made(stop_at), whole), stop_at
    assert {tuple(keys.shape) for keys in history(Window(3, 3)).state()["keys"]} == {(2, 0, HEADS, HEAD_DIM)}


def add_frames(cache, num_blocks):
    """Frame f is 100 + f in every key and -f in every value."""
    for start in range(cache.end, cache.end + num_blocks * BLOCK, BLOCK):
        number = torch.arange(start, start + BLOCK).float().repeat_interleave(TOKENS)[None, :, None, None].expand(2, -1, HEADS, HEAD_DIM)
        with cache.record(range(start, start + BLOCK)) as view:
            for layer in range(LAYERS):
                view.at(layer).attend(number, 100 + number, -number, lambda q, k, v: q)


def test_history_holds_what_can_still_be_seen_and_no_more():
    for change, held in (
        (lambda cache: None, [0, 1, 2, *range(10, 15)]),  # of the 6 recent frames one will be the next
        (lambda cache: cache.forget(keep_sink=True), [0, 1, 2]),
        (lambda cache: cache.forget(keep_sink=False), []),
        (lambda cache: cache.clear(), []),
        (lambda cache: cache.reset(), []),
    ):
        cache = history(Window(3, 6))
        add_frames(cache, 5)
        change(cache)
        state = cache.state()
        assert state["frames"] == held
        for keys, values in zip(state["keys"], state["values"], strict=True):
            assert keys[0, ::TOKENS, 0, 0].tolist() == [100 + frame for frame in held]
            assert values[0, ::TOKENS, 0, 0].tolist() == [-frame for frame in held]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        HistoryCache(**SHAPE | {"num_layers": 1}, batch=2, window=Window(3, 6)).load(state)


def test_where_room_is_reserved_nothing_is_copied():
    cache = history(Window(3, 6), slots=12)
    first = cache._keys
    add_frames(cache, 4)
    assert cache._keys is first
    cache.reserve(30)
    assert cache._keys[0].shape[1] == (8 + 30 + 1) * TOKENS  # what can be seen, what will be made, what is not remembered
    second = cache._keys
    add_frames(cache, 10)
    assert cache._keys is second
    add_frames(cache, 1)
    assert cache._keys is not second and cache._keys[0].shape == second[0].shape


def test_one_graph_serves_every_layer_block_and_switch(model):
    """14 blocks with two switches through the compiled layer: one graph, and every call runs it, ring and history alike.

    Sizes are symbols, and two that happen to be equal are not taken for one (in a first block all that is visible is its own).
    """
    shape = {**SHAPE, "rope": Rope(2, 3, HEAD_DIM), "batch": 2, "window": Window(3, 9)}  # 18 tokens of a block: no size of the model
    for kind in (RingCache, HistoryCache):
        expected = run(model, kind(**shape), num_blocks=14, switches=(15, 30), width=6)
        torch.compiler.reset()
        graphs, calls = [], []

        def counted(graph, _, graphs=graphs, calls=calls):
            graphs.append(graph)
            return lambda *inputs: (calls.append(1), graph(*inputs))[1]

        forwards = [block.forward for block in model.blocks]
        compiled = torch.compile(type(model.blocks[0]).forward, fullgraph=True, dynamic=True, backend=counted)
        for block in model.blocks:
            block.forward = partial(compiled, block)
        with use_duck_shape(False):
            found = run(model, kind(**shape), num_blocks=14, switches=(15, 30), width=6)
        for block, forward in zip(model.blocks, forwards):
            block.forward = forward
        layers = 14 * (len(STEPS) * LAYERS + LAYERS - 1) + 2 * (LAYERS - 1)  # a pass that only writes ends before its last layer
        assert (len(graphs), len(calls)) == (1, layers), kind.__name__
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
