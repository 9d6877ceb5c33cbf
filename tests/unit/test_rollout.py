"""The block loop: written out by hand it gives the same; ended early it gives inference's values; gradients stay in their block."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.generation.caches import history_cache, ring_cache
from longlive.generation.cues import Cue, PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import BlockAborted, Rollout
from longlive.generation.sampling import sample
from longlive.generation.solver import Euler, FewStep
from longlive.generation.stream import stream
from longlive.generation.transition import Transition
from longlive.ops.rope import Rope

STEPS = [1000.0, 937.5, 625.0]


def ring(**settings):
    return RingCache(num_layers=2, batch=1, num_heads=2, rope=Rope(2, 2, 12), window=Window(3, 6), **settings)


def gaussian(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def test_block_equals_the_loop_written_by_hand(model):
    randn = gaussian(0)
    noise, text, fresh = randn(1, 3, 4, 4, 4), randn(1, 5, 8), [randn(1, 3, 4, 4, 4) for _ in STEPS]
    queue = iter(fresh)
    made = Rollout(Denoiser(model), ring(), FewStep(STEPS, lambda like: next(queue))).block(noise, text)
    x = noise
    for number, t in enumerate(STEPS):
        with torch.no_grad():
            x0 = x - t / 1000 * model(x, torch.full((1, 3), t), text)
        if number < len(STEPS) - 1:
            sigma = STEPS[number + 1] / 1000
            x = (1 - sigma) * x0 + sigma * fresh[number]
    torch.testing.assert_close(made, x0, atol=1e-5, rtol=0)


def test_without_fresh_noise_a_block_is_euler_steps_of_the_flow(model):
    randn = gaussian(1)
    noise, text = randn(1, 3, 4, 4, 4), randn(1, 5, 8)
    made = Rollout(Denoiser(model), ring(), Euler(STEPS)).block(noise, text)
    x, levels = noise, [t / 1000 for t in STEPS] + [0.0]
    for now, after in pairwise(levels):
        with torch.no_grad():
            x = x + (after - now) * model(x, torch.full((1, 3), 1000 * now), text)
    torch.testing.assert_close(made, x, atol=1e-5, rtol=0)


def test_guidance_leaves_the_text_and_nothing_else_behind(model):
    """Guided velocities are v + w (v - v_n); what later blocks see was written under the text alone."""
    text, negative, noise = gaussian(9)(1, 5, 8), gaussian(10)(1, 5, 8), gaussian(11)(2, 1, 3, 4, 4, 4)
    rollout = Rollout(Denoiser(model, guidance_scale=3.0, negative=negative), ring(), Euler([1000.0]))
    with torch.no_grad():
        v, v_n = (model(noise[0], torch.full((1, 3), 1000.0), words) for words in (text, negative))
    first = rollout.block(noise[0], text)
    torch.testing.assert_close(first, noise[0] - (v + 2 * (v - v_n)), atol=1e-4, rtol=0)
    rollout.remember(first, text)
    plain = Rollout(Denoiser(model), ring(), Euler([1000.0]))
    plain.remember(first, text)
    with torch.no_grad():
        flows = [model(noise[1], torch.full((1, 3), 500.0), text, r.cache.view(range(3, 6))) for r in (rollout, plain)]
    torch.testing.assert_close(*flows, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="needs negative text"):
        Denoiser(model, guidance_scale=2.0)


def test_guidance_of_the_first_blocks_of_a_prompt(model):
    model = model.requires_grad_(False)
    texts, noise = {"a": gaussian(12)(1, 5, 8), "b": gaussian(13)(1, 5, 8)}, gaussian(14)(1, 15, 4, 4, 4)
    calls, rollout = [], None

    class Watched(Denoiser):
        def __call__(self, noisy, t, text, view=None, *, guided=True):
            calls.append((rollout.end, guided))
            return super().__call__(noisy, t, text, view, guided=guided)

    def latents(**settings):
        nonlocal rollout
        denoiser = Watched(model, guidance_scale=3.0, negative=gaussian(15)(1, 5, 8))
        rollout = Rollout(denoiser, ring(), Euler([1000.0]))
        cues = PromptSchedule.at_latent_frames(["a", "b"], [9])
        noises = lambda frames: noise[:, frames.start : frames.stop]  # noqa: E731
        made = stream(rollout, cues, project_text=texts.get, noise=noises, block=3, num_latent_frames=15, **settings)
        return torch.cat([part.latents for part in made], 1)

    first = latents(guided_blocks=1)
    assert calls == [(0, True), (3, False), (6, False), (9, True), (12, False)]
    every = latents()
    assert torch.equal(first[:, :3], every[:, :3]) and not torch.equal(first[:, 3:6], every[:, 3:6])


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_ended_early_gives_the_values_of_inference(model, num_passes):
    seen = []
    noise, text = gaussian(2)(1, 3, 4, 4, 4), gaussian(3)(1, 5, 8)
    whole = Rollout(Denoiser(model), ring(), FewStep(STEPS, torch.ones_like), on_step=lambda number, t, x0: seen.append(x0))
    whole.block(noise, text)
    early = Rollout(Denoiser(model), history_cache(model, 4, 4, window=Window(3, 6)), FewStep(STEPS, torch.ones_like))
    torch.testing.assert_close(early.block(noise, text, num_passes=num_passes, grad=True).detach(), seen[num_passes - 1], atol=1e-6, rtol=0)


def test_a_block_may_be_abandoned_between_two_passes(model):
    """Asked after each pass but the last; nothing is remembered, and the same block can be made again."""
    noise, text, answers = gaussian(2)(1, 3, 4, 4, 4), gaussian(3)(1, 5, 8), iter([False, True, False, False])
    rollout = Rollout(Denoiser(model), ring(), Euler(STEPS))
    with pytest.raises(BlockAborted):
        rollout.block(noise, text, should_abort=answers.__next__)
    assert rollout.end == 0
    made = rollout.block(noise, text, should_abort=answers.__next__)
    assert next(answers, "asked four times") == "asked four times"
    assert torch.equal(made, Rollout(Denoiser(model), ring(), Euler(STEPS)).block(noise, text))


def test_clean_latents_may_be_replaced_after_each_pass(model):
    """What the callback returns is what goes on, to the next timestep and out of the block; None leaves them as they are."""
    noise, text, asked = gaussian(2)(1, 3, 4, 4, 4), gaussian(3)(1, 5, 8), []

    def edit(number, t, x0):
        asked.append((number, t))
        return None if number == 1 else 2 * x0

    made = Rollout(Denoiser(model), ring(), FewStep(STEPS, torch.zeros_like), on_step=edit).block(noise, text)
    x = noise
    for number, t in enumerate(STEPS):
        with torch.no_grad():
            x0 = (x - t / 1000 * model(x, torch.full((1, 3), t), text)) * (1 if number == 1 else 2)
        x = (1 - STEPS[min(number + 1, 2)] / 1000) * x0
    torch.testing.assert_close(made, x0, atol=1e-5, rtol=0)
    assert asked == list(enumerate(STEPS))


def test_more_or_fewer_passes_than_there_are_timesteps_are_refused(model):
    rollout = Rollout(Denoiser(model), ring(), Euler(STEPS))
    for num_passes in (0, 4):
        with pytest.raises(ValueError, match=f"num_passes must be 1 to 3, got {num_passes}"):
            rollout.block(torch.zeros(1, 3, 4, 4, 4), torch.zeros(1, 5, 8), num_passes=num_passes)
    for solver in (Euler, partial(FewStep, draw=torch.zeros_like)):
        with pytest.raises(ValueError, match="at least one denoising step"):
            solver([])


def test_gradient_flows_through_the_last_pass_only_and_never_to_earlier_blocks(model):
    noise, text = gaussian(4)(2, 1, 3, 4, 4, 4).requires_grad_(), gaussian(5)(1, 5, 8)
    rollout = Rollout(Denoiser(model), history_cache(model, 4, 4, window=Window(3, 6)), FewStep(STEPS, torch.zeros_like))
    first = rollout.block(noise[0], text, grad=True)
    rollout.remember(first, text)
    assert not rollout.state()["recent"].requires_grad
    first.square().sum().backward()  # frees what it needed: a later block that led back to it would fail
    second = rollout.block(noise[1], text, grad=True)
    model.zero_grad()
    second.square().sum().backward()
    assert noise.grad is None or not noise.grad.any()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not without


def test_one_stream_of_12_blocks_equals_12_calls(model):
    model = model.requires_grad_(False)
    noise, texts = gaussian(6)(1, 36, 4, 4, 4), [gaussian(7)(1, 5, 8), gaussian(8)(1, 5, 8)]
    read = {"a": model.project_text(texts[0]), "b": model.project_text(texts[1])}
    rollout = Rollout(Denoiser(model), ring(), FewStep(STEPS, torch.zeros_like))
    cues = PromptSchedule.at_latent_frames(["a", "b"], [14])  # takes effect at frame 15
    made = list(
        stream(
            rollout, cues, project_text=read.get, noise=lambda frames: noise[:, frames.start : frames.stop], block=3, num_latent_frames=36
        )
    )
    assert [part.switched for part in made] == [start in (0, 15) for start in range(0, 36, 3)]

    by_hand, parts = Rollout(Denoiser(model), ring(), FewStep(STEPS, torch.zeros_like)), []
    for start in range(0, 36, 3):
        if start == 15:
            by_hand.switch(texts[1], Transition(True))
        text = texts[start >= 15]
        parts.append(by_hand.block(noise[:, start : start + 3], text))
        by_hand.remember(parts[-1], text)
    torch.testing.assert_close(torch.cat([part.latents for part in made], 1), torch.cat(parts, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("context_t", [{}, {"context_t": 20.0}], ids=str)
def test_finished_frames_are_recorded_clean_at_the_context_timestep(model, context_t):
    x0, text, by_hand = gaussian(2)(1, 3, 4, 4, 4), gaussian(3)(1, 5, 8), ring()
    rollout = Rollout(Denoiser(model), ring(), Euler(STEPS), **context_t)
    rollout.remember(x0, text)
    with torch.no_grad(), by_hand.record(range(3)) as view:
        model(x0, torch.full((1, 1), context_t.get("context_t", 0.0)), text, view)
    assert torch.equal(rollout.cache.keys, by_hand.keys) and torch.equal(rollout.cache.values, by_hand.values)


@pytest.mark.parametrize("kind", ["joint", "causal", "none", "clear"])
@pytest.mark.parametrize("make_cache", ["ring", "relative ring", "history"])
def test_a_deferred_clean_pass_changes_nothing(model, kind, make_cache):
    """It is made before the next block, left out before a switch that reads the block again, and left out at the end of the video."""
    text, keep = gaussian(21)(2, 1, 5, 8), iter([True, False, True] * 2)
    runs = []
    for deferred in (True, False):
        cache = history_cache(model, 4, 4, window=Window(3, 6)) if make_cache == "history" else ring(relative=make_cache == "relative ring")
        passes, denoiser, noise = [], Denoiser(model), gaussian(22)
        write = denoiser.write_kv
        denoiser.write_kv = lambda *inputs, passes=passes, write=write: (passes.append(inputs[0].shape[1]), write(*inputs))
        rollout, made = Rollout(denoiser, cache, FewStep(STEPS[:2], torch.ones_like)), []
        for number in range(9):
            if number in (1, 5, 7):
                rollout.switch(text[number % 2], Transition(next(keep), kind))
            assert rollout.end == 3 * number
            made.append(rollout.block(noise(1, 3, 4, 4, 4), text[number // 4 % 2]))
            (rollout.defer if deferred else rollout.remember)(made[-1], text[number // 4 % 2])
        runs.append((torch.cat(made, 1), len(passes)))
    torch.testing.assert_close(runs[0][0], runs[1][0], atol=0, rtol=0)
    assert runs[1][1] - runs[0][1] == (1 if kind == "none" else 4)


def test_a_state_holds_the_deferred_block(model):
    block, later, text = gaussian(23)(1, 3, 4, 4, 4), gaussian(24)(1, 3, 4, 4, 4), gaussian(25)(1, 5, 8)
    found = []
    for deferred in (True, False):
        rollout = Rollout(Denoiser(model), history_cache(model, 4, 4, window=Window(3, 6)), Euler(STEPS))
        (rollout.defer if deferred else rollout.remember)(block, text)
        state = rollout.state(), rollout.cache.state()
        other = Rollout(rollout.denoiser, history_cache(model, 4, 4, window=Window(3, 6)), rollout.solver)
        other.defer(later, text)  # of a video that is given up
        other.load(state[0])
        other.cache.load(state[1])
        assert other.end == 3
        found.append(other.block(later, text))
    assert torch.equal(*found)


def test_a_rollout_goes_on_from_its_state(model):
    """Also to a switch that reads the frames again block by block; before the first block too."""
    blocks, texts = gaussian(4)(3, 1, 3, 4, 4, 4), gaussian(5)(2, 1, 5, 8)
    for stop_at in (0, 2):
        found = []
        for stops in (False, True):
            rollout = Rollout(Denoiser(model), ring(), Euler(STEPS))
            for number, block in enumerate(blocks):
                if stops and number == stop_at:
                    stopped, rollout = rollout, Rollout(rollout.denoiser, rollout.cache, rollout.solver)
                    rollout.load(stopped.state())
                rollout.remember(block, texts[0])
            rollout.switch(texts[1], Transition(recache="causal"))
            found.append(rollout.cache.keys)
        assert torch.equal(*found)
    rollout.load(rollout.state(), device="meta")
    assert rollout._recent is not None and rollout._recent.device.type == "meta"


def test_latents_that_are_not_finite_stop_and_say_where(model):
    rollout = Rollout(
        Denoiser(model),
        ring(),
        FewStep(STEPS, torch.zeros_like),
        on_step=lambda number, t, x0: x0 * torch.nan if number == 0 and rollout.end in bad else None,
    )
    bad = {0}
    rollout.finite_check()()
    rollout.block(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    with pytest.raises(FloatingPointError, match=r"block 0 \(frames 0-2\), step 2"):
        rollout.finite_check()()
    bad = {3}
    rollout.block(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    rollout.finite_check()()
    rollout.remember(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    rollout.block(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    later = rollout.finite_check()
    rollout.defer(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    with pytest.raises(FloatingPointError, match=r"block 1 \(frames 3-5\), step 2"):
        later()
    rollout.reset()
    bad = set()
    rollout.block(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    rollout.remember(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    bad = {3}
    rollout.block(torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8))
    with pytest.raises(FloatingPointError, match=r"block 1 \(frames 3-5\), step 2"):
        rollout.finite_check()()
    video = stream(
        rollout,
        PromptSchedule.single("a"),
        project_text=lambda _: torch.randn(1, 5, 8),
        noise=lambda f: torch.randn(1, 3, 4, 4, 4),
        block=3,
    )
    with pytest.raises(FloatingPointError, match=r"block 1 \(frames 3-5\), step 2"):
        next(video)


@torch.no_grad()
def after_a_switch(model, cache, recache, past, texts):
    """The cache's contents matter through what the next block becomes: the flow at the frames after a switch."""
    rollout = Rollout(Denoiser(model), cache, FewStep(STEPS, torch.zeros_like))
    for block in past.split(3, dim=1):
        rollout.remember(block, texts[0])
    rollout.switch(texts[1], Transition(False, recache))
    span = range(rollout.end, rollout.end + 3)
    assert span.start == past.shape[1]
    return rollout.denoiser(gaussian(3)(1, 3, 4, 4, 4), 500.0, texts[1], cache.view(span)).velocity


@pytest.mark.parametrize("kind", [ring_cache, history_cache])
def test_ways_of_treating_the_past_at_a_switch(model, kind):
    make = partial(kind, model, 4, 4, window=Window(3, 6))
    texts, pasts = gaussian(0)(2, 1, 5, 8), gaussian(1)(2, 1, 15, 4, 4, 4)
    joint, causal, kept = (after_a_switch(model, make(), way, pasts[0], texts) for way in ("joint", "causal", "none"))
    assert min((joint - causal).abs().max(), (joint - kept).abs().max(), (causal - kept).abs().max()) > 1e-4

    cleared = [after_a_switch(model, make(), "clear", past, texts) for past in pasts]
    assert torch.equal(*cleared)  # does not depend on the past

    with pytest.raises(ValueError, match="recache 'half' is unknown; choose from joint, causal, none, clear"):
        Transition(recache="half")


def test_frames_that_are_no_whole_blocks_are_refused(model):
    rollout = Rollout(Denoiser(model), ring(), Euler(STEPS))
    with pytest.raises(ValueError, match="7 latent frames cannot be cut into blocks of 3; choose a multiple, 6"):
        next(stream(rollout, PromptSchedule.single("a"), project_text=lambda _: None, noise=lambda _: None, block=3, num_latent_frames=7))


def test_the_host_reads_nothing_while_blocks_are_made(model, monkeypatch):
    """On a device without data every read raises; only the check of finiteness reads, and on a GPU that comes a block later."""
    monkeypatch.setattr(Rollout, "finite_check", lambda self: lambda: None)
    network, text = model.to("meta"), torch.empty(2, 1, 5, 8, device="meta")
    for kind in ("joint", "causal", "none", "clear"):
        blocks = sample(
            Denoiser(network),
            PromptSchedule((Cue(0, "a"), Cue(15, "b", Transition(False, kind)), Cue(30, "a", Transition(True, kind)))),
            lambda prompt: network.project_text(text["ab".index(prompt)]),
            cache=ring_cache(network, 4, 4, window=Window(3, 6), relative=kind == "none"),
            latent_size=(4, 4),
            timesteps=STEPS,
            generator=torch.Generator().manual_seed(0),
            block=3,
            num_latent_frames=42,
        )
        assert sum(made.latents.shape[1] for made in blocks) == 42
