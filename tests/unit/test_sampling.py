"""A sampled video depends on its seed alone, not on the cache's kind; it follows its cues."""

import pytest
import torch

from longlive.cache.window import Window
from longlive.generation.caches import history_cache, ring_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.sampling import sample
from longlive.generation.transition import Transition

WINDOW = Window(3, 6)
TEXTS = {name: torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(("before", "after"))}


def make(model, *, history=False, seed=0, frames=18, cues=None, **settings):
    cache = (history_cache if history else ring_cache)(model, 4, 4, window=WINDOW, batch=2)
    schedule = PromptSchedule.at_latent_frames(["before", "after"], [12]) if cues is None else cues
    blocks = sample(
        Denoiser(model), schedule, lambda prompt: model.project_text(TEXTS[prompt]), cache=cache, latent_size=(4, 4),
        timesteps=[1000.0, 600.0], generator=torch.Generator().manual_seed(seed), num_latent_frames=frames, block=3, batch=2, **settings,
    )  # fmt: skip
    return torch.cat([block.latents for block in blocks], dim=1)


def test_the_seed_decides_and_the_cache_does_not(model):
    video = make(model)
    assert video.shape == (2, 18, 4, 4, 4) and not video.requires_grad
    assert torch.equal(make(model), video) and not torch.equal(make(model, seed=1), video)
    torch.testing.assert_close(make(model, history=True), video, atol=2e-5, rtol=0)


def test_cues_and_settings_take_effect(model):
    video, plain = make(model), make(model, cues=PromptSchedule.single("before"))
    assert torch.equal(plain[:, :12], video[:, :12]) and not torch.equal(plain[:, 12:15], video[:, 12:15])
    for transition in (Transition(keep_sink=False), Transition(recache="clear")):
        other = make(model, transition=transition)
        assert torch.equal(other[:, :12], video[:, :12]) and not torch.equal(other[:, 12:], video[:, 12:]), transition
    assert not torch.equal(make(model, fresh_noise=False)[:, :3], video[:, :3])
    assert not torch.equal(make(model, context_t=200.0)[:, 3:], video[:, 3:])
    with pytest.raises(ValueError, match="choose a multiple"):
        make(model, frames=10)
