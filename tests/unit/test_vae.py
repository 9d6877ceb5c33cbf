"""Block by block equals the whole, for the released autoencoder's kind and the miniature's, batches included."""

import diffusers.utils.logging
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from longlive.checkpoints import store
from longlive.models.vae import (
    StreamDecoder,
    StreamEncoder,
    _normalize,
    _wrap,
    decode_video,
    encode_video,
    set_spatial_padding,
    spatial_padding,
)

WAN21 = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
RESIDUAL = {
    "base_dim": 16, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 0, "temperal_downsample": [True, True],
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
}  # fmt: skip


KINDS = {
    "wan2.1": (WAN21, "zeros"),
    "residual": (RESIDUAL, "zeros"),
    "circular": (RESIDUAL, "circular"),
    "wan2.1 circular": (WAN21, "circular"),
}


def make(sizes, padding="zeros"):
    torch.manual_seed(0)
    mean, std = torch.randn(4).tolist(), (torch.rand(4) + 0.5).tolist()
    vae = AutoencoderKLWan(**sizes, latents_mean=mean, latents_std=std).eval().requires_grad_(False)
    if padding != "zeros":  # a stream makes the networks pad as the configuration says, for diffusers' own methods too
        set_spatial_padding(vae, padding)
        StreamDecoder(vae)
        StreamEncoder(vae)
    return vae


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def vae(request):
    return make(*request.param)


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 7, 4, 4, 6, generator=torch.Generator().manual_seed(1))


def reference(vae, latents):
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    return vae.decode(latents.transpose(1, 2) * std + mean).sample


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 3, 1], [1, 6], [2, 4, 1]], ids=str)
def test_streamed_equals_whole(vae, latents, sizes):
    decoder = StreamDecoder(vae)
    images = torch.cat([decoder.decode(part) for part in latents.split(sizes, dim=1)], dim=2)
    assert images.shape == (2, 3, 25, 32, 48)
    torch.testing.assert_close(images, reference(vae, latents), atol=1e-5, rtol=0)


def test_a_batch_equals_its_videos_one_by_one(vae, latents):
    alone = torch.cat([decode_video(vae, one[None]) for one in latents])
    torch.testing.assert_close(decode_video(vae, latents), alone, atol=1e-5, rtol=0)


def test_convolutions_of_the_library_that_is_asked_for_are_the_same(vae, latents, monkeypatch):
    """With a gradient, and where there is no oneDNN, torch chooses itself."""
    with torch.no_grad():
        fast = decode_video(vae, latents[:1])
        images = torch.rand(1, 3, 9, *fast.shape[-2:]) * 2 - 1
        encoded = encode_video(vae, images)
        calls = []
        monkeypatch.setattr(torch, "mkldnn_convolution", lambda *given, real=torch.mkldnn_convolution: (calls.append(1), real(*given))[1])
        decode_video(vae, latents[:1])
        assert bool(calls) == torch.backends.mkldnn.is_available()
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        torch.testing.assert_close(decode_video(vae, latents[:1]), fast, atol=1e-5, rtol=0)
        torch.testing.assert_close(encode_video(vae, images), encoded, atol=1e-5, rtol=0)
    calls.clear()
    monkeypatch.undo()
    torch.testing.assert_close(decode_video(vae, latents[:1].clone().requires_grad_()).detach(), fast, atol=1e-5, rtol=0)


def test_convolutions_get_images_in_the_format_that_is_fast_and_pad_them_inside(vae, latents, monkeypatch):
    """Channels last all the way, also behind the layers of diffusers that would change it; copies for padding only on a torus."""
    given, real = [], torch.mkldnn_convolution

    def convolution(x, weight, bias, padding, *rest):
        given.append((x.is_contiguous(memory_format=torch.channels_last_3d), tuple(weight.shape[2:]), tuple(padding)))
        return real(x, weight, bias, padding, *rest)

    monkeypatch.setattr(torch, "mkldnn_convolution", convolution)
    with torch.no_grad():
        decode_video(vae, latents[:1])
    assert given and all(fast for fast, *_ in given)
    circular = spatial_padding(vae) == "circular"
    assert {padding for _, kernel, padding in given if kernel == (3, 3, 3)} == {(0, 0, 0) if circular else (0, 1, 1)}


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 3, 2, 5, 6)], ids=str)
def test_opposite_edges_are_those_of_torch(shape):
    x = torch.randn(shape)
    expected = torch.nn.functional.pad(x, (2, 1, 1, 3) + (0, 0) * (len(shape) == 5), mode="circular")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(_wrap(x, 2, 1, 1, 3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_diffusers(dtype):
    layer = WanRMS_norm(24, images=False).to(dtype)
    layer.gamma.data.normal_()
    x = torch.cat([torch.randn(1, 24, 2, 3, 3), 1e-15 * torch.randn(1, 24, 1, 3, 3), torch.zeros(1, 24, 1, 3, 3)], dim=2).to(dtype)
    torch.testing.assert_close(_normalize(layer, x), layer(x), atol=1e-6 if dtype == torch.float32 else 4e-2, rtol=0)


def test_two_streams_do_not_disturb_each_other(vae, latents):
    one, two, alone = StreamDecoder(vae), StreamDecoder(vae), StreamDecoder(vae)
    for part in latents.split(1, dim=1):
        mixed = one.decode(part)
        two.decode(torch.zeros_like(part))
        assert torch.equal(mixed, alone.decode(part))


def test_encoding_in_pieces_equals_diffusers(vae):
    images = torch.rand(2, 3, 17, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std))
    expected = ((vae.encode(images).latent_dist.mode() - mean) / std).transpose(1, 2)
    for images_per_call in (4, 8, 16):
        torch.testing.assert_close(encode_video(vae, images, images_per_call=images_per_call), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"6 images cannot be encoded here; give 1 \+ 4 n"):
        StreamEncoder(vae).encode(images[:, :, :6])


def test_gradient_reaches_latents_where_images_saturate(vae):
    z = (10 * torch.randn(1, 2, 4, 4, 4)).requires_grad_()
    images = StreamDecoder(vae).decode(z, clamp=False)
    assert images.abs().max() > 0
    images.sum().backward()
    assert z.grad.abs().min() > 0


def test_reset_starts_a_new_video_and_detach_keeps_the_stream(vae, latents):
    decoder = StreamDecoder(vae)
    first = decoder.decode(latents[:, :3])
    decoder.detach()
    assert decoder.num_latent_frames == 3
    decoder.reset()
    assert torch.equal(decoder.decode(latents[:, :3]), first)


@pytest.mark.parametrize("sizes", [WAN21, RESIDUAL], ids=["wan2.1", "residual"])
def test_on_a_torus_moved_images_have_moved_latents_and_only_there(sizes, latents):
    """Images moved by whole latent cells, over the border too: the same latents in other places, and back. With zeros not so."""
    images = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    for padding, equal in (("circular", True), ("zeros", False)):
        vae = make(sizes, padding)
        with torch.no_grad():
            ways = (
                (encode_video(vae, images.roll((16, 40), (-2, -1))), encode_video(vae, images).roll((2, 5), (-2, -1))),
                (decode_video(vae, latents.roll((1, 2), (-2, -1))), decode_video(vae, latents).roll((8, 16), (-2, -1))),
            )
        for moved, expected in ways:
            difference = (moved - expected).abs().max().item()
            assert (difference < 1e-5) is equal, (padding, difference)


def test_padding_is_saved_and_loaded_with_the_weights(latents, tmp_path, caplog):
    """Through the store without a word, and through diffusers, which warns that it does not know the setting."""
    diffusers.utils.logging.set_verbosity_warning()  # programs that ran before in this process have silenced it
    vae = make(RESIDUAL, "circular")
    vae.save_pretrained(tmp_path / "vae")
    expected = decode_video(vae, latents)
    for load in (store.load_vae, AutoencoderKLWan.from_pretrained):
        caplog.clear()
        loaded = load(tmp_path / "vae").requires_grad_(False)
        assert ("spatial_padding" in caplog.text) is (load != store.load_vae)
        assert spatial_padding(loaded) == "circular" and torch.equal(decode_video(loaded, latents), expected)
        loaded.save_pretrained(tmp_path / "again" / "vae")
        assert spatial_padding(store.load_vae(tmp_path / "again")) == "circular"


def test_a_padding_that_does_not_apply_is_refused():
    with pytest.raises(ValueError, match="spatial_padding 'mirror' is unknown; choose from zeros, circular"):
        set_spatial_padding(make(WAN21), "mirror")
    vae = make(WAN21)
    vae.register_to_config(spatial_padding="mirror")  # as a file may say
    with pytest.raises(ValueError, match="'mirror' is unknown"):
        StreamDecoder(vae)
    with pytest.raises(ValueError, match="pads circularly, as its weights were trained"):
        set_spatial_padding(make(WAN21, "circular"), "zeros")
    vae = make(WAN21)
    vae.decoder.conv_in.padding_mode = "reflect"
    with pytest.raises(ValueError, match=r"decoder.conv_in pads with 'reflect'"):
        set_spatial_padding(vae, "circular")
