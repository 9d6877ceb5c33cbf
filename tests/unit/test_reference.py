"""The plain way computes the numbers of the engine."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from longlive.cache.window import Window
from longlive.generation.caches import ring_cache
from longlive.generation.cues import Cue, PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.sampling import sample
from longlive.generation.transition import Transition
from longlive.models.lora import merge_lora

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from reference import ReferenceTransformer, adapt, random_lora, reference_cache

WINDOW = Window(3, 6)


def reference_of(network):
    other = ReferenceTransformer.from_config(network.config)
    other.load_state_dict(network.state_dict())
    return other.eval()


def video(network, cache, *, keep_sink=True, recache="joint", switches=(18, 27), blocks=12):
    """With a prompt switch while the window is being filled, too, if `switches` says so."""
    texts = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    cues = [Cue(0, "a"), *(Cue(at, word, Transition(keep_sink, recache)) for at, word in zip(switches, "bc"))]
    made = sample(
        Denoiser(network),
        PromptSchedule(tuple(cues)),
        lambda prompt: network.project_text(texts["abc".index(prompt)]),
        cache=cache,
        latent_size=(4, 6),
        timesteps=[1000.0, 937.5, 625.0],
        generator=torch.Generator().manual_seed(0),
        batch=2,
        block=3,
        num_latent_frames=3 * blocks,
    )
    return torch.cat([block.latents for block in made], dim=1)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize(
    ("keep_sink", "recache", "switches"),
    [
        (True, "joint", (18, 27)),
        (False, "joint", (18, 27)),
        (True, "joint", (6, 21)),
        (False, "causal", (18, 27)),
        (True, "clear", (18, 27)),
    ],
    ids=["sink kept", "sink read again", "early switch", "causal", "clear"],
)
def test_same_video(model, keep_sink, recache, switches, relative):
    expected = video(
        model, ring_cache(model, 4, 6, window=WINDOW, batch=2, relative=relative), keep_sink=keep_sink, recache=recache, switches=switches
    )
    network = reference_of(model)
    found = video(network, reference_cache(network, 4, 6, WINDOW, relative), keep_sink=keep_sink, recache=recache, switches=switches)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    other = video(network, reference_cache(network, 4, 6, Window(2, 7), relative), keep_sink=keep_sink, recache=recache, switches=switches)
    assert (other - expected).abs().max() > 1e-3  # so much does what is seen change


def test_adapters_beside_the_layers_equal_merged_ones(model):
    torch.manual_seed(0)
    state = random_lora(model, rank=3, std=0.2)
    network = reference_of(model)
    adapt(network, state, alpha=6.0)
    found = video(network, reference_cache(network, 4, 6, WINDOW))
    plain = video(model, ring_cache(model, 4, 6, window=WINDOW, batch=2))
    merged = merge_lora(deepcopy(model), state, alpha=6.0)
    torch.testing.assert_close(found, video(merged, ring_cache(merged, 4, 6, window=WINDOW, batch=2)), atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 1e-3


def test_nothing_is_kept_that_can_be_computed_again(model):
    """Text layers run in every pass; the cached keys are no views of the ones before."""
    network, calls = reference_of(model), []
    network.text_embedding.register_forward_hook(lambda *_: calls.append(1))
    cache = reference_cache(network, 4, 6, WINDOW)
    video(network, cache, switches=(), blocks=5)
    assert len(calls) == 5 * 3 + 4  # the last block needs no clean pass
    assert cache.layers[0][0].shape[1] == WINDOW.visible * 6
