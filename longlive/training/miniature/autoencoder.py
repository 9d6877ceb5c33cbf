"""Train the miniature's `AutoencoderKLWan` the way it is used: long videos in chunks, convolution caches carried over.

A causal convolutional autoencoder trained on short clips falls apart a few frames past their length, because later
frames see a history that training never showed. So a batch of endless videos runs through encoder and decoder chunk by
chunk; caches are detached between chunks (truncated back-propagation) and reset at random.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longlive.config import AutoencoderConfig
from longlive.miniature import oracle
from longlive.miniature.world import (
    ATTRIBUTES,
    MOTIONS,
    SIZE,
    SPEED,
    Captioned,
    Identity,
    all_captioned,
    draw_identity,
    render,
    validation_set,
)
from longlive.models.vae import (
    StreamDecoder,
    StreamEncoder,
    decode_video,
    encode_video,
    latent_statistics,
    set_spatial_padding,
    settings_of,
    spatial_padding,
)
from longlive.training.miniature.caption_texts import weights
from longlive.training.miniature.latent_videos import save_strips, to_float, to_uint8
from longlive.training.miniature.reconstruction import reconstruction_loss
from longlive.training.optimizer import MatrixOptimizer
from longlive.training.trainer import one_cycle


class EndlessVideos:
    """A batch of scenes that run on; now and then one attribute of a scene changes, as a prompt switch would change it.

    Scenes start wherever a moving subject may come to be, so that the autoencoder knows every place.

    Args:
        hard, hard_weight: values of attributes that scenes begin with that much more often.
        change: chance of a change before the next images.
    """

    def __init__(
        self, batch: int, generator: torch.Generator, *, hard: Collection[str] = (), hard_weight: float = 1.0, change: float = 0.2
    ) -> None:
        self.batch, self.generator, self.change = batch, generator, change
        self.scenes: list[tuple[Captioned, Identity]] = []
        self._everything = all_captioned()
        self._weights = weights(self._everything, hard, hard_weight)
        self.restart()

    def restart(self) -> None:
        """New scenes."""
        picks = torch.multinomial(self._weights, self.batch, replacement=True, generator=self.generator).tolist()
        self.scenes = [(self._everything[i], draw_identity(self.generator, lattice=SPEED)) for i in picks]

    def next(self, num_images: int) -> Tensor:
        """The next images of every scene, uint8 `[B, T, 3, Y, X]`."""
        captions, identities = zip(*self.scenes, strict=True)
        images = render(captions, identities, num_images)
        self.scenes = [self._after(c, i, num_images) for c, i in self.scenes]
        return images

    def _after(self, caption: Captioned, identity: Identity, num_images: int) -> tuple[Captioned, Identity]:
        dx, dy = MOTIONS[caption.motion]
        x, y = (identity.x + SPEED * dx * num_images) % SIZE, (identity.y + SPEED * dy * num_images) % SIZE
        moved = Identity(identity.radius, x, y, identity.light)
        if float(torch.rand((), generator=self.generator)) >= self.change:
            return caption, moved
        names = list(ATTRIBUTES)
        name = names[int(torch.randint(len(names), (), generator=self.generator))]
        values = [value for value in ATTRIBUTES[name] if value != getattr(caption, name)]
        return caption.with_one_change(name, values[int(torch.randint(len(values), (), generator=self.generator))]), moved


def new_vae(settings: AutoencoderConfig) -> AutoencoderKLWan:
    """Random weights of the settings' sizes, made for 2 x 2 pixels of 3 colours as 12 channels."""
    vae = AutoencoderKLWan(
        base_dim=settings.base_dim,
        decoder_base_dim=settings.decoder_dim,
        dim_mult=list(settings.dim_mult),
        num_res_blocks=settings.num_res_blocks,
        z_dim=settings.z_dim,
        temperal_downsample=[True] * (len(settings.dim_mult) - 1),
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=2 ** len(settings.dim_mult),
    )
    assert isinstance(vae, AutoencoderKLWan)
    return vae


def deepened(vae: AutoencoderKLWan, num_res_blocks: int) -> AutoencoderKLWan:
    """The same function with `num_res_blocks` residual blocks per level: those that are added begin as the identity."""
    deeper = _resized(vae, num_res_blocks=num_res_blocks)
    added = deeper.load_state_dict(vae.state_dict(), strict=False).missing_keys
    for name in added:
        if ".conv2." in name:
            torch.nn.init.zeros_(deeper.get_parameter(name))
    return deeper


def with_new_decoder(vae: AutoencoderKLWan, width: int) -> AutoencoderKLWan:
    """The same encoder and latents with a decoder `width` channels wide, from random weights."""
    wider = _resized(vae, decoder_base_dim=width)
    wider.encoder.load_state_dict(vae.encoder.state_dict())
    wider.quant_conv.load_state_dict(vae.quant_conv.state_dict())
    return wider


def _resized(vae: AutoencoderKLWan, **sizes: int) -> AutoencoderKLWan:
    """Random weights of other sizes; latents and padding as before."""
    before = {name: value for name, value in settings_of(vae).items() if name != "spatial_padding"}  # which diffusers does not know
    made = AutoencoderKLWan.from_config(before | sizes)
    assert isinstance(made, AutoencoderKLWan)
    set_spatial_padding(made, spatial_padding(vae))
    return made.train()


class AutoencoderStage:
    """Reconstruction with a light pull of the posterior to a unit Gaussian.

    Args:
        decoder_only: the encoder and the latents' statistics stay as they are.
        latent_noise: latents are decoded with noise of up to this share of each channel's deviation, as a generator makes errors.
        hard, hard_weight: values of attributes with which scenes begin that much more often.
        reset: chance, at every chunk, that new videos begin; until step `stream_from` it falls from 1 to this.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        *,
        batch: int,
        steps: int,
        lr: float,
        seed: int,
        decoder_only: bool,
        kl_weight: float,
        latent_noise: float,
        subject_weight: float,
        edge_weight: float,
        gradient_weight: float,
        hard: Collection[str],
        hard_weight: float,
        reset: float,
        stream_from: int,
        images_per_chunk: int,
    ) -> None:
        self.vae, self.steps, self.lr = vae, steps, lr
        self.kl_weight, self.latent_noise, self.reset = kl_weight, latent_noise, reset
        self.distance = partial(
            reconstruction_loss, subject_weight=subject_weight, edge_weight=edge_weight, gradient_weight=gradient_weight
        )
        self.stream_from, self.images_per_chunk = stream_from, images_per_chunk
        self.decoder_only = decoder_only
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not decoder_only)
        self.optimizer = MatrixOptimizer(vae, lr=lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.videos = EndlessVideos(batch, self.generator, hard=hard, hard_weight=hard_weight)
        self.encoder, self.decoder = StreamEncoder(vae), StreamDecoder(vae)
        self._batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        chance = max(self.reset, 1 - number / self.stream_from)  # short clips first: many scenes a step; then ever longer videos
        if self.encoder.num_latent_frames and float(torch.rand((), generator=self.generator)) < chance:
            self.encoder.reset()
            self.decoder.reset()
            self.videos.restart()
        first = self.encoder.num_latent_frames == 0
        images = to_float(self.videos.next(self.images_per_chunk + (1 if first else 0)))
        self._batch = {"images": images, "images_before": self.encoder.num_latent_frames}
        with torch.set_grad_enabled(not self.decoder_only):
            mean, log_variance = self.encoder.posterior(images).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        variance = log_variance.exp() + self._noise(mean).square()
        z = mean + variance.sqrt() * torch.randn(mean.shape, generator=self.generator)
        offset, scale = latent_statistics(self.vae, z)
        decoded = self.decoder.decode(((z - offset) / scale).transpose(1, 2), clamp=False)
        loss = self.distance(decoded, images)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        self.optimizer.zero_grad()
        (loss + self.kl_weight * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step(one_cycle(number, self.steps))
        self.encoder.detach()
        self.decoder.detach()
        return {"autoencoder/loss": loss.item(), "autoencoder/kl": kl.item(), "autoencoder/grad_norm": norm.item()}

    def _noise(self, latents: Tensor) -> Tensor:
        """Deviation of the noise on each video's latents, `[B, C, 1, 1, 1]`: uniform, up to a share of each channel's own deviation."""
        level = self.latent_noise * torch.rand(len(latents), generator=self.generator)
        return level[:, None, None, None, None] * latents.detach().std((0, 2, 3, 4), keepdim=True)

    @property
    def at_rest(self) -> bool:
        return True

    def batch(self) -> dict[str, Any]:
        return self._batch

    @torch.no_grad()
    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Oracle on reconstructions of 32 scenes of 49 images, and a sheet of originals above reconstructions."""
        generator = torch.Generator().manual_seed(1)
        captions = validation_set(32)
        original = render(captions, [draw_identity(generator) for _ in captions], 49)
        decoded = to_uint8(decode_video(self.vae, encode_video(self.vae, to_float(original))))
        save_strips(torch.stack([original[:8], decoded[:8]], dim=1).flatten(0, 1), folder / f"autoencoder_{number:06d}.png")
        psnr = -10 * torch.log10((original.float() - decoded.float()).square().mean() / 255**2)
        return {f"oracle/{k}": v for k, v in oracle.read(decoded).shares(captions).items()} | {"psnr": psnr.item()}

    def state(self) -> dict[str, Any]:
        return {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "scenes": self.videos.scenes,
            "encoder": (self.encoder.num_latent_frames, self.encoder.cache),
            "decoder": (self.decoder.num_latent_frames, self.decoder.cache),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.videos.scenes = state["scenes"]
        self.encoder.num_latent_frames, self.encoder.cache = state["encoder"]
        self.decoder.num_latent_frames, self.decoder.cache = state["decoder"]

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Save, with the latents' mean and scale per channel, measured over long videos, in the configuration."""
        if not self.decoder_only:
            self._measure_statistics()
        self.vae.save_pretrained(folder / "vae")

    def _measure_statistics(self) -> None:
        generator = torch.Generator().manual_seed(2)
        picks = torch.randperm(len(all_captioned()), generator=generator)[:64].tolist()
        captions = [all_captioned()[i] for i in picks]
        latents = encode_video(self.vae, to_float(render(captions, [draw_identity(generator) for _ in captions], 49)))
        mean, std = (torch.tensor(v)[:, None, None] for v in (settings_of(self.vae).latents_mean, settings_of(self.vae).latents_std))
        raw = latents * std + mean
        deviation = raw.std((0, 1, 3, 4))
        # The square root of the deviation: faint channels stay fainter than strong ones instead of being blown up to noise of unit size.
        scale = (deviation * deviation.mean()).sqrt()
        self.vae.register_to_config(latents_mean=raw.mean((0, 1, 3, 4)).tolist(), latents_std=scale.tolist())
