"""The stage `tiny_decoder`: it learns, resumes bit for bit, and exports what a pipeline reads."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive.config import TinyDecoderConfig, TrainConfig
from longlive.generation.decoders import load_tiny_vae
from longlive.models.tiny_vae import TinyDecoder
from longlive.models.vae import set_spatial_padding
from longlive.parallel.world import get_world
from longlive.training.miniature.tiny_decoder import TinyDecoderStage, new_tiny_vae
from longlive.training.stages import build

SIZES = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 0, "temperal_downsample": [True, True], "is_residual": True,
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4,
}  # fmt: skip
CONFIG = {"widths": (8, 8), "num_blocks": 1, "batch": 2, "stream_from": 1, "reset": 0.4}


def autoencoder() -> AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLWan(**SIZES).eval().requires_grad_(False)
    set_spatial_padding(vae, "circular")
    return vae


def stage(**settings) -> TinyDecoderStage:
    torch.manual_seed(1)
    return TinyDecoderStage(TinyDecoderConfig(**CONFIG | settings), autoencoder(), steps=40, seed=0)


@pytest.mark.parametrize("target", ["images", "full"])
def test_resumed_equals_uninterrupted(target, tmp_path):
    """In the middle of videos too: memories and caches are part of the state."""
    whole = stage(target=target)
    losses = [whole.step(number)["tiny_decoder/loss"] for number in range(6)]
    first, second = stage(target=target), stage(target=target)
    again = [first.step(number)["tiny_decoder/loss"] for number in range(3)]
    assert any(memory is not None for memory in first.decoder.memory)
    torch.save(first.state(), tmp_path / "state.pt")
    second.load(torch.load(tmp_path / "state.pt", weights_only=False))
    again += [second.step(number)["tiny_decoder/loss"] for number in range(3, 6)]
    assert again == losses
    other = stage(target="images" if target == "full" else "full")
    assert other.step(0)["tiny_decoder/loss"] != losses[0]


def test_it_learns_and_exports_what_is_read(tmp_path):
    trained = stage(reset=1.0)
    losses = [trained.step(number)["tiny_decoder/loss"] for number in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    trained.export(tmp_path)
    read = load_tiny_vae(tmp_path / "tiny_vae")
    assert read.config["spatial_padding"] == "circular"
    latents = torch.randn(1, 4, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(TinyDecoder(read).decode(latents), TinyDecoder(trained.tiny).decode(latents))


def test_validation_judges_both_decoders(tmp_path):
    found = stage().validate(tmp_path, 7)
    assert {"oracle/iou", "oracle/shape", "full/iou", "full/shape", "psnr", "psnr_to_full"} <= found.keys()
    assert (tmp_path / "tiny_decoder_000007.png").is_file()


def test_sizes_that_make_other_images_are_refused():
    with pytest.raises(ValueError, match=r"make \(8, 2\) pixels and images of a latent; this autoencoder has \(8, 4\)"):
        new_tiny_vae(TinyDecoderConfig(**CONFIG | {"growth": (1, 2)}), autoencoder())


def test_the_stage_is_built_from_settings(tmp_path):
    config = TinyDecoderConfig(**CONFIG, autoencoder=str(tmp_path / "export"))
    run, cpu = TrainConfig(stage="tiny_decoder", tiny_decoder=config, steps=1), torch.device("cpu")
    with pytest.raises(ValueError, match=r"run configs/miniature/autoencoder.yaml first, or .* tiny_decoder.autoencoder=…"):
        build(run, get_world(), cpu)
    autoencoder().save_pretrained(tmp_path / "export" / "vae")
    built = build(run, get_world(), cpu).stage
    assert isinstance(built, TinyDecoderStage) and built.tiny.config["widths"] == (8, 8)
    assert not any(weight.requires_grad for weight in built.vae.parameters())
