"""Passes over whole blocks of an endless video: compiled into one graph, recorded twice, and the same as the plain way."""

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial

import pytest
import torch

from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.engine import steady
from longlive.engine.steady import SteadyPasses, operation_tape
from longlive.generation.caches import ring_cache
from longlive.generation.cues import Cue, PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.sampling import sample
from longlive.generation.solver import Euler
from longlive.generation.transition import Transition

STEPS = [1000.0, 937.5, 625.0]


def video(network, *, blocks=12, keep_sink=True, relative=False, seed=0, batch=1, size=(4, 6), quantize=None, texts=1):
    """Latents of a video with two prompt switches after the window is full."""
    texts = torch.randn(3, batch, 5, 8, generator=torch.Generator().manual_seed(texts))
    projected = {}  # as the pipeline keeps them: the same prompt, the same tensors
    plan = PromptSchedule((Cue(0, "a"), Cue(18, "b", Transition(keep_sink)), Cue(27, "c", Transition(keep_sink, "causal"))))
    made = sample(
        Denoiser(network),
        plan,
        lambda prompt: projected.setdefault(prompt, network.project_text(texts["abc".index(prompt)])),
        cache=ring_cache(network, *size, window=Window(3, 6), relative=relative, batch=batch, quantize=quantize),
        latent_size=size,
        timesteps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        batch=batch,
        block=3,
        num_latent_frames=3 * blocks,
    )
    return torch.cat([block.latents for block in made], dim=1)


class Tape:
    """A recording of the operations, as a CUDA graph is one of kernels: nothing but tensors at fixed places goes in."""

    def __init__(self):
        self.recorded, self.replayed = [], []

    def __call__(self, function, tensors):
        self.recorded.append(function.args[0])
        graph = operation_tape(function, tensors)
        places = [tensor.data_ptr() for tensor in tensors]

        def replay(tensors):
            assert [tensor.data_ptr() for tensor in tensors] == places
            self.replayed.append(function.args[0])
            return graph(tensors)

        return replay


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize(("keep_sink", "quantize"), [(True, None), (False, None), (True, "int8"), (False, "int8")])
def test_two_recordings_serve_an_endless_video(model, relative, keep_sink, quantize):
    """Of 20 blocks with two switches; blocks that do not see a full window yet, and recaches, are not recorded."""
    expected, tape = video(model, blocks=20, keep_sink=keep_sink, relative=relative, quantize=quantize), Tape()
    passes = SteadyPasses(model, block=3, capture=tape)
    found = video(model, blocks=20, keep_sink=keep_sink, relative=relative, quantize=quantize)
    assert sorted(tape.recorded) == ["forward", "write_kv"]
    assert torch.equal(found, expected)
    first = 2  # blocks before the window is full
    without_clean_pass = 2 + 1  # before a switch, and at the end
    assert tape.replayed.count("forward") == (20 - first) * len(STEPS)
    last_of_a_causal_recache = 1
    assert tape.replayed.count("write_kv") == 20 - first - without_clean_pass + last_of_a_causal_recache
    passes.remove()
    assert (
        torch.equal(video(model, keep_sink=keep_sink, relative=relative, quantize=quantize), expected[:, :36])
        and len(tape.replayed) < 20 * 4
    )


def test_every_ring_and_batch_has_recordings_of_its_own(model):
    """Videos in turn, as a server makes them; a ring that is used again needs no new recordings."""
    expected = [video(model, seed=seed, batch=batch) for seed, batch in ((0, 1), (1, 1), (2, 2))]
    tape = Tape()
    SteadyPasses(model, block=3, capture=tape)
    for seed, batch in ((0, 1), (1, 1), (2, 2)):
        assert torch.equal(video(model, seed=seed, batch=batch), expected[seed])
    assert 4 <= len(tape.recorded) <= 6 and len(tape.recorded) % 2 == 0  # two rings may have lain at the same place


def test_videos_in_two_threads_take_turns(model):
    """As two sessions that run ahead: what they share (the prompt's place, the recordings) belongs to one pass at a time."""
    settings = [{"seed": 0, "texts": 1}, {"seed": 1, "texts": 2}]
    expected, meeting, waited = [video(model, **each) for each in settings], threading.Barrier(2, timeout=2), []

    class Meeting(Tape):
        def __call__(self, function, tensors):
            replay = super().__call__(function, tensors)

            def after_the_other(tensors):
                try:
                    meeting.wait()  # with the lock no two can be here
                except threading.BrokenBarrierError:
                    waited.append(1)
                return replay(tensors)

            return after_the_other

    SteadyPasses(model, block=3, capture=Meeting())
    with ThreadPoolExecutor(2) as threads, torch.no_grad():
        found = list(threads.map(lambda each: video(model, **each), settings))
    assert waited and all(map(torch.equal, found, expected))


def test_a_plain_pass_beside_a_compiled_one_is_not_compiled(model):
    def refused(*_):
        raise AssertionError("compiled")

    passes = SteadyPasses(model, block=3, compiler=lambda function: refused)
    inputs = torch.randn(1, 3, 4, 4, 4), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    with ThreadPoolExecutor(1) as other:
        assert passes._fixed(lambda: other.submit(model, *inputs).result()).shape == inputs[0].shape
    with pytest.raises(AssertionError, match="compiled"):
        passes._fixed(lambda: model(*inputs))


def test_recordings_are_forgotten_when_there_are_many(model, monkeypatch):
    monkeypatch.setattr("longlive.engine.steady.MAX_RECORDINGS", 2)
    passes = SteadyPasses(model, block=3, capture=Tape())
    for batch in (1, 2, 3):
        video(model, batch=batch)
    assert len(passes._recordings) == 2


def test_one_graph_is_compiled_for_all_layers_and_blocks(model):
    expected, graphs, calls = video(model, blocks=20), [], []

    def counted(graph, _):
        graphs.append(graph)
        return lambda *inputs: (calls.append(1), graph(*inputs))[1]

    torch.compiler.reset()
    network = deepcopy(model)
    passes = SteadyPasses(network, block=3, compiler=partial(torch.compile, fullgraph=True, dynamic=False, backend=counted))
    torch.testing.assert_close(video(network, blocks=20), expected, atol=1e-5, rtol=0)
    assert len(graphs) == 1
    passes.remove()
    assert torch.equal(video(network), expected[:, :36])
    layers, passes_written = len(model.blocks), 20 - 2 - 3 + 1
    assert len(calls) == (20 - 2) * len(STEPS) * layers + passes_written * (layers - 1)


def test_training_and_other_passes_take_the_plain_way(model):
    tape, text = Tape(), torch.randn(1, 5, 8)
    latents = torch.randn(1, 3, 4, 4, 4)
    expected = model(latents, torch.full((1, 1), 500.0), text)
    SteadyPasses(model, block=3, capture=tape)
    assert torch.equal(model(latents, torch.full((1, 1), 500.0), text), expected)
    assert expected.requires_grad and not tape.recorded
    with pytest.raises(RuntimeError, match="cannot carry gradients"):
        cache = RingCache(num_layers=2, batch=1, num_heads=2, rope=model.rope(4, 4), window=Window(0, 3))
        model(latents, torch.full((1, 1), 500.0), model.project_text(text), cache.view(range(3)))
    assert not tape.recorded


def test_a_prompt_is_copied_once_and_guidance_takes_two_texts_in_turn(model, monkeypatch):
    copies, update = [], steady._Words.update
    monkeypatch.setattr(steady._Words, "update", lambda self, text: (copies.append(text is not self._of), update(self, text))[1])
    made, init = [], steady._Words.__init__
    monkeypatch.setattr(steady._Words, "__init__", lambda self, text: (made.append(1), init(self, text))[1])
    passes = SteadyPasses(model, block=3, capture=Tape())
    video(model, blocks=11)
    assert len(made) == 1 and sum(copies) == 2  # the window is full under the first of three prompts
    passes.remove()

    def guided():
        text, negative = (model.project_text(torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))) for seed in (3, 4))
        cache = ring_cache(model, 4, 6, window=Window(3, 6))
        rollout = Rollout(Denoiser(model, guidance_scale=3.0, negative=negative), cache, Euler(STEPS))
        generator, blocks = torch.Generator().manual_seed(5), []
        for _ in range(6):
            blocks.append(rollout.block(torch.randn(1, 3, 4, 4, 6, generator=generator), text))
            rollout.remember(blocks[-1], text)
        return torch.cat(blocks, 1)

    expected = guided()
    SteadyPasses(model, block=3, capture=(tape := Tape()))
    assert torch.equal(guided(), expected) and sorted(tape.recorded) == ["forward", "write_kv"]


def test_moved_weights_are_recorded_again(model):
    tape = Tape()
    SteadyPasses(model, block=3, capture=tape)
    video(model)
    recorded = len(tape.recorded)
    for parameter in model.parameters():
        parameter.data = 2 * parameter.data  # at another place
    found = video(model)
    assert len(tape.recorded) > recorded
    plain = deepcopy(model)
    del plain.forward, plain.write_kv
    assert torch.equal(found, video(plain))


@torch._dynamo.config.patch(recompile_limit=2)
def test_more_sizes_than_are_compiled_run_as_they_are(model, caplog):
    torch.compiler.reset()
    passes = SteadyPasses(model, block=3, compiler=partial(torch.compile, fullgraph=True, dynamic=False, backend="eager"))
    found = [video(model, blocks=5, batch=batch) for batch in (1, 2, 3, 4)]
    assert sum("passes of this size are not compiled" in record.message for record in caplog.records) == 1
    passes.remove()
    torch.compiler.reset()
    for batch, latents in enumerate(found, 1):
        torch.testing.assert_close(latents, video(model, blocks=5, batch=batch), atol=1e-5, rtol=0)


def test_a_compiler_that_does_not_work_is_found_at_once(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch.compiler.reset()
    with pytest.raises(ValueError, match=r"torch\.compile does not work here: .*no compiler here; leave compile out"):
        steady.default_compiler(torch.device("cpu"))
