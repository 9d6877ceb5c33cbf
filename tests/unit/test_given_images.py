"""A video that begins with a picture, or continues another video."""

import numpy as np
import pytest
import torch
from PIL import Image

from longlive import LongLivePipeline, PromptSchedule, Transition
from longlive.generation.given import pixels
from longlive.models.vae import encode_video

RED = "a red circle moving right on a black background"
BLUE = "a blue square moving up on a white background"


@pytest.fixture(scope="module")
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


@pytest.fixture(scope="module")
def picture():
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def encoded(pipe, images):
    return encode_video(pipe.vae, pixels(images, 32, 32))


def made(pipe, **settings):
    return pipe(RED, **{"generator": generator(), "output_type": "pt"} | settings).frames


def test_the_first_image_is_the_picture_as_the_vae_knows_it(pipe, picture):
    """The first latent frame is the picture's, the others follow it; without it they would be others."""
    start = encoded(pipe, picture)
    latents = made(pipe, image=picture, num_latent_frames=10, output_type="latent")
    assert latents.shape[1] == 10 and torch.equal(latents[:, :1], start)
    other = made(pipe, image=Image.new("RGB", (32, 32), "white"), num_latent_frames=10, output_type="latent")
    assert not torch.equal(latents[:, 1:4], other[:, 1:4])
    images = made(pipe, image=picture, num_latent_frames=10)
    assert images.shape[1] == 37
    torch.testing.assert_close(images[:, 0], (pipe.decoder().decode(start)[:, :, 0] / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)
    both = made(
        pipe, image=picture, num_latent_frames=10, output_type="latent", num_videos_per_prompt=2, generator=[generator(0), generator(1)]
    )
    torch.testing.assert_close(both[:1], latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("length", "images"), [({"num_frames": 13}, 13), ({"num_frames": 14}, 14), ({"seconds": 1}, 25), ({"num_latent_frames": 4}, 13)]
)
def test_lengths_with_a_picture(pipe, picture, length, images):
    assert made(pipe, image=picture, **length).shape[1] == images
    session = pipe.session(RED, image=picture, seed=0, **length)
    assert sum(block.images.shape[1] for block in session) == images


def test_a_video_is_continued(pipe):
    """Only what comes after it is returned, as many images as were asked for; its newest latent frames are what is remembered."""
    before = made(pipe, num_latent_frames=6)[0]  # 21 images
    start = encoded(pipe, before)
    latents = made(pipe, video=before, num_latent_frames=6, output_type="latent")
    assert latents.shape[1] == 6
    images = made(pipe, video=before, num_latent_frames=6)
    whole = pipe._decode(torch.cat([start, latents], 1))
    assert images.shape[1] == 24
    torch.testing.assert_close(images, (whole[:, :, 21:] / 2 + 0.5).clamp(0, 1).movedim(2, 1), atol=1e-5, rtol=0)
    assert made(pipe, video=before, num_frames=20).shape[1] == 20 and made(pipe, video=before, seconds=1).shape[1] == 24
    long = torch.cat([before.flip(0), before, before])  # longer than the window
    assert torch.equal(made(pipe, video=long, num_frames=12), made(pipe, video=long[-33:], num_frames=12))
    session = pipe.session(RED, video=before, generator=generator(), num_latent_frames=6)
    blocks = torch.cat([block.images for block in session], 1)
    assert blocks.shape[1] == 24 and (images.movedim(2, -1) * 255 - blocks).abs().max() <= 0.51


@pytest.mark.parametrize("recache", ["joint", "causal", "none", "clear"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_switches_restarts_and_timelines(pipe, picture, kind, recache):
    """What is given takes part in a recache as any frame does; again from a timeline, and after a restart, to the bit."""
    given = {kind: picture if kind == "image" else [picture] * 9}
    length = {"num_frames": 49}
    session = pipe.session(RED, seed=1, **given, **length)
    blocks = [next(session), next(session)]
    session.prompt(BLUE, transition=Transition(recache=recache))
    blocks += list(session)
    timeline = session.timeline
    assert timeline.settings[kind] and sum(block.switched for block in blocks) >= 1 and len(timeline.cues) == 2
    again = pipe.session(timeline.schedule, seed=1, **given, **length)
    assert torch.equal(torch.cat([block.images for block in again], 1), torch.cat([block.images for block in blocks], 1))
    assert again.timeline.settings == timeline.settings
    session = pipe.session(RED, seed=1, **given, **length)
    first = [next(session) for _ in range(3)]
    session.restart()
    second = [next(session) for _ in range(3)]
    assert all(torch.equal(one.images, two.images) for one, two in zip(first, second))


def test_pictures_of_any_kind_and_size():
    """Scaled to cover, cut at the middle; the same from every type."""
    wide = np.zeros((32, 64, 3), dtype=np.uint8)
    wide[:, 16:48] = 255
    expected = torch.ones(1, 3, 1, 32, 32)
    tensor = torch.from_numpy(wide).movedim(-1, 0)
    for one in (wide, wide / 255, Image.fromarray(wide), [Image.fromarray(wide)], tensor, tensor[None], tensor / 255):
        assert torch.equal(pixels(one, 32, 32), expected)
    assert pixels(Image.fromarray(wide).convert("RGBA"), 16, 48).shape == (1, 3, 1, 16, 48)
    assert pixels(np.stack([wide] * 5), 64, 64).shape == (1, 3, 5, 64, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image": "a.png"}, "no RGB images: str"),
        ({"image": np.zeros((32, 32))}, r"no RGB images: "),
        ({"image": np.full((32, 32, 3), 200.0)}, "floating point in .0, 1."),
        ({"image": np.zeros((2, 32, 32, 3), np.uint8)}, "image is one picture, not 2; several are continued with video"),
        ({"image": np.zeros((32, 32, 3), np.uint8), "video": np.zeros((1, 32, 32, 3), np.uint8)}, "both image and video are given"),
        (
            {"image": np.zeros((32, 32, 3), np.uint8), "num_latent_frames": 9},
            "after the 1 that are given; choose a multiple, 10",
        ),
    ],
)
def test_what_is_refused(pipe, settings, words):
    with pytest.raises(ValueError, match=words):
        pipe(RED, **settings)
    with pytest.raises(ValueError, match=words):
        pipe.session(PromptSchedule.single(RED), **settings)
