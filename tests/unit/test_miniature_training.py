"""What the miniature's trainings weigh and draw: edges in units of contrast, hard scenes more often, numbers by attribute."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive.checkpoints import store
from longlive.config import TrainConfig
from longlive.miniature import oracle
from longlive.miniature.world import SHAPES, Captioned, Identity, all_captioned, draw_identity, held_out, render
from longlive.models.vae import decode_video, decoder_width, encode_video, set_spatial_padding, settings_of
from longlive.parallel.world import World
from longlive.settings import load
from longlive.training.miniature.autoencoder import EndlessVideos
from longlive.training.miniature.caption_texts import caption_weights
from longlive.training.miniature.latent_videos import LatentVideos, to_float
from longlive.training.miniature.reconstruction import reconstruction_loss, regions
from longlive.training.stages import build

WEIGHTS = {"subject_weight": 4.0, "edge_weight": 6.0, "gradient_weight": 0.5}


def one_image(caption: Captioned, *, x: int = 32, y: int = 32) -> torch.Tensor:
    return to_float(render([caption], [Identity(12.0, x, y, 0)], 1))


def test_regions_are_the_subject_its_edge_and_its_contrast():
    square = one_image(Captioned("square", "yellow", "black", "still"))
    where = regions(square)
    assert 0.9 < where.subject.sum() / (torch.pi * 12**2) < 1.3  # all shapes have the area of a circle; a margin for soft pixels
    assert not where.edge[0, 0, 0, 32, 32] and not where.edge[0, 0, 0, 0, 0]
    column = where.edge[0, 0, 0, 32].nonzero().flatten().tolist()
    assert len(column) == 4 and column[1] - column[0] == column[3] - column[2] == 1  # two pixels at either side
    moved = regions(one_image(Captioned("square", "yellow", "black", "still"), x=0, y=0))
    assert torch.equal(moved.edge, where.edge.roll((-32, -32), (-2, -1)))  # over the border too
    gray = regions(one_image(Captioned("square", "purple", "gray", "still")))
    assert gray.contrast < 0.6 * where.contrast


@pytest.mark.parametrize("change", ["gray", "torus"])
def test_loss_is_the_same_for_the_same_mistake(change):
    """A subject one pixel off counts the same wherever it is, and nearly the same on a background of low contrast."""

    def mistake(caption, place):
        right, wrong = (one_image(caption, x=place + off, y=place) for off in (0, 1))
        return reconstruction_loss(wrong, right, **WEIGHTS)

    red, purple = Captioned("cross", "red", "white", "still"), Captioned("cross", "purple", "gray", "still")
    if change == "torus":
        torch.testing.assert_close(mistake(red, 0), mistake(red, 32), rtol=1e-5, atol=0)
    else:
        assert 0.6 < mistake(purple, 32) / mistake(red, 32) < 1.6
        plain = [(one_image(c, x=33) - one_image(c)).square().mean() for c in (red, purple)]
        assert plain[1] / plain[0] < 0.4  # what the squared error makes of it


def test_an_error_at_the_edge_counts_most():
    image = one_image(Captioned("square", "red", "white", "still"))
    where = regions(image)
    places = {"edge": where.edge, "inside": where.subject & ~where.edge, "outside": ~where.subject & ~where.edge}
    losses = {}
    for name, place in places.items():
        y, x = place[0, 0, 0].nonzero()[len(place[0, 0, 0].nonzero()) // 2].tolist()
        decoded = image.clone()
        decoded[..., y, x] += 0.5
        losses[name] = reconstruction_loss(decoded, image, **WEIGHTS).item()
    assert losses["edge"] > losses["inside"] > losses["outside"] > 0
    assert reconstruction_loss(image, image, **WEIGHTS) == 0


def test_hard_values_are_drawn_more_often():
    captions = all_captioned()
    chosen = caption_weights(captions, ("cross", "ring", "gray"), 3.0)
    for caption, weight in zip(captions, chosen.tolist(), strict=True):
        assert weight == 3.0 ** ((caption.shape in ("cross", "ring")) + (caption.background == "gray"))
    with pytest.raises(ValueError, match=r"oversampled values \['hexagon'\] are not in this world"):
        caption_weights(captions, ("cross", "hexagon"), 3.0)
    videos = EndlessVideos(4000, torch.Generator().manual_seed(0), oversampled=("ring",), oversampling=4.0)
    assert abs(sum(caption.shape == "ring" for caption, _ in videos.scenes) / 4000 - 0.5) < 0.04


def test_the_oracles_shares_are_means_over_the_videos_of_a_value():
    captions = held_out(20)
    generator = torch.Generator().manual_seed(0)
    images = render(captions, [draw_identity(generator) for _ in captions], 3)
    crosses = [number for number, caption in enumerate(captions) if caption.shape == "cross"]
    images[crosses[0]] = images[crosses[0], :1, :, :1, :1]  # its subject is lost
    reading = oracle.read(images)
    shares = reading.shares(captions)
    assert shares["shape/cross"] == pytest.approx(1 - 1 / len(crosses)) and shares["shape"] == pytest.approx(1 - 1 / len(captions))
    assert shares["all"] == shares["shape"] < shares["background"] == 1  # the lost one has neither shape nor color nor motion
    assert shares["iou"] == pytest.approx(reading.iou.mean().item())
    counts = {shape: sum(caption.shape == shape for caption in captions) for shape in SHAPES}
    assert sum(shares[f"iou/{shape}"] * count for shape, count in counts.items() if count) / 20 == pytest.approx(shares["iou"])


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_on_a_circular_autoencoder_videos_are_drawn_at_every_place(padding, tmp_path):
    """Each draw is what the autoencoder makes of the moved video; without circular padding, of the video as it is."""
    torch.manual_seed(0)
    sizes = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 0,
        "temperal_downsample": [True, True],
        "is_residual": True,
    }
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = AutoencoderKLWan(**sizes, **statistics, patch_size=2, in_channels=12, out_channels=12).requires_grad_(False)
    set_spatial_padding(vae, padding)
    caption = Captioned("triangle", "green", "brown", "right")
    videos = LatentVideos(tmp_path / "videos.pt", vae, [caption], num_videos=1, num_latent_frames=2, seed=0)
    latents, captions = videos.draw(800, slice(None), torch.Generator().manual_seed(1))
    assert latents.shape == (800, 2, 4, 8, 8) and not captions.any()
    stored = videos.latents[0].float()
    if padding == "zeros":
        assert torch.equal(latents, stored.expand_as(latents))
        return
    assert len({tuple(one.flatten().tolist()) for one in latents}) == 64
    draw = torch.Generator().manual_seed(0)  # as it is made: a caption, then who shows it
    torch.randint(1, (1,), generator=draw)
    own = draw_identity(draw)
    for x, y in ((0, 0), (24, 8)):
        moved = Identity(own.radius, (own.x + x) % 64, (own.y + y) % 64, own.light)
        expected = encode_video(vae, to_float(render([caption], [moved], 5)))[0]
        assert min((one - expected).abs().max() for one in latents) < 2e-3  # half precision on disk


@pytest.mark.parametrize("width", [None, 24], ids=["its own", "a new one, wider"])
def test_a_decoder_trained_alone_leaves_the_latents_as_they_are(width, tmp_path):
    words = ["stage=autoencoder", "steps=2", "autoencoder.base_dim=16", "autoencoder.batch=2", f"run={tmp_path}"]
    first = build(load(TrainConfig, None, words), World(), torch.device("cpu")).stage
    first.step(0)
    first.export(tmp_path / "first")
    again = [*words, f"autoencoder.initial={tmp_path / 'first'}", "autoencoder.decoder_only=true"]
    again += [] if width is None else [f"autoencoder.decoder_dim={width}"]
    second = build(load(TrainConfig, None, again), World(), torch.device("cpu")).stage
    for number in range(2):
        second.step(number)
    second.export(tmp_path / "second")
    old, new = (store.load_vae(tmp_path / name).requires_grad_(False) for name in ("first", "second"))
    assert decoder_width(old) == 16 and decoder_width(new) == (width or 16)
    images = one_image(Captioned("ring", "red", "gray", "still"))
    latents = encode_video(old, images)
    assert torch.equal(encode_video(new, images), latents) and latents.abs().max() > 0.1
    assert (decode_video(new, latents) - decode_video(old, latents)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"first is 16 wide; a new one needs autoencoder.decoder_only=true"):
        build(
            load(TrainConfig, None, [*again, "autoencoder.decoder_dim=32", "autoencoder.decoder_only=false"]), World(), torch.device("cpu")
        )
    with pytest.raises(ValueError, match="decoder_only needs an encoder that is trained"):
        build(load(TrainConfig, None, [*words, "autoencoder.decoder_only=true"]), World(), torch.device("cpu"))


def test_blocks_are_added_to_an_autoencoder_as_the_identity(tmp_path):
    words = ["stage=autoencoder", "autoencoder.base_dim=16", "autoencoder.batch=2", f"run={tmp_path}"]
    first = build(load(TrainConfig, None, words), World(), torch.device("cpu")).stage
    first.export(tmp_path)
    again = [*words, f"autoencoder.initial={tmp_path}", "autoencoder.num_res_blocks=1", "autoencoder.decoder_only=true"]
    second = build(load(TrainConfig, None, again), World(), torch.device("cpu")).stage
    count = [sum(p.numel() for p in stage.vae.parameters()) for stage in (first, second)]
    assert count[1] > 1.5 * count[0] and settings_of(second.vae).num_res_blocks == 1
    images = one_image(Captioned("ring", "red", "gray", "still")).expand(-1, -1, 5, -1, -1)
    with torch.no_grad():
        old, new = (decode_video(stage.vae, encode_video(stage.vae, images)) for stage in (first, second))
        torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
