"""The ring in 8 bits: equal to a cache of fake-quantised keys and values in float64, near the ring in floating point, half as large."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from longlive.cache.quantised import QuantisedRing
from longlive.cache.window import Window
from longlive.engine.apply import Recipe, apply
from longlive.engine.steady import SteadyPasses
from longlive.generation.caches import cache_bytes, ring_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.models.wan import WanTransformer
from longlive.ops.attention import BACKENDS
from longlive.ops.eight_bits import DTYPES, quantise
from longlive.ops.rope import Rope, rotate
from tests.unit import test_steady
from tests.unit.test_cache import BLOCK, HEAD_DIM, HEADS, LAYERS, SHAPE, STEPS, TOKENS, NaiveCache, ring, run, use_duck_shape

KINDS = list(DTYPES)


@pytest.fixture(autouse=True)
def _frozen(model):
    model.requires_grad_(False)
    torch.manual_seed(0)


def eight(window, kind="int8", batch=2, **settings):
    return QuantisedRing(**SHAPE, batch=batch, window=window, kind=kind, **settings)


class FakeQuantised:
    """The naive cache of float64 keys and values that were quantised and read back, frame by frame."""

    def __init__(self, window, kind, relative):
        self.naive, self.dtype = NaiveCache(window, relative), DTYPES[kind]

    def record(self, span):
        return self.naive.record(span)

    def forget(self, **settings):
        return self.naive.forget(**settings)

    def at(self, layer):
        def back(x, dtype):
            values, scales = quantise(x, dtype, (1, 3))
            return values.double() * scales.double()

        def attend(q, k, v, backend):
            means = [frame.mean(1, keepdim=True) for frame in k.split(TOKENS, 1)]
            k = torch.cat([back(frame - mean, self.dtype) + mean for frame, mean in zip(k.split(TOKENS, 1), means)], 1)
            v = torch.cat([back(frame, self.dtype) for frame in v.split(TOKENS, 1)], 1)
            return self.naive.at(layer).attend(q.double(), k, v, lambda q, k, v: backend(q, k.double(), v.double()))

        return SimpleNamespace(attend=attend)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("window", [Window(3, 6), Window(0, 6), Window(4, 7), Window(1, 3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_it_equals_fake_quantisation_in_float64(kind, window, relative):
    """Whatever a layer writes, frame by frame and in blocks, with switches of both kinds, joint and causal, far beyond the window."""
    cache, expected = eight(window, kind, relative=relative), FakeQuantised(window, kind, relative)
    generator = torch.Generator().manual_seed(0)

    def add(span):
        made = torch.randn(3, 2, len(span) * TOKENS, HEADS, HEAD_DIM, generator=generator)
        with cache.record(span) as view, expected.record(span):
            q, k = (rotate(one, view.rotation) for one in made[:2])
            for layer in range(LAYERS):
                found = view.at(layer).attend(q, k + layer, made[2] + layer, BACKENDS["sdpa"])
                wanted = expected.at(layer).attend(q, k + layer, made[2] + layer, BACKENDS["sdpa"])
                assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max(), span

    block = min(BLOCK, window.recent)
    for start in (*range(12), *range(12, 90, block)):
        add(range(start, start + (1 if start < 12 else block)))
        if start % 15 == 0 and start > 0:
            (again,) = {one.forget(keep_sink=start % 2 == 0) for one in (cache, expected)}
            for first in range(again.start, again.stop, block) if start % 4 == 1 else [again.start]:
                add(range(first, min(first + block, again.stop) if start % 4 == 1 else again.stop))


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_mean_of_every_frame_is_kept(kind, relative):
    """Keys of very different means: what is stored of them is the difference, and attention still sees the whole."""
    window = Window(3, 6)
    caches, found = (eight(window, kind, relative=relative), ring(window, relative=relative)), []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 18, BLOCK):
        span = range(start, start + BLOCK)
        q, k, v = torch.randn(3, 2, BLOCK * TOKENS, HEADS, HEAD_DIM, generator=generator)
        k = 0.05 * k + torch.randn(2, BLOCK, HEADS, HEAD_DIM, generator=generator).repeat_interleave(TOKENS, 1)
        found = []
        for cache in caches:
            with cache.record(span) as view:
                found.append(view.at(0).attend(q, k, v, BACKENDS["sdpa"]))
        assert (found[0] - found[1]).abs().max() < {"int8": 0.02, "fp8": 0.12}[kind]
    step = caches[0].key_scales[caches[0].key_scales > 0].max()
    assert step * 127 < 1.0 if kind == "int8" else step * 448 < 1.0  # the means are of size 1 to 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_quantised_once(model, kind):
    """What was remembered stays bit for bit while later blocks are made, the sink beyond a switch that keeps it, also when it is moved."""
    for relative in (False, True):
        cache, texts = eight(Window(3, 6), kind, relative=relative), torch.randn(2, 2, 5, 8)
        rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
        rollout.remember(torch.randn(2, BLOCK, 4, 4, 4), texts[0])
        parts = (cache.keys, cache.key_scales, cache.key_means, cache.values, cache.value_scales)
        sink = [part[:, :, :3].float().clone() for part in parts]
        for number in range(5):
            rollout.remember(rollout.block(torch.randn(2, BLOCK, 4, 4, 4), texts[0]), texts[0])
            recent = [part[:, :, 3:].float().clone() for part in parts]
            rollout.block(torch.randn(2, BLOCK, 4, 4, 4), texts[0])
            changed = [(part[:, :, 3:].float() != before).flatten(3).any(-1).all((0, 1)) for part, before in zip(parts, recent)]
            if number:  # the window is full: a block in the making overwrites the oldest one and no other
                assert all(one.sum() == BLOCK for one in changed)
        rollout.switch(texts[1], Transition(keep_sink=True))
        assert all(torch.equal(part[:, :, :3].float(), before) for part, before in zip(parts, sink))


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_videos_stay_near_those_of_the_ring(model, relative):
    """8 blocks with switches of both kinds: the difference is small and does not grow."""
    for keep_sink in (True, False):
        made = {
            name: run(model, cache, num_blocks=8, switches=(9, 15), keep_sink=keep_sink)
            for name, cache in {
                "float": ring(Window(3, 6), relative=relative),
                "int8": eight(Window(3, 6), relative=relative),
                "fp8": eight(Window(3, 6), "fp8", relative=relative),
            }.items()
        }
        other = run(model, ring(Window(3, 6), relative=relative), num_blocks=8, switches=(9, 15), keep_sink=keep_sink, seed=1)
        seeds = (other - made["float"]).square().mean().sqrt()
        for kind, share in (("int8", 0.03), ("fp8", 0.15)):
            error = (made[kind] - made["float"]).square().mean((0, 2, 3, 4)).sqrt()
            assert 0 < error[-BLOCK:].mean() < share * seeds and error.max() < 2 * share * seeds, (kind, keep_sink)


def test_in_the_same_buffers_the_next_video_is_made_as_in_new_ones(model):
    for relative in (False, True):
        cache = eight(Window(3, 3), relative=relative)
        first = run(model, cache, num_blocks=4)
        cache.reset()
        assert torch.equal(run(model, cache, num_blocks=4), first)


def test_a_block_that_is_abandoned_and_a_clear_leave_nothing_behind(model):
    texts, blocks = torch.randn(2, 2, 5, 8), torch.randn(7, 2, BLOCK, 4, 4, 4)
    for transition in (Transition(), Transition(keep_sink=False), Transition(recache="causal"), Transition(recache="clear")):
        found = []
        for abandoned in (False, True):
            cache = eight(Window(3, 6), relative=True)
            rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
            for block in blocks[:5]:
                rollout.remember(block, texts[0])
            if abandoned:
                rollout.block(blocks[5], texts[0])
            rollout.switch(texts[1], transition)
            rollout.remember(blocks[5], texts[1])
            found.append(rollout.denoiser(blocks[6], 500.0, texts[1], cache.view(range(18, 21))).velocity)
        assert torch.equal(*found), transition


def test_the_bytes_it_holds_are_counted(model):
    for relative in (False, True):
        cache = ring_cache(model, 4, 4, window=Window(3, 6), batch=2, relative=relative, quantize="int8")
        held = sum(part.nbytes for part in vars(cache).values() if isinstance(part, torch.Tensor))
        assert held == cache_bytes(model, 4, 4, visible=9, sink_copies=3 * relative, batch=2, quantize="int8")
    with torch.device("meta"):
        network = WanTransformer().bfloat16()
    plain, small = (cache_bytes(network, 60, 104, visible=12, quantize=kind) for kind in (None, "int8"))
    assert round(plain / 1e9, 2) == 3.45 and round(plain / small, 2) == 2.00


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_come_back_in_the_type_of_the_queries(dtype):
    cache, seen = eight(Window(3, 6)), []
    q = torch.randn(2, BLOCK * TOKENS, HEADS, HEAD_DIM, dtype=dtype)
    with cache.record(range(BLOCK)) as view:
        view.at(0).attend(q, q, q, lambda *qkv: seen.append(qkv) or qkv[0])
    assert [part.dtype for part in seen[0]] == [dtype] * 3
    for part in seen[0][1:]:
        assert (part - q).abs().max() < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_on_the_device_of_its_rope(kind):
    """On the meta device, where a tensor of another one is refused; with holes after a clear."""
    for relative in (False, True):
        rope = Rope(2, 2, HEAD_DIM, device="meta")
        cache = QuantisedRing(**SHAPE | {"rope": rope}, batch=2, window=Window(3, 6), kind=kind, relative=relative)
        for start in range(0, 24, BLOCK):
            if start == 15:
                cache.clear()
            q = torch.empty(2, BLOCK * TOKENS, HEADS, HEAD_DIM, device="meta")
            with cache.record(range(start, start + BLOCK)) as view:
                assert view.at(1).attend(q, q, q, BACKENDS["sdpa"]).device.type == "meta"


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_two_recordings_serve_it_too(model, monkeypatch, relative):
    """As in `test_steady`: also the rotation of the sink, which differs from block to block, is at a fixed place."""
    apply(model, Recipe(quantize="int8"))
    monkeypatch.setattr(test_steady, "ring_cache", partial(ring_cache, quantize="int8"))
    expected, tape = test_steady.video(model, relative=relative), test_steady.Tape()
    passes = SteadyPasses(model, block=BLOCK, capture=tape)
    found = test_steady.video(model, relative=relative)
    passes.remove()
    assert sorted(tape.recorded) == ["forward", "write_kv"] and len(tape.replayed) > 20
    assert torch.equal(found, expected)


def test_what_cannot_be_done_is_refused(model):
    with pytest.raises(ValueError, match="'int4' is unknown; choose int8 or fp8"):
        eight(Window(3, 6), "int4")
    with pytest.raises(ValueError, match="ends before frame 0"):
        eight(Window(3, 6)).view(range(3, 6))
    q = torch.randn(2, 12, HEADS, HEAD_DIM, requires_grad=True)
    with pytest.raises(RuntimeError, match="use a HistoryCache"):
        eight(Window(3, 6)).view(range(0, 3)).at(0).attend(q, q, q, lambda *_: None)


@pytest.mark.parametrize("relative", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["absolute", "relative"])
def test_one_graph_serves_every_layer_block_and_switch(model, relative):
    """As in `test_cache`, with linear layers in 8 bits too: tensors only, so that Dynamo guards on shapes and nothing else."""
    apply(model, Recipe(quantize="int8"))
    shape = {**SHAPE, "rope": Rope(2, 3, HEAD_DIM), "batch": 2, "window": Window(3, 9), "kind": "int8", "relative": relative}
    expected = run(model, QuantisedRing(**shape), num_blocks=14, switches=(15, 30), width=6)
    torch.compiler.reset()
    graphs, calls = [], []

    def counted(graph, _):
        graphs.append(graph)
        return lambda *inputs: (calls.append(1), graph(*inputs))[1]

    compiled = torch.compile(type(model.blocks[0]).forward, fullgraph=True, dynamic=True, backend=counted)
    for block in model.blocks:
        block.forward = partial(compiled, block)
    with use_duck_shape(False):
        found = run(model, QuantisedRing(**shape), num_blocks=14, switches=(15, 30), width=6)
    assert (len(graphs), len(calls)) == (1, 14 * (len(STEPS) * LAYERS + LAYERS - 1) + 2 * (LAYERS - 1))
    # the graph's operations are decomposed and round otherwise in float32; a value between two 8-bit ones may then fall to either
    assert (found - expected).square().mean().sqrt() < 0.02 * expected.std()
