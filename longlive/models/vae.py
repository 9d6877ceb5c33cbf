"""The Wan autoencoder, block by block: diffusers' `AutoencoderKLWan` with its convolution caches carried by the caller.

The network is causal in time, so a video decoded a few latent frames at a time, with the last inputs of every temporal
convolution kept, equals the video decoded at once. diffusers' own `decode` forgets those inputs on every call and clamps
before the caller can take a gradient; the two classes here do neither. Knows nothing of blocks, prompts or files.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanCausalConv3d, WanRMS_norm, WanUpsample, patchify, unpatchify
from einops import rearrange
from torch import Tensor

from longlive.types import Images, Latents

# What a causal convolution needs of the past: nothing yet, "Rep" (diffusers' mark for "one frame seen, nothing kept"), or its last inputs.
ConvCache = list[Tensor | str | None]

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LEAST_NORM = 1e-12  # as torch.nn.functional.normalize

SpatialPadding = Literal["zeros", "circular"]
"""What lies beyond the border of an image: nothing (Wan's), or the opposite edge (a world on a torus)."""


def settings_of(vae: AutoencoderKLWan) -> Any:
    """diffusers' frozen dictionary of settings, which is read by attribute."""
    return vae.config


def decoder_width(vae: AutoencoderKLWan) -> int:
    """Channels of the decoder's last level."""
    config = settings_of(vae)
    return config.base_dim if config.decoder_base_dim is None else config.decoder_base_dim


def latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the latents, `[C, 1, 1, 1]`, on the device and in the dtype of `like`."""
    config = settings_of(vae)
    mean, std = (torch.tensor(values, device=like.device, dtype=like.dtype) for values in (config.latents_mean, config.latents_std))
    return mean[:, None, None, None], std[:, None, None, None]


def _detached(cache: ConvCache) -> ConvCache:
    return [entry.detach() if isinstance(entry, Tensor) else entry for entry in cache]


def set_spatial_padding(vae: AutoencoderKLWan, padding: SpatialPadding) -> None:
    """Write into the VAE's configuration how its convolutions pad images; it is saved and loaded with the VAE, and both streams obey it.

    With "circular", moving images by whole latent cells moves the latents by as many cells and changes nothing else. Weights must be
    trained for it. diffusers' own `encode` and `decode` do not know the setting.

    Raises:
        ValueError: for an unknown padding, a VAE that was made for another one, and a VAE whose convolutions pad in a way of their own.
    """
    before = spatial_padding(vae)
    vae.register_to_config(spatial_padding=padding)
    if spatial_padding(vae) == "zeros" and before != "zeros":
        raise ValueError("this VAE pads circularly, as its weights were trained; load another one for zeros")


def spatial_padding(vae: AutoencoderKLWan) -> SpatialPadding:
    """What the VAE's configuration says; nothing means "zeros". Raises ValueError for a padding that is unknown or does not apply."""
    padding = settings_of(vae).get("spatial_padding", "zeros")
    if padding not in get_args(SpatialPadding):
        raise ValueError(f"the VAE's spatial_padding {padding!r} is unknown; choose from {', '.join(get_args(SpatialPadding))}")
    for name, layer in vae.named_modules() if padding == "circular" else ():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d) and layer.padding_mode not in get_args(SpatialPadding):
            raise ValueError(f"{name} pads with {layer.padding_mode!r}; spatial_padding is for VAEs of Wan's kind, which pad with zeros")
    return padding


def _channels_last(x: Tensor) -> Tensor:
    """`x` in the memory format in which convolutions are fastest; with a gradient, where it brings nothing, as it is."""
    return x if torch.is_grad_enabled() else x.contiguous(memory_format=CHANNELS_LAST[x.ndim])


def _normalize(layer: WanRMS_norm, x: Tensor) -> Tensor:
    """`WanRMS_norm.forward` without `torch.nn.functional.normalize`, whose norm over channels takes 8 times as long as this on a CPU."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = wide.square().sum(1, keepdim=True).clamp_min(LEAST_NORM**2).rsqrt()
    return (wide * inverse).to(x.dtype) * (layer.gamma * layer.scale) + layer.bias


def _wrap(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """`x` with the opposite edges beyond its borders; without a gradient in the memory format of `_channels_last`."""
    if torch.is_grad_enabled():
        return torch.nn.functional.pad(x, (left, right, top, bottom) + (0, 0) * (x.ndim == 5), mode="circular")
    *others, height, width = x.shape
    size = (*others, top + height + bottom, left + width + right)
    wrapped = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=CHANNELS_LAST[x.ndim])
    rows = wrapped[..., top : top + height, :]
    rows[..., left : left + width] = x
    rows[..., :left], rows[..., left + width :] = x[..., width - left :], x[..., :right]
    wrapped[..., :top, :], wrapped[..., top + height :, :] = rows[..., height - top :, :], rows[..., :bottom, :]
    return wrapped


def _convolve(layer: WanCausalConv3d, x: Tensor, past: Tensor | None = None) -> Tensor:
    """`WanCausalConv3d.forward` with zeros around images, or their opposite edges; zeros are added inside the convolution.

    On a CPU by oneDNN, which torch itself does not choose for so few channels and one video: a quarter of the time.
    """
    left, right, top, bottom, before, _ = (int(size) for size in layer._padding)
    if past is not None and before:
        x = torch.cat([past, x], dim=2)
        before -= past.shape[2]
    if before:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, before, 0))
    padding = (0, top, left)
    if layer.padding_mode == "circular":
        x, padding = _wrap(x, left, right, top, bottom), (0, 0, 0)
    x = _channels_last(x)  # which attention was not
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return torch.nn.functional.conv3d(x, layer.weight, layer.bias, layer.stride, padding)  # type: ignore[arg-type]  # numbers, never words
    return torch.mkldnn_convolution(x, layer.weight, layer.bias, padding, layer.stride, layer.dilation, layer.groups)  # type: ignore[arg-type]  # numbers, never words


def _convolve_circularly(layer: torch.nn.Conv2d, images: Tensor) -> Tensor:
    """`Conv2d.forward` with the opposite edges around images."""
    top, left = layer.padding
    return torch.nn.functional.conv2d(_wrap(images, left, left, top, top), layer.weight, layer.bias, layer.stride)  # type: ignore[arg-type]  # numbers, never words


def _upsample(layer: WanUpsample, images: Tensor) -> Tensor:
    """`WanUpsample.forward`, which keeps the memory format of what it is given."""
    return WanUpsample.forward(layer, _channels_last(images))


def _duplicate(layer: DupUp3D, x: Tensor, first_chunk: bool = False) -> Tensor:
    """`DupUp3D.forward`, which keeps the memory format."""
    repeated = x.permute(0, 2, 3, 4, 1).repeat_interleave(layer.repeats, -1)
    pixels = "B T Y X (C t y x) -> B (T t) (Y y) (X x) C"
    copies = rearrange(repeated, pixels, t=layer.factor_t, y=layer.factor_s, x=layer.factor_s).movedim(-1, 1)
    return copies[:, :, layer.factor_t - 1 :] if first_chunk else copies


def _prepare(network: torch.nn.Module, padding: SpatialPadding) -> None:
    """From now on `network` pads images as asked, and its layers compute the same in less time; a second call changes nothing."""
    ways = {WanRMS_norm: _normalize, WanUpsample: _upsample, DupUp3D: _duplicate, WanCausalConv3d: _convolve}
    for layer in list(network.modules()):
        if type(layer) in ways:
            layer.forward = partial(ways[type(layer)], layer)  # type: ignore[method-assign]
        if isinstance(layer, WanCausalConv3d) and padding == "circular" and any(layer._padding[:4]):
            layer.padding_mode = padding
        elif isinstance(layer, torch.nn.Conv2d) and padding == "circular" and layer.padding != (0, 0):
            layer.padding_mode = padding
            layer.forward = partial(_convolve_circularly, layer)  # type: ignore[method-assign]
        for name, child in layer.named_children():
            if isinstance(child, torch.nn.ZeroPad2d) and padding == "circular":
                setattr(layer, name, torch.nn.CircularPad2d(child.padding))


class _Stream:
    """A position in a video and what its convolutions remember of the frames before."""

    def __init__(self, vae: AutoencoderKLWan, network: torch.nn.Module) -> None:
        self.vae = vae
        self._network = network
        _prepare(network, spatial_padding(vae))
        self._num_convolutions = sum(isinstance(module, WanCausalConv3d) for module in network.modules())
        self.reset()

    def reset(self) -> None:
        """Start a new video."""
        self.cache: ConvCache = [None] * self._num_convolutions
        self.num_latent_frames = 0  # latent frames passed so far

    def detach(self) -> None:
        """Cut the gradient to the frames before: truncated back-propagation through time."""
        self.cache = _detached(self.cache)

    def _run(self, x: Tensor, **kwargs: bool) -> Tensor:
        return self._network(_channels_last(x), feat_cache=self.cache, feat_idx=[0], **kwargs)


class StreamDecoder(_Stream):
    """Decodes latents a few frames at a time: the first frame of a video gives 1 image, every other one 4.

    >>> decoder = StreamDecoder(vae)
    >>> images = torch.cat([decoder.decode(block) for block in latents.split(3, dim=1)], dim=2)  # = decoded at once
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, vae.decoder)

    def decode(self, latents: Latents, *, clamp: bool = True) -> Images:
        """The next images `[B, 3, T, H, W]` in [-1, 1] of latents `[B, F, C, h, w]` (normalised, as the DiT makes them).

        `clamp=False` leaves values outside [-1, 1] as they are, so that a loss has a gradient there.
        """
        dtype = self.vae.post_quant_conv.weight.dtype
        z = latents.transpose(1, 2).to(dtype)
        mean, std = latent_statistics(self.vae, z)
        z = self.vae.post_quant_conv(z * std + mean)
        parts = []
        if self.num_latent_frames == 0:
            parts.append(self._run(z[:, :, :1], first_chunk=True))
            z = z[:, :, 1:]
        if z.shape[2] > 0:
            parts.append(self._run(z))
        self.num_latent_frames += latents.shape[1]
        images = torch.cat(parts, dim=2)
        if settings_of(self.vae).patch_size is not None:
            images = unpatchify(images, patch_size=settings_of(self.vae).patch_size)
        return images.clamp(-1, 1) if clamp else images


class StreamEncoder(_Stream):
    """Encodes a video a few images at a time: 1 image first, multiples of 4 after that."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, vae.encoder)

    def encode(self, images: Images) -> Latents:
        """The next latents `[B, F, C, h, w]` of images `[B, 3, T, H, W]` in [-1, 1]: mean of the posterior, normalised.

        Raises:
            ValueError: when T is not 1 + 4 n at the start of a video, or 4 n after it.
        """
        mean, _ = self.posterior(images).chunk(2, dim=1)
        offset, scale = latent_statistics(self.vae, mean)
        return ((mean - offset) / scale).transpose(1, 2)

    def posterior(self, images: Images) -> Tensor:
        """Mean and log-variance `[B, 2 C, F, h, w]` before normalisation."""
        first = 1 if self.num_latent_frames == 0 else 0
        if images.shape[2] < first or (images.shape[2] - first) % 4:
            raise ValueError(f"{images.shape[2]} images cannot be encoded here; give {'1 + 4 n' if first else '4 n'} of them")
        x = images.to(self.vae.quant_conv.weight.dtype)
        if settings_of(self.vae).patch_size is not None:
            x = patchify(x, patch_size=settings_of(self.vae).patch_size)
        parts = [self._run(x[:, :, :1])] if first else []
        if x.shape[2] > first:
            parts.append(self._run(x[:, :, first:]))
        encoded = self.vae.quant_conv(torch.cat(parts, dim=2))
        self.num_latent_frames += encoded.shape[2]
        return encoded


def encode_video(vae: AutoencoderKLWan, images: Images, *, images_per_call: int = 16) -> Latents:
    """All latents of a whole video `[B, 3, T, H, W]`, T = 1 + 4 n, with memory that does not grow with T."""
    encoder = StreamEncoder(vae)
    first, rest = images[:, :, :1], images[:, :, 1:]
    pieces = [encoder.encode(first), *(encoder.encode(part) for part in rest.split(images_per_call, dim=2) if part.shape[2])]
    return torch.cat(pieces, dim=1)


def decode_video(vae: AutoencoderKLWan, latents: Latents, *, frames_per_call: int = 3) -> Images:
    """All images of a whole video's latents `[B, F, C, h, w]`, with memory that grows only by the images."""
    decoder = StreamDecoder(vae)
    return torch.cat([decoder.decode(part) for part in latents.split(frames_per_call, dim=1)], dim=2)
