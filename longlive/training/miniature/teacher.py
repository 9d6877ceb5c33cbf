"""Train the miniature's teacher: a bidirectional transformer that knows short clips of the world.

Every step sees the first frames alone, where all that a prompt says must be invented (cheap, many videos), and every few
steps whole clips.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from longlive.generation.denoiser import Denoiser
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import NUM_HELD_OUT, training_set, validation_set
from longlive.models.text import TextEncoder
from longlive.models.vae import decode_video
from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import NUM_TIMESTEPS, shifted
from longlive.training.flow_matching import FlowMatching
from longlive.training.miniature.caption_texts import CaptionTexts, weights
from longlive.training.miniature.latent_videos import LatentVideos, save_strips, to_uint8
from longlive.training.ode import trajectory
from longlive.training.pretraining import Pretraining, PretrainingStage


class TeacherStage(PretrainingStage):
    """Flow matching of whole clips; what is exported is the moving average of the weights.

    Args:
        clip_frames, clip_batch, clip_every: whole clips, how many, and steps from one batch of them to the next.
        short_frames, short_batch: the beginnings of clips, every step.
        hard, hard_weight: values of attributes of which beginnings are drawn that much more often.
        guidance_scale: at which validation clips are made: that of the stages that distil the teacher.
    """

    def __init__(
        self,
        network: WanTransformer,
        vae: AutoencoderKLWan,
        text_encoder: TextEncoder,
        data: Path,
        *,
        steps: int,
        lr: float,
        seed: int,
        clip_frames: int,
        clip_batch: int,
        clip_every: int,
        short_frames: int,
        short_batch: int,
        num_clips: int,
        num_shorts: int,
        phrasings: int,
        shift: float,
        ema_decay: float,
        bfloat16: bool,
        hard: Collection[str],
        hard_weight: float,
        guidance_scale: float = 3.0,
    ) -> None:
        self.vae, self.text_encoder = vae, text_encoder
        self.clip_batch, self.clip_every, self.short_batch = clip_batch, clip_every, short_batch
        self.clip_frames, self.shift, self.guidance_scale = clip_frames, shift, guidance_scale
        self.objective = FlowMatching(network)
        super().__init__(Pretraining(network, steps=steps, lr=lr, ema_decay=ema_decay, bfloat16=bfloat16, seed=seed))
        captions = training_set(NUM_HELD_OUT + len(validation_set()))
        self.weights = weights(captions, hard, hard_weight)
        self.texts = CaptionTexts(text_encoder, captions, phrasings=phrasings, seed=seed + 3)
        self.clips = LatentVideos(data / "clips.pt", vae, captions, num_videos=num_clips, num_latent_frames=clip_frames, seed=seed + 1)
        self.shorts = LatentVideos(data / "shorts.pt", vae, captions, num_videos=num_shorts, num_latent_frames=short_frames, seed=seed + 2)

    def step(self, number: int) -> dict[str, float]:
        metrics = {"teacher/short_loss": self._learn(self.shorts, self.short_batch)}
        if number % self.clip_every == 0:
            metrics["teacher/clip_loss"] = self._learn(self.clips, self.clip_batch)
        return metrics | {"teacher/grad_norm": self.learner.update(number)}

    def _learn(self, videos: LatentVideos, batch: int) -> float:
        """Gradient of one batch; returns its loss."""
        clip, captions = videos.draw(batch, slice(None), self.generator, weights=self.weights)
        t = NUM_TIMESTEPS * shifted(torch.rand(batch, generator=self.generator), self.shift)
        noise = torch.randn(clip.shape, generator=self.generator)
        self._batch = {"clip": clip, "captions": captions, "t": t, "noise": noise}
        loss = self.objective(clip, self.texts.draw(captions, self.generator), t=t, noise=noise)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(self, folder: Path, number: int, *, num_prompts: int = 50, num_steps: int = 20) -> dict[str, float]:
        """Guided clips of prompts that training does not show, from the same noise every time, read by the oracle; a sheet of them."""
        captions = validation_set(num_prompts)
        text = self.text_encoder.encode([canonical(c) for c in captions])
        noise = torch.randn(num_prompts, *self.clips.latents.shape[1:], generator=torch.Generator().manual_seed(1))
        denoiser = Denoiser(self.learner.ema.average, guidance_scale=self.guidance_scale, negative=torch.zeros_like(text))
        latents = trajectory(denoiser, noise, text, num_steps=num_steps, keep=[num_steps], shift=self.shift)[:, 0]
        images = to_uint8(decode_video(self.vae, latents))
        save_strips(images[:12], folder / f"teacher_{number:06d}.png")
        return {f"oracle/{name}": value for name, value in oracle.read(images).shares(captions).items()}
