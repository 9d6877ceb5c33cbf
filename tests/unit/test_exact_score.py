"""The exact score of the miniature's world: against enumeration, against encoded videos, and in the loss."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive.checkpoints.store import load_vae
from longlive.generation.pipeline import BUNDLED
from longlive.miniature.captions import canonical
from longlive.miniature.world import Captioned, Identity, render
from longlive.models.vae import encode_video
from longlive.training.dmd import DMD
from longlive.training.miniature.exact_score import ExactScore, check_world, posterior_mean
from longlive.training.miniature.latent_videos import to_float

RING = Captioned("ring", "red", "gray", "right")
CROSS_UP = Captioned("cross", "red", "gray", "up")
FRAMES = 9


def gaussian(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def score():
    return ExactScore(load_vae(BUNDLED["miniature"]), num_frames=FRAMES, switch_at=3)


@pytest.mark.parametrize("sigma", [0.95, 0.6, 0.1])
def test_the_posterior_mean_is_that_of_all_moved_templates(sigma):
    templates, noisy = 0.3 * gaussian(3, 2, 2, 4, 5, seed=0), gaussian(2, 2, 4, 5, seed=1)
    candidates = torch.stack([one.roll((y, x), (-2, -1)) for one in templates for y in range(4) for x in range(5)]).double()
    distances = (noisy.double() - (1 - sigma) * candidates).square().sum(dim=(1, 2, 3, 4))
    weights = (-distances / (2 * sigma**2)).softmax(0)
    expected = torch.einsum("n,nfchw->fchw", weights, candidates)
    torch.testing.assert_close(posterior_mean(noisy, torch.tensor(sigma), templates).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("after", [RING, CROSS_UP], ids=["constant", "switched"])
def test_clean_videos_of_the_world_are_found_anywhere_on_the_torus(score, after):
    """Any size, position and light, also one between the encoded lights; a switch of shape and direction at latent frame 3."""
    images = [[RING if n < 9 else after for n in range(4 * FRAMES - 3)]]
    clean = encode_video(score.vae, to_float(render(images, [Identity(12.0, 24, 40, 3)], 4 * FRAMES - 3)))
    noisy = 0.5 * clean + 0.5 * gaussian(*clean.shape, seed=2)
    found = score.x0(noisy, torch.full((1, FRAMES), 500.0), [(RING, after)])
    assert (found - clean).square().mean().sqrt() < 0.05 * clean.std()
    other = score.x0(noisy, torch.full((1, FRAMES), 500.0), [(CROSS_UP, CROSS_UP)])
    assert (other - clean).square().mean().sqrt() > 0.2 * clean.std()


def test_a_clip_is_judged_by_the_prompts_before_and_after_its_switch(score):
    clip = SimpleNamespace(earlier=(canonical(RING),), prompts=(canonical(CROSS_UP),))
    noisy, t = gaussian(1, FRAMES, *score.templates((RING, RING)).shape[2:], seed=3), torch.full((1, FRAMES), 300.0)
    assert torch.equal(score.of(clip)(noisy, t), score.x0(noisy, t, [(RING, CROSS_UP)]))


def test_an_autoencoder_whose_latents_do_not_move_with_the_video_is_refused():
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    with pytest.raises(ValueError, match="pads circularly"):
        ExactScore(vae, num_frames=FRAMES, switch_at=3)


def test_the_loss_takes_the_exact_score_in_place_of_the_teacher():
    clip, noise, fake, real = (gaussian(1, 3, 4, 2, 2, seed=seed) for seed in range(4))
    t, text = torch.full((1, 3), 500.0), gaussian(1, 5, 8, seed=5)
    asked = []

    def exact(noisy, at):
        asked.append((noisy, at))
        return real

    def teacher(*_):
        raise AssertionError("the teacher was asked")

    found = DMD(teacher, lambda *_: SimpleNamespace(x0=fake)).generator_loss(clip, text, text, t=t, noise=noise, exact=exact)
    torch.testing.assert_close(found.gradient, (fake - real) / (clip - real).abs().mean(), atol=1e-6, rtol=1e-6)
    assert torch.equal(asked[0][0], found.noisy) and torch.equal(asked[0][1], t)


def test_prompts_and_sizes_of_another_world_are_refused_before_anything_is_loaded():
    check_world([canonical(RING)], height=64, width=64)
    with pytest.raises(ValueError, match="64x64 pixels, not 480x832"):
        check_world([canonical(RING)], height=480, width=832)
    with pytest.raises(ValueError, match="'a red corgi' names no shape, no background, no motion"):
        check_world([canonical(RING), "a red corgi"], height=64, width=64)
