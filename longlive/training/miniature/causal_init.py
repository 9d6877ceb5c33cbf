"""Train the miniature's causal transformer by teacher forcing on videos of the world.

Every step trains on first blocks, where everything that a prompt says must be invented (three frames, so many of them), and every few
steps on clips in which blocks follow blocks, which is learned soon. The later blocks of a clip are taken from anywhere in a long video:
the world repeats itself every `PERIOD` frames, so the same latents are correct at later positions, and every position is trained.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longlive.cache.window import Window
from longlive.config import CausalInitConfig
from longlive.generation.caches import ring_cache
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.sampling import sample
from longlive.miniature.captions import canonical
from longlive.miniature.world import validation_set
from longlive.models.text import TextEncoder
from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import NUM_TIMESTEPS, shifted, warp_steps
from longlive.training.miniature.transformer import TransformerStage
from longlive.training.teacher_forcing import TeacherForcing

PERIOD = 24  # latent frames after which a moving video repeats, a multiple of the block
CLIP_BLOCKS = 5


class CausalInitStage(TransformerStage):
    """Teacher forcing with a window and a sink; what is exported is the moving average of the weights."""

    def __init__(
        self,
        config: CausalInitConfig,
        network: WanTransformer,
        vae: AutoencoderKLWan,
        text_encoder: TextEncoder,
        data: Path,
        *,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(config, network, vae, text_encoder, data, steps=steps, seed=seed)
        self.config, self.block, self.window = config, config.block, Window.of(config.window, config.sink)
        self.objective = TeacherForcing(network, block=self.block, window=self.window)
        self.clips = self.videos("clips.pt", 1, num_videos=config.num_videos, num_latent_frames=(CLIP_BLOCKS + 2) * self.block)
        self.firsts = self.videos("firsts.pt", 2, num_videos=config.num_first_videos, num_latent_frames=self.block)

    def step(self, number: int) -> dict[str, float]:
        self.last_batch = {}
        first = self._first_blocks()
        first.backward()
        metrics = {"causal_init/first_block_loss": first.item()}
        if number % self.config.clip_every == 0:
            clip = self._clips()
            clip.backward()
            metrics["causal_init/clip_loss"] = clip.item()
        return metrics | {"causal_init/grad_norm": self.update(number)}

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _timesteps(self, batch: int, blocks: int, shift: float) -> Tensor:
        return NUM_TIMESTEPS * shifted(self._uniform(batch, blocks), shift)

    def _first_blocks(self) -> Tensor:
        clip, captions = self.firsts.draw(self.config.first_batch, slice(None), self.generator, weights=self.weights)
        noise = torch.randn(clip.shape, generator=self.generator)
        text, t = self.texts.draw(captions, self.generator), self._timesteps(len(clip), 1, self.config.first_shift)
        self.last_batch |= {"first_blocks": clip, "first_text": text, "first_t": t, "first_noise": noise}
        return self.objective(clip, range(self.block), text, t=t, noise=noise)

    def _clips(self) -> Tensor:
        """With probability 2/5 the start of a video, else its first block (the sink) and four later ones, of which three carry the loss."""
        videos, captions = self.clips.draw(self.config.clip_batch, slice(None), self.generator)
        from_start = self._below(5) < 2
        skip = 1 if from_start else 2 + self._below(2)  # the block that follows the sink
        length = (CLIP_BLOCKS - 1) * self.block
        late = range(skip * self.block, skip * self.block + length)
        clip = torch.cat([videos[:, : self.block], videos[:, late.start : late.stop]], dim=1)
        repeats = 0 if from_start or self._below(2) else self._below(max(1, (self.config.max_position - late.stop) // PERIOD))
        frames = (*range(self.block), *(frame + PERIOD * repeats for frame in late))
        context_blocks = 0 if from_start else 2
        noise = torch.randn(clip[:, context_blocks * self.block :].shape, generator=self.generator)
        damage = self.config.history_sigma * self._uniform(len(clip), 1, 1, 1, 1)
        history = (1 - damage) * clip + damage * torch.randn(clip.shape, generator=self.generator)
        t = self._timesteps(len(clip), CLIP_BLOCKS - context_blocks, self.config.timestep_shift)
        text = self.texts.draw(captions, self.generator)
        self.last_batch |= {"clips": clip, "history": history, "frames": frames, "clip_text": text, "clip_t": t, "clip_noise": noise}
        return self.objective(clip, frames, text, t=t, noise=noise, context_blocks=context_blocks, history=history)

    @torch.no_grad()
    def validate(self, folder: Path, number: int, *, num_prompts: int = 32, num_latent_frames: int = 15) -> dict[str, float]:
        """Videos of prompts that are not trained on, by the block loop of inference, judged by the oracle."""
        captions = validation_set(num_prompts)
        latents = self.generate([canonical(caption) for caption in captions], num_latent_frames, seed=1)
        return self.judge(latents, captions, folder / f"causal_init_{number:06d}.png")

    def generate(self, prompts: list[str], num_latent_frames: int, *, seed: int) -> Tensor:
        """Latents of one video per prompt, all in one batch, with the averaged weights."""
        network, (height, width) = self.ema.average, self.clips.latents.shape[-2:]
        blocks = sample(
            Denoiser(network),
            PromptSchedule.single("all"),
            lambda _: network.project_text(self.text_encoder.encode(prompts)),
            cache=ring_cache(network, height, width, window=self.window, batch=len(prompts)),
            latent_size=(height, width),
            timesteps=warp_steps(self.config.denoising_steps, self.config.timestep_shift),
            fresh_noise=False,
            generator=torch.Generator().manual_seed(seed),
            batch=len(prompts),
            block=self.block,
            num_latent_frames=num_latent_frames,
        )
        return torch.cat([made.latents for made in blocks], dim=1)
