"""Train the miniature's teacher: a bidirectional transformer of short clips of the world.

Every step trains on beginnings of clips, where everything that a prompt says must be invented (short, so many of them), and every few
steps on whole clips.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from longlive.config import TeacherConfig
from longlive.generation.denoiser import Denoiser
from longlive.miniature.captions import canonical
from longlive.miniature.world import validation_set
from longlive.models.text import TextEncoder
from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import NUM_TIMESTEPS, shifted
from longlive.training.flow_matching import FlowMatching
from longlive.training.miniature.latent_videos import LatentVideos
from longlive.training.miniature.transformer import TransformerStage
from longlive.training.ode import trajectory

GUIDANCE_SCALE = 3.0  # of validation clips; as in the stages that distil the teacher


class TeacherStage(TransformerStage):
    """Flow matching on clips; what is exported is the moving average of the weights."""

    def __init__(
        self,
        config: TeacherConfig,
        network: WanTransformer,
        vae: AutoencoderKLWan,
        text_encoder: TextEncoder,
        data: Path,
        *,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(config, network, vae, text_encoder, data, steps=steps, seed=seed)
        self.config, self.objective = config, FlowMatching(network)
        self.clips = self.videos("clips.pt", 1, num_videos=config.num_clips, num_latent_frames=config.clip_frames)
        self.shorts = self.videos("shorts.pt", 2, num_videos=config.num_shorts, num_latent_frames=config.short_frames)

    def step(self, number: int) -> dict[str, float]:
        metrics = {"teacher/short_loss": self._accumulate(self.shorts, self.config.short_batch)}
        if number % self.config.clip_every == 0:
            metrics["teacher/clip_loss"] = self._accumulate(self.clips, self.config.clip_batch)
        return metrics | {"teacher/grad_norm": self.update(number)}

    def _accumulate(self, videos: LatentVideos, batch: int) -> float:
        """Add the gradient of one batch; returns its loss."""
        clip, captions = videos.draw(batch, slice(None), self.generator, weights=self.weights)
        t = NUM_TIMESTEPS * shifted(torch.rand(batch, generator=self.generator), self.config.timestep_shift)
        noise = torch.randn(clip.shape, generator=self.generator)
        self.last_batch = {"clip": clip, "captions": captions, "t": t, "noise": noise}
        loss = self.objective(clip, self.texts.draw(captions, self.generator), t=t, noise=noise)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(self, folder: Path, number: int, *, num_prompts: int = 50, num_steps: int = 20) -> dict[str, float]:
        """Guided clips of prompts that are not trained on, always from the same noise, judged by the oracle."""
        captions = validation_set(num_prompts)
        text = self.text_encoder.encode([canonical(caption) for caption in captions])
        noise = torch.randn(num_prompts, *self.clips.latents.shape[1:], generator=torch.Generator().manual_seed(1))
        denoiser = Denoiser(self.ema.average, guidance_scale=GUIDANCE_SCALE, negative=torch.zeros_like(text))
        states = trajectory(denoiser, noise, text, num_steps=num_steps, keep=[num_steps], shift=self.config.timestep_shift)
        return self.judge(states[:, 0], captions, folder / f"teacher_{number:06d}.png")
