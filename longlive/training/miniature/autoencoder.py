"""Train the miniature's `AutoencoderKLWan` as it is used: on long videos in chunks, with convolution caches carried over.

A causal convolutional autoencoder trained on short clips fails a few frames past their length, because later frames depend on a history
that training never showed. So a batch of endless videos runs through encoder and decoder chunk by chunk; caches are detached between
chunks (truncated back-propagation) and reset at random.
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
from longlive.models.vae import StreamDecoder, StreamEncoder, decode_video, encode_video, latent_statistics, settings_of
from longlive.training.miniature.caption_texts import caption_weights
from longlive.training.miniature.latent_videos import save_strips, to_float, to_uint8
from longlive.training.miniature.reconstruction import reconstruction_loss
from longlive.training.optimizer import MatrixOptimizer, warmup_cosine


class EndlessVideos:
    """A batch of scenes without end; sometimes one attribute of a scene changes, as by a prompt switch.

    Scenes start wherever a moving subject can be, so that the autoencoder sees every position.

    Args:
        oversampled, oversampling: attribute values that scenes start with this many times as often.
        change: probability of a change before the next images.
    """

    def __init__(
        self,
        batch: int,
        generator: torch.Generator,
        *,
        oversampled: Collection[str] = (),
        oversampling: float = 1.0,
        change: float = 0.2,
    ) -> None:
        self.batch, self.generator, self.change = batch, generator, change
        self.scenes: list[tuple[Captioned, Identity]] = []
        self._everything = all_captioned()
        self._weights = caption_weights(self._everything, oversampled, oversampling)
        self.restart()

    def restart(self) -> None:
        """Start new scenes."""
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


class AutoencoderStage:
    """Reconstruction with a light pull of the posterior to a unit Gaussian; with `decoder_only` the latents stay as they are."""

    between_videos = True

    def __init__(self, config: AutoencoderConfig, vae: AutoencoderKLWan, *, steps: int, seed: int) -> None:
        self.config, self.vae, self.steps = config, vae, steps
        self.reconstruction_loss = partial(
            reconstruction_loss,
            subject_weight=config.subject_weight,
            edge_weight=config.edge_weight,
            gradient_weight=config.gradient_weight,
        )
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not config.decoder_only)
        self.optimizer = MatrixOptimizer(vae, lr=config.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.videos = EndlessVideos(config.batch, self.generator, oversampled=config.oversampled, oversampling=config.oversampling)
        self.encoder, self.decoder = StreamEncoder(vae), StreamDecoder(vae)
        self.last_batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        restart = max(self.config.reset, 1 - number / self.config.stream_from)  # probability: videos are short at first, then ever longer
        if self.encoder.num_latent_frames and float(torch.rand((), generator=self.generator)) < restart:
            self.encoder.reset()
            self.decoder.reset()
            self.videos.restart()
        first = self.encoder.num_latent_frames == 0
        images = to_float(self.videos.next(self.config.images_per_chunk + (1 if first else 0)))
        self.last_batch = {"images": images, "images_before": self.encoder.num_latent_frames}
        with torch.set_grad_enabled(not self.config.decoder_only):
            mean, log_variance = self.encoder.posterior(images).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        variance = log_variance.exp() + self._noise(mean).square()  # of the posterior, and of a generator's errors
        z = mean + variance.sqrt() * torch.randn(mean.shape, generator=self.generator)
        offset, scale = latent_statistics(self.vae, z)
        decoded = self.decoder.decode(((z - offset) / scale).transpose(1, 2), clamp=False)
        loss = self.reconstruction_loss(decoded, images)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        self.optimizer.zero_grad()
        (loss + self.config.kl_weight * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step(warmup_cosine(number, self.steps))
        self.encoder.detach()
        self.decoder.detach()
        return {"autoencoder/loss": loss.item(), "autoencoder/kl": kl.item(), "autoencoder/grad_norm": norm.item()}

    def _noise(self, latents: Tensor) -> Tensor:
        """Standard deviation of the noise on each video's latents, `[B, C, 1, 1, 1]`: a uniform fraction of each channel's own."""
        level = self.config.latent_noise * torch.rand(len(latents), generator=self.generator)
        return level[:, None, None, None, None] * latents.detach().std((0, 2, 3, 4), keepdim=True)

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
        if not self.config.decoder_only:
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
        # The square root of the deviation: weak channels stay weaker than strong ones, instead of being amplified to unit noise.
        scale = (deviation * deviation.mean()).sqrt()
        self.vae.register_to_config(latents_mean=raw.mean((0, 1, 3, 4)).tolist(), latents_std=scale.tolist())
