"""The exact teacher is the posterior mean by enumeration, samples the world, continues a past, and drives DMD the right way."""

import itertools

import pytest
import torch

from experiments.exact_teacher import ExactPrediction, ExactTeacher, manifold_distance, nearest_clip
from experiments.state_world import (
    IDENTITY,
    StateIdentity,
    captions_of,
    draw_identity,
    latents,
    negative,
    read,
    text_of,
)  # fmt: skip
from longlive.miniature.world import ATTRIBUTES, Captioned, all_captioned, held_out
from longlive.ops.flow_matching import add_noise, warp_steps
from longlive.training.dmd import DMD

IDENTITIES = [StateIdentity(*values) for values in itertools.product(*map(range, IDENTITY.values()))]  # of each caption equally likely
STEPS = warp_steps([1000, 750, 500, 250], 5.0)


def enumerated(noisy, t, prompts, past=None, past_sigma=0.05):
    """E[x | x_t] by weighing every video of each prompt (that of past and present) with its Gaussian density, in float64."""
    num_past = 0 if past is None else past.shape[1]
    identities = IDENTITIES
    result = []
    for b, prompt in enumerate(prompts):
        clips = latents([prompt] * len(identities), identities, num_past + noisy.shape[1]).double().flatten(2)
        sigma = t[b].double()[:, None] / 1000
        error = noisy[b].flatten(1).double() - (1 - sigma) * clips[:, num_past:]
        logits = -(error.square() / (2 * sigma.square())).sum(dim=(1, 2))
        if past is not None:
            logits = logits - (past[b].flatten(1).double() - clips[:, :num_past]).square().sum(dim=(1, 2)) / (2 * past_sigma**2)
        result.append(torch.einsum("k,kfe->fe", logits.softmax(0), clips[:, num_past:]))
    return torch.stack(result).view(noisy.shape)


class Enumerated:
    """The posterior mean again, without the structure."""

    def __call__(self, noisy, t, text):
        return ExactPrediction(noisy, enumerated(noisy, t, captions_of(text)).to(noisy.dtype), t)


class Point:
    """The exact score of a generator that always makes the same clip."""

    def __init__(self, clip):
        self.clip = clip

    def __call__(self, noisy, t, text):
        return ExactPrediction(noisy, self.clip, t)


def scene(count, num_latent_frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    captions = held_out(count)
    identities = [draw_identity(generator) for _ in captions]
    return captions, identities, latents(captions, identities, num_latent_frames), generator


def sample(teacher, text, shape, generator, **past):
    """Few-step sampling: predict, add fresh noise, predict again."""
    noisy = torch.randn(shape, generator=generator)
    for t, following in zip(STEPS, [*STEPS[1:], None], strict=True):
        x0 = teacher(noisy, t, text, **past).x0
        if following is None:
            return x0
        noisy = add_noise(x0, torch.randn(shape, generator=generator), torch.full(shape[:2], following))


@pytest.mark.parametrize("t", [20.0, 833.0, 1000.0, "per frame"])
def test_equals_enumeration(t):
    captions, _, x0, generator = scene(2, 4)
    captions = [captions[0], [captions[1]] * 2 + [captions[1].with_one_change("motion", "up")] * 2]
    levels = 20 + 960 * torch.rand(2, 4, generator=generator) if t == "per frame" else torch.full((2, 4), t)
    noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), levels)
    prediction = ExactTeacher()(noisy, t if isinstance(t, float) else levels, captions)
    expected = enumerated(noisy, levels, captions)
    torch.testing.assert_close(prediction.x0, expected.float(), atol=1e-5, rtol=0)
    sigma = levels[..., None, None, None] / 1000
    torch.testing.assert_close(prediction.velocity, ((noisy - expected) / sigma).float(), atol=1e-3 if t == 20 else 1e-4, rtol=0)
    torch.testing.assert_close(prediction.noise, ((noisy - (1 - sigma) * expected) / sigma).float(), atol=1e-3 if t == 20 else 1e-4, rtol=0)


def test_undecided_posteriors_are_compared():
    """At t = 900 the enumeration is far from a single video: the test above would notice a wrong weight."""
    captions, _, x0, generator = scene(8, 4)
    levels = torch.full((8, 4), 900.0)
    noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), levels)
    mean = ExactTeacher()(noisy, levels, captions).x0
    assert 0.1 < read(mean).residual.median() < 0.7


def test_past_is_weighed_as_enumeration_does():
    captions, _, video, generator = scene(2, 5)
    past = video[:, :2] + 1.0 * torch.randn(video[:, :2].shape, generator=generator)
    levels = torch.full((2, 3), 950.0)
    noisy = add_noise(video[:, 2:], torch.randn(video[:, 2:].shape, generator=generator), levels)
    got = ExactTeacher(past_sigma=2.0)(noisy, levels, text_of(captions), clean_past=past).x0
    torch.testing.assert_close(got, enumerated(noisy, levels, captions, past, 2.0).float(), atol=1e-5, rtol=0)
    assert (got - ExactTeacher()(noisy, levels, text_of(captions)).x0).abs().max() > 0.1


@pytest.mark.slow
def test_text_that_says_nothing_is_the_mixture_of_all_captions():
    captions, _, x0, generator = scene(2, 2)
    levels = torch.tensor([[930.0, 960.0], [800.0, 990.0]])
    noisy = add_noise(x0, torch.randn(x0.shape, generator=generator), levels)
    text = torch.cat([negative(1), text_of(captions[1:])])
    got = ExactTeacher()(noisy, levels, text).x0
    torch.testing.assert_close(got[1:], enumerated(noisy[1:], levels[1:], captions[1:]).float(), atol=1e-5, rtol=0)

    sigma = levels[0, :, None].double() / 1000
    weighted = ((1 - sigma) / sigma.square() * noisy[0].flatten(1).double()).flatten()
    identities, everything = IDENTITIES, all_captioned()
    first = Captioned("circle", "red", "black", "still")
    moving = {
        m: latents([first.with_one_change("motion", m)] * len(identities), identities, 2).flatten(1).double() for m in ATTRIBUTES["motion"]
    }
    still = [Captioned(c.shape, c.color, c.background, "still") for c in everything]
    looks = latents([first, *still], [StateIdentity(0, 0, 0, 0)] * 751, 2).flatten(1).double()
    evidence, means = [], []
    for caption, difference in zip(everything, looks[1:] - looks[0], strict=True):
        logits = moving[caption.motion] @ weighted + difference @ weighted
        evidence.append(logits.logsumexp(0))
        means.append(logits.softmax(0) @ moving[caption.motion] + difference)
    mixture = torch.stack(evidence).softmax(0) @ torch.stack(means)
    torch.testing.assert_close(got[0].flatten(), mixture.float(), atol=1e-5, rtol=0)


def test_few_steps_sample_the_world():
    captions, _, _, generator = scene(64, 12)
    made = sample(ExactTeacher(), text_of(captions), (64, 12, 8, 4, 4), generator)
    reading = read(made)
    for name, right in reading.correct(captions).items():
        assert right.float().mean() >= 0.98, name
    assert manifold_distance(made, captions).median() < 0.02
    assert (reading.jump(captions).amax(dim=1) < 0.1).float().mean() >= 0.98
    for name, least, parts in (("size", 8, 3), ("texture", 1, 8), ("x", 1, 8), ("y", 1, 8)):  # of 64: no part of an identity is left out
        first = getattr(reading, name)[:, 0] * parts // IDENTITY[name]
        assert all((first == value).sum() >= least for value in range(parts)), name


@pytest.mark.parametrize("attribute", [None, "motion", "color"])
def test_continues_a_past_through_a_switch(attribute):
    captions, identities, past, generator = scene(8, 6)
    after = [c if attribute is None else c.with_one_change(attribute, ATTRIBUTES[attribute][i % 5]) for i, c in enumerate(captions)]
    whole = latents([[a] * 6 + [b] * 3 for a, b in zip(captions, after, strict=True)], identities, 9)
    blurred = past + 0.05 * torch.randn(past.shape, generator=generator)
    told = {} if attribute is None else {"past_text": text_of(captions)}
    made = sample(ExactTeacher(), text_of(after), (8, 3, 8, 4, 4), generator, clean_past=blurred, **told)
    torch.testing.assert_close(made, whole[:, 6:], atol=1e-4, rtol=0)


def test_distance_to_the_manifold():
    captions, _, x0, generator = scene(8, 6)
    assert manifold_distance(x0, captions).max() < 1e-6
    noisy = x0 + 0.3 * torch.randn(x0.shape, generator=generator)
    torch.testing.assert_close(nearest_clip(noisy, captions), x0)
    assert (manifold_distance(noisy, captions) - 0.3).abs().max() < 0.02
    others = [c.with_one_change("motion", "up" if c.motion != "up" else "down") for c in captions]
    assert manifold_distance(x0, others).min() > 0.2
    assert manifold_distance(x0, [None] * 8).max() < 1e-6  # a video of this world, whatever its caption


def test_dmd_is_0_where_the_critic_is_exact():
    captions, _, clip, generator = scene(1, 3)
    dmd = DMD(ExactTeacher(), Enumerated(), guidance_scale=1.0)
    noise, t = torch.randn(clip.shape, generator=generator), torch.full((1, 3), 900.0)
    loss = dmd.generator_loss(clip, text_of(captions), negative(1), t=t, noise=noise)
    assert loss.gradient.abs().max() < 1e-4
    wrong = dmd.generator_loss(clip, text_of(held_out(2)[1:]), negative(1), t=t, noise=noise)
    assert wrong.gradient.abs().max() < 1e-4  # equal scores of a wrong clip are still equal
    guided = DMD(ExactTeacher(), Enumerated(), guidance_scale=4.0).generator_loss(clip, text_of(captions), negative(1), t=t, noise=noise)
    assert guided.gradient.abs().mean() > 0.1  # guidance is felt


def test_dmd_leads_a_clip_to_the_manifold():
    """A generator that always makes the same clip, noisy and of a wrong colour, at the levels at which its identity can be seen."""
    captions, identities, x0, generator = scene(4, 6)
    painted = [c.with_one_change("color", "cyan" if c.color != "cyan" else "red") for c in captions]
    clip = (x0 + 0.5 * torch.randn(x0.shape, generator=generator)).requires_grad_()
    before = manifold_distance(clip, painted)
    for step in range(40):
        dmd = DMD(ExactTeacher(), Point(clip.detach().clone()), guidance_scale=1.0, max_t=700.0)
        noise, t = torch.randn(clip.shape, generator=generator), dmd.draw_timesteps(clip, generator)
        loss = dmd.generator_loss(clip, text_of(painted), negative(4), t=t, noise=noise).loss
        (gradient,) = torch.autograd.grad(loss, clip)
        with torch.no_grad():
            clip -= 0.1 * (1 - step / 40) * clip.numel() * gradient
        if step == 0:  # without a teacher's sign being right, it would not come nearer at once
            assert (manifold_distance(clip, painted) < 0.95 * before).all()
    assert (manifold_distance(clip, painted) < 0.1).all()
    found, wanted = read(nearest_clip(clip.detach(), painted)), read(latents(painted, identities, 6))
    for name in ("shape", "color", "background", "size", "x", "y"):
        assert getattr(found, name).equal(getattr(wanted, name)), name
    assert ((found.light - wanted.light + 180) % 360 - 180).abs().mean() < 45  # neighbours blend at these levels; 90 is chance


def test_what_it_cannot_know_is_refused():
    captions, _, x0, _ = scene(2, 3)
    teacher = ExactTeacher()
    with pytest.raises(ValueError, match="cannot read a cache's view"):
        teacher(x0, 500.0, captions, object())
    with pytest.raises(ValueError, match="t must be above 0"):
        teacher(x0, 0.0, captions)
    with pytest.raises(ValueError, match="are not captions"):
        teacher(x0, 500.0, torch.ones(2, 8, 64))
    with pytest.raises(ValueError, match="for 1 prompts"):
        teacher(x0, 500.0, captions[:1])
    with pytest.raises(ValueError, match="give both or neither"):
        teacher(x0, 500.0, captions, past_text=captions)
    with pytest.raises(ValueError, match="between two captions"):
        teacher(x0, 500.0, negative(2), clean_past=x0, past_text=captions)
    with pytest.raises(ValueError, match="past_sigma must be above 0"):
        ExactTeacher(past_sigma=0.0)
