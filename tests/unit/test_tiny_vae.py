"""The tiny decoder: TAEHV's layout for Wan 2.1 as published, streaming, and its way into a pipeline."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from longlive.config import InferenceConfig
from longlive.generation.decoders import load_tiny_vae
from longlive.generation.pipeline import LongLivePipeline
from longlive.models.tiny_vae import TinyDecoder, TinyVAE
from longlive.programs.loading import load_pipeline
from longlive.types import Decoder

SMALL = {"latent_channels": 4, "widths": (8, 6), "growth": (2, 2), "num_blocks": 2, "patch_size": 2}


def taehv_shapes(rows: int) -> dict[str, torch.Size]:
    """Names and shapes of the decoder in `taew2_1.pth`."""
    shapes = {"decoder.1.weight": (256, 16, 3, 3), "decoder.1.bias": (256,), "decoder.22.weight": (3, 64, 3, 3), "decoder.22.bias": (3,)}
    for first, width in ((3, 256), (9, 128), (15, 64)):
        for layer in range(first, first + 3):
            for part, channels in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"decoder.{layer}.conv.{part}.weight"] = (width, channels, 3, 3)
                shapes[f"decoder.{layer}.conv.{part}.bias"] = (width,)
    shapes |= {"decoder.7.conv.weight": (rows, 256, 1, 1), "decoder.13.conv.weight": (256, 128, 1, 1)}
    shapes |= {"decoder.19.conv.weight": (128, 64, 1, 1)}
    shapes |= {"decoder.8.weight": (128, 256, 3, 3), "decoder.14.weight": (64, 128, 3, 3), "decoder.20.weight": (64, 64, 3, 3)}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def taehv_weights(rows: int = 256) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) / max(4, shape[1:].numel()) ** 0.5 for name, shape in taehv_shapes(rows).items()}


def by_the_description(weights: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Images of one video, frame by frame and layer by layer."""

    def conv(x, name):
        weight = weights[f"{name}.weight"]
        return functional.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [3 * torch.tanh(z[None] / 3) for z in latents[0]]
    frames = [functional.relu(conv(x, "decoder.1")) for x in frames]
    for first, times in ((3, 1), (9, 2), (15, 2)):
        for layer in range(first, first + 3):
            past, results = torch.zeros_like(frames[0]), []
            for x in frames:
                y = torch.cat([x, past], dim=1)
                for part in (0, 2, 4):
                    y = conv(y, f"decoder.{layer}.conv.{part}")
                    y = functional.relu(y) if part < 4 else y
                results.append(functional.relu(y + x))
                past = x
            frames = results
        frames = [x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in frames]
        frames = [part for x in frames for part in conv(x, f"decoder.{first + 4}.conv").chunk(times, dim=1)]
        frames = [conv(x, f"decoder.{first + 5}") for x in frames]
    images = torch.stack([conv(functional.relu(x), "decoder.22")[0] for x in frames], dim=1)
    return 2 * images[None, :, 3:].clamp(0, 1) - 1


def at_once(vae: TinyVAE, latents: torch.Tensor) -> torch.Tensor:
    return TinyDecoder(vae).decode(latents)


@torch.no_grad()
def test_the_published_layout_computes_what_its_description_says(tmp_path):
    """From either kind of file; the encoder is ignored, and of a stride of two frames the second is kept."""
    weights = taehv_weights(rows=512)
    torch.save(weights | {"encoder.0.weight": torch.zeros(1)}, tmp_path / "taew2_1.pth")
    latents = torch.randn(1, 5, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    weights["decoder.7.conv.weight"] = weights["decoder.7.conv.weight"][256:].clone()
    save_file(weights, tmp_path / "taew2_1.safetensors")
    expected = by_the_description({name: weight.double() for name, weight in weights.items()}, latents.double())
    assert expected.shape == (1, 3, 17, 16, 24) and expected.std() > 0.1
    for name in ("taew2_1.pth", "taew2_1.safetensors"):
        vae = load_tiny_vae(tmp_path / name, dtype=torch.float64)
        assert sum(weight.numel() for weight in vae.parameters()) == pytest.approx(9.84e6, rel=1e-3)
        torch.testing.assert_close(at_once(vae, latents), expected, atol=1e-9, rtol=0)
    assert load_tiny_vae(tmp_path / "taew2_1.pth", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_another_layout_is_refused_by_name(tmp_path):
    weights = taehv_weights()
    weights["decoder.22.weight"] = torch.zeros(12, 64, 3, 3)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"decoder.22.weight is \[12, 64, 3, 3\] instead of \[3, 64, 3, 3\]"):
        load_tiny_vae(tmp_path / "other.safetensors")
    del weights["decoder.22.weight"], weights["decoder.3.conv.2.bias"]
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"2 missing \(decoder.3.conv.2.bias, decoder.22.weight\)"):
        load_tiny_vae(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="2 widths and 1 factors of growth"):
        TinyVAE(widths=(8, 8), growth=(2,))


@pytest.mark.parametrize("sizes", [{}, SMALL, SMALL | {"spatial_padding": "circular"}], ids=["taehv", "small", "circular"])
@torch.no_grad()
def test_streamed_equals_whole(sizes):
    torch.manual_seed(0)
    vae = TinyVAE(**sizes)
    latents = torch.randn(2, 8, sizes.get("latent_channels", 16), 3, 2)
    expected = at_once(vae, latents)
    assert expected.shape == (2, 3, 29, 24, 16) and expected.min() >= -1 and expected.max() <= 1
    for frames in (1, 3, 4):
        decoder = TinyDecoder(vae)
        for _ in range(2):  # after a reset, a new video
            images = torch.cat([decoder.decode(part) for part in latents.split(frames, dim=1)], dim=2)
            torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
            decoder.reset()
    first, again = TinyDecoder(vae), at_once(vae, latents[:, 3:])
    first.decode(latents[:, :3])
    assert (first.decode(latents[:, 3:])[:, :, -again.shape[2] :] - again).abs().max() > 1e-4  # the past is seen


@torch.no_grad()
def test_on_a_torus_moved_latents_make_moved_images():
    latents = torch.randn(1, 3, 4, 4, 6)
    for padding, equal in (("circular", True), ("zeros", False)):
        vae = TinyVAE(**SMALL, spatial_padding=padding)
        difference = at_once(vae, latents.roll((1, 2), (-2, -1))) - at_once(vae, latents).roll((8, 16), (-2, -1))
        assert (difference.abs().max().item() < 1e-5) is equal


def test_a_gradient_reaches_latents_where_images_saturate():
    vae = TinyVAE(**SMALL)
    latents = torch.randn(1, 2, 4, 2, 2, requires_grad=True)
    TinyDecoder(vae).decode(latents, clamp=False).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_a_pipeline_decodes_with_it(tiny, tmp_path):
    pipe = LongLivePipeline.from_pretrained(tiny)
    with pytest.raises(ValueError, match=r"this model has no tiny decoder .* has none of tiny_vae, taew2_1.safetensors"):
        pipe.accelerate(decoder="tiny")
    torch.manual_seed(0)
    TinyVAE(**SMALL).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="made for other latents: 4 latent channels instead of 8"):
        pipe.accelerate(decoder=tmp_path / "small")
    vae = TinyVAE(**SMALL | {"latent_channels": 8})
    vae.save_pretrained(tmp_path / "tiny_vae")

    def made(output_type: str) -> torch.Tensor:
        return pipe("a", num_latent_frames=6, generator=torch.Generator().manual_seed(0), output_type=output_type).frames

    latents, full, needed = made("latent"), made("pt"), pipe.memory_needed(6)
    pipe.accelerate(decoder=tmp_path / "tiny_vae")
    pipe.accelerate()  # changes nothing
    decoder: Decoder = pipe.decoder()
    assert isinstance(decoder, TinyDecoder) and pipe.memory_needed(6) < needed  # weights more, at work less
    images = made("pt")
    with torch.no_grad():
        expected = (at_once(vae, latents).transpose(1, 2) + 1) / 2
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert (images - full).abs().max() > 0.01
    pipe.to(torch.bfloat16)
    assert pipe.decoder().vae.dtype == torch.bfloat16
    pipe.accelerate(decoder="full")
    assert not isinstance(pipe.decoder(), TinyDecoder)


def test_the_programs_setting(tiny, tmp_path):
    TinyVAE(**SMALL | {"latent_channels": 8}).save_pretrained(tmp_path / "tiny_vae")
    for decoder, kind in ((str(tmp_path / "tiny_vae"), True), ("full", False)):
        pipe = load_pipeline(InferenceConfig(model=str(tiny), decoder=decoder), torch.device("cpu"))
        assert isinstance(pipe.decoder(), TinyDecoder) is kind
    with pytest.raises(FileNotFoundError, match=r"the tiny decoder no-such.pth does not exist; give a file or a folder"):
        load_pipeline(InferenceConfig(model=str(tiny), decoder="no-such.pth"), torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="holds no tiny decoder") as refused:
        load_pipeline(InferenceConfig(model=str(tiny), decoder=str(tmp_path)), torch.device("cpu"))
    assert "download" not in str(refused.value)
