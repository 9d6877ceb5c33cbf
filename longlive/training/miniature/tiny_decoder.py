"""Distil a tiny decoder of the miniature's latents from its autoencoder, as it is used: on long videos in chunks, with memory carried over.

The autoencoder stays as it is. It encodes endless videos of the world; the tiny decoder learns to make their images, or those that the
full decoder makes, from the latents.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longlive.config import TinyDecoderConfig
from longlive.miniature import oracle
from longlive.miniature.world import draw_identity, render, validation_set
from longlive.models.tiny_vae import TinyDecoder, TinyVAE
from longlive.models.vae import StreamDecoder, StreamEncoder, decode_video, encode_video, settings_of, spatial_padding
from longlive.training.miniature.autoencoder import EndlessVideos
from longlive.training.miniature.latent_videos import save_strips, to_float, to_uint8
from longlive.training.miniature.reconstruction import reconstruction_loss
from longlive.training.optimizer import MatrixOptimizer, warmup_cosine


def new_tiny_vae(config: TinyDecoderConfig, vae: AutoencoderKLWan) -> TinyVAE:
    """Random weights of the settings' sizes for the latents of `vae`. Raises ValueError when height and width would not fit."""
    settings = settings_of(vae)
    tiny = TinyVAE(
        latent_channels=settings.z_dim,
        widths=config.widths,
        growth=config.growth,
        num_blocks=config.num_blocks,
        patch_size=config.patch_size,
        spatial_padding=spatial_padding(vae),
    )
    made, wanted = (tiny.spatial_stride, tiny.images_per_latent), (settings.scale_factor_spatial, settings.scale_factor_temporal)
    if made != wanted:
        raise ValueError(f"widths, growth and patch_size make {made} pixels and images of a latent; this autoencoder has {wanted}")
    return tiny.train()


class TinyDecoderStage:
    """Reconstruction from latents with noise, which a generator's latents have too."""

    between_videos = True

    def __init__(self, config: TinyDecoderConfig, vae: AutoencoderKLWan, *, steps: int, seed: int) -> None:
        self.config, self.vae, self.steps = config, vae, steps
        self.tiny = new_tiny_vae(config, vae)
        weights = {"subject_weight": config.subject_weight, "edge_weight": config.edge_weight, "gradient_weight": config.gradient_weight}
        self.reconstruction_loss = partial(reconstruction_loss, **weights)
        self.optimizer = MatrixOptimizer(self.tiny, lr=config.lr)
        self.generator = torch.Generator().manual_seed(seed)
        self.videos = EndlessVideos(config.batch, self.generator, oversampled=config.oversampled, oversampling=config.oversampling)
        self.encoder, self.teacher, self.decoder = StreamEncoder(vae), StreamDecoder(vae), TinyDecoder(self.tiny)
        self.last_batch: dict[str, Any] = {}

    def step(self, number: int) -> dict[str, float]:
        restart = max(self.config.reset, 1 - number / self.config.stream_from)  # probability: videos are short at first, then ever longer
        if self.encoder.num_latent_frames and float(torch.rand((), generator=self.generator)) < restart:
            for stream in (self.encoder, self.teacher, self.decoder):
                stream.reset()
            self.videos.restart()
        first = self.encoder.num_latent_frames == 0
        images = to_float(self.videos.next(self.config.images_per_chunk + (1 if first else 0)))
        self.last_batch = {"images": images, "images_before": self.encoder.num_latent_frames}
        with torch.no_grad():
            latents = self.encoder.encode(images)
            wanted = images if self.config.target == "images" else self.teacher.decode(latents)
        decoded = self.decoder.decode(latents + self._noise(latents), clamp=False)
        loss = self.reconstruction_loss(decoded, wanted)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.tiny.parameters(), 1.0)
        self.optimizer.step(warmup_cosine(number, self.steps))
        self.decoder.detach()
        return {"tiny_decoder/loss": loss.item(), "tiny_decoder/grad_norm": norm.item()}

    def _noise(self, latents: Tensor) -> Tensor:
        """Gaussian, for each video a uniform fraction of every channel's deviation."""
        level = self.config.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, generator=self.generator)
        return level * latents.std((0, 1, 3, 4), keepdim=True) * torch.randn(latents.shape, generator=self.generator)

    @torch.no_grad()
    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Oracle on reconstructions of 32 scenes of 49 images by both decoders, and a sheet: originals, full, tiny."""
        generator = torch.Generator().manual_seed(1)
        captions = validation_set(32)
        original = render(captions, [draw_identity(generator) for _ in captions], 49)
        latents = encode_video(self.vae, to_float(original))
        decoder = TinyDecoder(self.tiny)
        full = to_uint8(decode_video(self.vae, latents))
        tiny = to_uint8(torch.cat([decoder.decode(part) for part in latents.split(3, dim=1)], dim=2))
        save_strips(torch.stack([original[:8], full[:8], tiny[:8]], dim=1).flatten(0, 1), folder / f"tiny_decoder_{number:06d}.png")
        found = {f"oracle/{name}": value for name, value in oracle.read(tiny).shares(captions).items()}
        found |= {f"full/{name}": value for name, value in oracle.read(full).shares(captions).items() if "/" not in name}
        error = {"psnr": original, "psnr_to_full": full}
        return found | {name: (-10 * ((tiny.float() - of.float()) / 255).square().mean().log10()).item() for name, of in error.items()}

    def state(self) -> dict[str, Any]:
        return {
            "tiny": self.tiny.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "scenes": self.videos.scenes,
            "encoder": (self.encoder.num_latent_frames, self.encoder.cache),
            "teacher": (self.teacher.num_latent_frames, self.teacher.cache),
            "decoder": (self.decoder.num_latent_frames, self.decoder.memory),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.tiny.load_state_dict(state["tiny"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.videos.scenes = state["scenes"]
        self.encoder.num_latent_frames, self.encoder.cache = state["encoder"]
        self.teacher.num_latent_frames, self.teacher.cache = state["teacher"]
        self.decoder.num_latent_frames, self.decoder.memory = state["decoder"]

    def export(self, folder: Path) -> None:
        """Save in the layout that `decoder=PATH` reads."""
        self.tiny.save_pretrained(folder / "tiny_vae")
