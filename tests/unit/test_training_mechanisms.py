"""The training path against plain rewritings of it: values of inference, gradients of one pass a block, distributions that match."""

from types import SimpleNamespace

import pytest
import torch

from longlive.cache.ring import RingCache
from longlive.cache.window import Window
from longlive.engine.apply import Recipe
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.generation.transition import Transition
from longlive.models.wan import WanTransformer
from longlive.ops.rope import Rope
from longlive.parallel.world import SharedChoices, World
from longlive.training.clips import StreamingTuner
from longlive.training.dmd import DMD
from longlive.training.networks import TrainableNetwork

STEPS = [1000.0, 937.5, 625.0]
BLOCK, TOKENS, SINK, RECENT = 3, 4, 3, 6  # two blocks and the sink: the window rolls on at frame 9


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXTS = {"old": gaussian(100, 5, 8), "new": gaussian(101, 5, 8)}


class Watched(Rollout):
    """Writes down the exit steps."""

    stops: list[int]

    def block(self, noise, text, *, num_passes=None, grad=False, guided=True):
        self.stops.append(num_passes)
        return super().block(noise, text, num_passes=num_passes, grad=grad, guided=guided)


def make_tuner(network, *, clip_frames=12, switch_at=(), keep_sink=False, steps=STEPS, noise=None):
    """Videos of three clips and more; all noise from one generator, in the order in which it is asked for."""
    random = torch.Generator().manual_seed(7)
    draw = noise or (lambda frames: torch.randn(1, frames, 4, 4, 4, generator=random))
    cache = history_cache(network, 4, 4, window=Window(SINK, RECENT))
    rollout = Watched(Denoiser(network), cache, FewStep(steps, lambda latents: draw(latents.shape[1])))
    rollout.stops = []
    return StreamingTuner(
        rollout,
        SimpleNamespace(next=lambda: [("old", "new")]),
        embed=lambda texts: torch.stack([TEXTS[text] for text in texts]),
        noise=draw,
        choices=SharedChoices(7, World()),
        clip_frames=clip_frames,
        max_frames=(4 * clip_frames,),
        switch_at=switch_at,
        transition=Transition(keep_sink),
    )


class Shown:
    """What a span sees, listed by hand: keys and values of others as constants, and its own."""

    def __init__(self, frames, others):
        self.rotation, self.others, self.own = Rope(2, 2, 12).at(frames), others, {}

    def at(self, layer):
        def attend(q, k, v, attend):
            self.own[layer] = (k.detach(), v.detach())
            return attend(q, *(torch.cat([*(other[layer][i] for other in self.others), own], 1) for i, own in enumerate((k, v))))

        return SimpleNamespace(attend=attend)


def by_hand(network, frames, stops, *, switch, keep_sink, grad_from):
    """The video of `make_tuner`, with lists of blocks for a cache; `stops` of every block; a gradient from frame `grad_from` on."""
    random = torch.Generator().manual_seed(7)
    randn = lambda: torch.randn(1, BLOCK, 4, 4, 4, generator=random)  # noqa: E731
    known, past, made, sink, oldest, text = {}, {}, [], 0, 0, TEXTS["old"][None]
    for start, stop in zip(range(0, frames, BLOCK), stops, strict=True):
        if start == switch:
            text = TEXTS["new"][None]
            kept = keep_sink and start > SINK + RECENT
            oldest = start - (RECENT if kept else min(SINK + RECENT, start))
            shown = Shown(range(oldest, start), [known[0]] if kept else [])
            with torch.no_grad():
                network(torch.cat([past[s] for s in range(oldest, start, BLOCK)], 1), torch.zeros(1, start - oldest), text, shown)
            known = {0: known[0]} if kept else {}
            for n, s in enumerate(range(oldest, start, BLOCK)):
                part = slice(n * BLOCK * TOKENS, (n + 1) * BLOCK * TOKENS)
                known[s] = {layer: (k[:, part], v[:, part]) for layer, (k, v) in shown.own.items()}
            sink = 0 if kept else oldest
        seen = [known[s] for s in known if s == sink or s >= max(oldest, start + BLOCK - RECENT)]
        x = randn()
        for number, t in enumerate(STEPS[:stop]):
            last = number == stop - 1
            with torch.set_grad_enabled(last and start >= grad_from):
                velocity = network(x, torch.full((1, BLOCK), t), text, Shown(range(start, start + BLOCK), seen))
                x0 = (x.double() - t / 1000 * velocity.double()).float()
            if not last:
                sigma = STEPS[number + 1] / 1000
                x = (1 - sigma) * x0 + sigma * randn()
        made.append(x0)
        past[start], shown = x0.detach(), Shown(range(start, start + BLOCK), seen)
        with torch.no_grad():
            network(past[start], torch.zeros(1, BLOCK), text, shown)
        known[start] = shown.own
    return torch.cat(made, 1)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    ("clip_frames", "number", "switch", "keep_sink"),
    [(6, 0, None, False), (12, 0, None, False), (6, 1, 6, True), (12, 1, 12, False), (12, 2, 21, False), (12, 2, 21, True)],
    ids=["two blocks", "rolled", "switched while all is seen", "switched at once", "sink refreshed", "sink kept"],
)
def test_values_and_gradients_of_a_clip_are_those_written_by_hand(model, clip_frames, number, switch, keep_sink, checkpointing):
    plain = WanTransformer.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    learner = TrainableNetwork(model, lr=1e-3, recipe=Recipe(checkpointing=checkpointing))
    tuner = make_tuner(model, clip_frames=clip_frames, switch_at=() if switch is None else (switch,), keep_sink=keep_sink)
    for _ in range(number):
        tuner.clip(grad=False)
    clip = tuner.clip(grad=True)
    made = by_hand(plain, clip.frames.stop, tuner.rollout.stops, switch=switch, keep_sink=keep_sink, grad_from=clip.frames.start)[
        :, -clip_frames:
    ]
    torch.testing.assert_close(clip.latents, made, atol=1e-5, rtol=0)
    assert len(set(tuner.rollout.stops)) > 1 or number == 0  # exit steps differ between clips, or this tests little
    weights = gaussian(3, *clip.latents.shape) / clip.latents.numel() ** 0.5
    for latents in (clip.latents, made):
        (latents * weights).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-5, msg=name)
    assert all(weight.grad.any() for weight in learner.weights)


def test_values_of_clips_ended_early_are_those_of_inference(model):
    """The ring of inference, with the same noise and exit steps, shows the same video, through a switch and past the window."""
    model.requires_grad_(False)
    tuner = make_tuner(model, switch_at=(12,), keep_sink=True)
    clips = [tuner.clip(grad=False) for _ in range(4)]
    stops = tuner.rollout.stops
    assert set(stops) == {1, 2, 3}

    random = torch.Generator().manual_seed(7)
    ring = RingCache(num_layers=2, batch=1, num_heads=2, rope=Rope(2, 2, 12), window=Window(SINK, RECENT))
    rollout = Rollout(Denoiser(model), ring, FewStep(STEPS, lambda like: torch.randn(like.shape, generator=random)))
    text, made = TEXTS["old"][None], []
    for number, stop in enumerate(stops):
        if number * BLOCK == 12:
            text = TEXTS["new"][None]
            rollout.switch(text, Transition(True))
        made.append(rollout.block(torch.randn(1, BLOCK, 4, 4, 4, generator=random), text, num_passes=stop))
        rollout.remember(made[-1], text)
    video = torch.cat(made, 1)
    for clip in clips:
        torch.testing.assert_close(clip.latents, video[:, clip.frames.stop - 12 : clip.frames.stop], atol=2e-5, rtol=0)


def test_a_loss_on_a_block_reaches_no_other_block(model):
    """With a single denoising pass the noise itself gets the gradient, were there a way to it through the cache."""
    noises = []

    def noise(frames):
        noises.append(gaussian(len(noises), 1, frames, 4, 4, 4).requires_grad_())
        return noises[-1]

    tuner = make_tuner(model, steps=[1000.0], noise=noise)
    for count in (4, 3):  # blocks of the first clip, and of the next
        noises.clear()
        clip = tuner.clip(grad=True)
        assert len(noises) == count
        for block in range(count):
            found = torch.autograd.grad(clip.latents[:, 12 - 3 * count :][:, 3 * block : 3 * block + 3].sum(), noises, retain_graph=True)
            assert [bool(gradient.any()) for gradient in found] == [other == block for other in range(count)]


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "adapters"])
def test_every_trainable_tensor_learns_from_one_clip(model, rank):
    """Generator and critic, whole or as adapters; what a prompt is read with is among it, and nothing is that is frozen."""
    teacher, critic = (WanTransformer.from_config(model.config) for _ in range(2))
    for seed, network in enumerate((teacher, critic)):
        for n, parameter in enumerate(network.parameters()):
            parameter.data = 0.2 * gaussian(1000 * seed + n, *parameter.shape)
    learners = [TrainableNetwork(network, lr=1e-3, lora_rank=rank, recipe=Recipe(checkpointing=True)) for network in (model, critic)]
    teacher.requires_grad_(False)
    for learner in learners:
        for n, weight in enumerate(learner.weights):  # adapters begin with B = 0, which leaves A without a gradient
            weight.data += 0.05 * gaussian(5000 + n, *weight.shape)
    frozen = [parameter for network in (model, critic) for parameter in network.parameters() if not parameter.requires_grad]
    objective, tuner = DMD(Denoiser(teacher), Denoiser(critic)), make_tuner(model)
    tuner.clip(grad=False)

    clip = tuner.clip(grad=True)
    t, noise = torch.full((1, 12), 700.0), gaussian(4, *clip.latents.shape)
    objective.generator_loss(clip.latents, clip.text, gaussian(5, 1, 5, 8), t=t, noise=noise, fresh=clip.fresh).loss.backward()
    assert all(weight.grad is None for weight in learners[1].weights)
    clip = tuner.clip(grad=False)
    objective.critic_loss(clip.latents, clip.text, t=t, noise=noise, fresh=clip.fresh).backward()
    for network, learner in zip((model, critic), learners):
        names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert len(names) == len(learner.weights)
        without = [name for name in names if (grad := network.get_parameter(name).grad) is None or not grad.any()]
        assert not without
        read = [f"blocks.{n}.cross_attn.{part}" for n in range(2) for part in ("k", "v")] + ["text_embedding.0"]
        for place in read if rank is None else read[:-1]:
            assert any(name.startswith(place) for name in names)
        if rank is not None:  # A and B of ten linear layers in each of two blocks
            assert len(names) == 2 * 10 * 2 and all("lora_" in name for name in names)
    assert all(parameter.grad is None for parameter in frozen) and all(p.grad is None for p in teacher.parameters())


SHAPE, SCALE = (3, 2, 2, 2), 0.5


class Exact:
    """The denoiser of clips N(mean, scale^2): posterior means in closed form. A text is a mean."""

    def __init__(self, mean=None, scale=SCALE):
        self.mean, self.scale = mean, scale

    def __call__(self, noisy, t, text):
        sigma = (t / 1000)[..., None, None, None]
        mean, variance = text.view(-1, *SHAPE) if self.mean is None else self.mean, torch.as_tensor(self.scale) ** 2
        gain = (1 - sigma) * variance / ((1 - sigma) ** 2 * variance + sigma**2)
        x0 = mean + gain * (noisy - (1 - sigma) * mean)
        return SimpleNamespace(x0=x0, velocity=(noisy - x0) / sigma)


def texts(batch):
    """Means of the prompt and of the negative prompt, for a batch."""
    return [gaussian(seed, 1, 1, 24).expand(batch, -1, -1) for seed in (0, 1)]


def test_the_gradient_is_zero_where_distributions_match_and_only_there():
    text, negative = texts(16)
    clip, noise = gaussian(2, 16, *SHAPE), gaussian(3, 16, *SHAPE)
    for guidance in (0.0, 3.0):
        target = (text + guidance * (text - negative)).view(-1, *SHAPE)
        for shift, same in ((0.0, True), (0.3, False)):
            objective = DMD(Exact(), Exact(target + shift), guidance_scale=1 + guidance)
            t = objective.draw_timesteps(clip, torch.Generator().manual_seed(0))
            gradient = objective.generator_loss(clip, text, negative, t=t, noise=noise).gradient
            assert gradient.abs().max() < 1e-4 if same else gradient.mean() > 0.02


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_a_gaussian_generator_becomes_what_teacher_and_guidance_name(guidance):
    """x = mean + scale z, a critic that knows it exactly: the mean goes to m_c + w (m_c - m_n), the scale to the teacher's."""
    text, negative = texts(64)
    target = (text + guidance * (text - negative))[0].view(*SHAPE)
    random = torch.Generator().manual_seed(1)
    mean, scale = torch.zeros(SHAPE, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    begun = target.norm()
    for _ in range(200):
        clip = mean + scale * torch.randn(64, *SHAPE, generator=random)
        objective = DMD(Exact(), Exact(mean.detach(), scale.detach()), guidance_scale=1 + guidance)
        t, noise = objective.draw_timesteps(clip, random), torch.randn(clip.shape, generator=random)
        loss = objective.generator_loss(clip, text, negative, t=t, noise=noise).loss
        gradients = torch.autograd.grad(loss, (mean, scale))
        with torch.no_grad():
            mean -= 0.3 * 24 * gradients[0]  # each has a 24th of the mean over 24 elements
            scale -= 0.5 * gradients[1]
    assert (mean - target).norm() < 0.02 * begun
    assert scale.item() == pytest.approx(SCALE, abs=0.02)


def test_rescaled_guidance_turns_the_mean_and_does_not_drive_it_beyond():
    """Without it the mean goes to m_c + w (m_c - m_n), several times as far out; with it about as far as m_c, in that direction."""
    text, negative = texts(64)
    named = text[0].view(*SHAPE)
    target = (text + 3.0 * (text - negative))[0].view(*SHAPE)
    random = torch.Generator().manual_seed(1)
    mean = torch.zeros(SHAPE, requires_grad=True)
    for _ in range(200):
        clip = mean + SCALE * torch.randn(64, *SHAPE, generator=random)
        objective = DMD(Exact(), Exact(mean.detach()), guidance_scale=4.0, guidance_rescale=1.0)
        t, noise = objective.draw_timesteps(clip, random), torch.randn(clip.shape, generator=random)
        (gradient,) = torch.autograd.grad(objective.generator_loss(clip, text, negative, t=t, noise=noise).loss, mean)
        with torch.no_grad():
            mean -= 0.3 * 24 * gradient
    towards = torch.cosine_similarity(torch.stack([mean.detach().flatten(), named.flatten()]), target.flatten()[None])
    assert target.norm() > 3 * named.norm() and mean.norm() < 1.3 * named.norm()
    assert towards[0] > 0.95 and towards[0] > towards[1] + 0.05


def test_a_gaussian_generator_follows_a_critic_that_learns():
    """Five updates of the critic for one of the generator: both end where the teacher is."""
    text, negative = texts(64)
    random = torch.Generator().manual_seed(2)
    mean, fake = torch.zeros(SHAPE, requires_grad=True), torch.zeros(SHAPE, requires_grad=True)
    objective = DMD(Exact(), Exact(fake), guidance_scale=1.0)

    def drawn():
        clip = mean + SCALE * torch.randn(64, *SHAPE, generator=random)
        return clip, {"t": objective.draw_timesteps(clip, random), "noise": torch.randn(clip.shape, generator=random)}

    for step in range(60):
        rate = 1 - step / 60
        clip, told = drawn()
        (gradient,) = torch.autograd.grad(objective.generator_loss(clip, text, negative, **told).loss, mean)
        for _ in range(5):
            clip, told = drawn()
            (slope,) = torch.autograd.grad(objective.critic_loss(clip, text, **told), fake)
            with torch.no_grad():
                fake -= 5 * rate * slope
        with torch.no_grad():
            mean -= 0.3 * 24 * rate * gradient
    assert (fake - mean).abs().max() < 0.15
    assert (mean - text[0].view(*SHAPE)).abs().max() < 0.2
