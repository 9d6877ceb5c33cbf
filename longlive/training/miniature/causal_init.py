"""Train the miniature's causal transformer directly, by teacher forcing on videos of the world.

Every step sees first blocks alone, where all that a prompt says must be invented (three frames, cheap, many videos), and
every few steps clips in which blocks follow blocks, which is soon learned. A clip's later blocks are taken from anywhere in
a long video: the world repeats itself every `PERIOD` frames, so the same latents are true at later positions, and no
position is out of range.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longlive.cache.window import Window
from longlive.generation.cues import PromptSchedule
from longlive.generation.denoiser import Denoiser
from longlive.generation.memory import ring_cache
from longlive.generation.sampling import sample
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import NUM_HELD_OUT, training_set, validation_set
from longlive.models.text import TextEncoder
from longlive.models.vae import decode_video
from longlive.models.wan import WanTransformer
from longlive.ops.flow_matching import NUM_TIMESTEPS, shifted, warp_steps
from longlive.training.miniature.caption_texts import CaptionTexts, weights
from longlive.training.miniature.latent_videos import LatentVideos, save_strips, to_uint8
from longlive.training.pretraining import Pretraining, PretrainingStage
from longlive.training.teacher_forcing import TeacherForcing

PERIOD = 24  # latent frames after which a moving video repeats, a multiple of the block
CLIP_BLOCKS = 5


class CausalInitStage(PretrainingStage):
    """Teacher forcing with a window and a sink; what is exported is the moving average of the weights.

    Args:
        history_sigma: later blocks see a history with noise of up to this level in it, as they will see their own mistakes.
        shift, first_shift: of the noise levels that clips and first blocks are trained at.
        clip_every: steps from one batch of clips to the next.
        hard, hard_weight: values of attributes of which first blocks are drawn that much more often.
        max_position: clips are placed anywhere up to this frame of a long video.
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
        clip_batch: int,
        first_batch: int,
        num_videos: int,
        num_first_videos: int,
        phrasings: int,
        block: int,
        window: Window,
        shift: float,
        first_shift: float,
        history_sigma: float,
        max_position: int,
        denoising_steps: Sequence[int],
        ema_decay: float,
        clip_every: int,
        bfloat16: bool,
        hard: Collection[str],
        hard_weight: float,
    ) -> None:
        self.vae, self.text_encoder = vae, text_encoder
        self.clip_batch, self.first_batch = clip_batch, first_batch
        self.block, self.window, self.history_sigma, self.max_position = block, window, history_sigma, max_position
        self.shift, self.first_shift = shift, first_shift
        self.sampling = warp_steps(denoising_steps, shift)
        self.objective = TeacherForcing(network, block=block, window=window)
        super().__init__(Pretraining(network, steps=steps, lr=lr, ema_decay=ema_decay, bfloat16=bfloat16, seed=seed))
        self.clip_every = clip_every
        captions = training_set(NUM_HELD_OUT + len(validation_set()))
        self.weights = weights(captions, hard, hard_weight)
        frames = CLIP_BLOCKS * block + 2 * block
        self.texts = CaptionTexts(text_encoder, captions, phrasings=phrasings, seed=seed + 3)
        self.clips = LatentVideos(data / "clips.pt", vae, captions, num_videos=num_videos, num_latent_frames=frames, seed=seed + 1)
        self.firsts = LatentVideos(data / "firsts.pt", vae, captions, num_videos=num_first_videos, num_latent_frames=block, seed=seed + 2)

    def step(self, number: int) -> dict[str, float]:
        self._batch = {}
        first = self._first_blocks()
        first.backward()
        metrics = {"causal_init/first_block_loss": first.item()}
        if number % self.clip_every == 0:
            clip = self._clips()
            clip.backward()
            metrics["causal_init/clip_loss"] = clip.item()
        return metrics | {"causal_init/grad_norm": self.learner.update(number)}

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def _below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def _levels(self, batch: int, blocks: int, shift: float) -> Tensor:
        return NUM_TIMESTEPS * shifted(self._uniform(batch, blocks), shift)

    def _first_blocks(self) -> Tensor:
        clip, captions = self.firsts.draw(self.first_batch, slice(None), self.generator, weights=self.weights)
        noise = torch.randn(clip.shape, generator=self.generator)
        text, t = self.texts.draw(captions, self.generator), self._levels(len(clip), 1, self.first_shift)
        self._batch |= {"first_blocks": clip, "first_text": text, "first_t": t, "first_noise": noise}
        return self.objective(clip, range(self.block), text, t=t, noise=noise)

    def _clips(self) -> Tensor:
        """The start of a video in two of five steps, else its first block (the sink), one more block, and three from further on."""
        videos, captions = self.clips.draw(self.clip_batch, slice(None), self.generator)
        from_start = self._below(5) < 2
        skip = 1 if from_start else 2 + self._below(2)  # the block that follows the sink
        length = (CLIP_BLOCKS - 1) * self.block
        late = range(skip * self.block, skip * self.block + length)
        clip = torch.cat([videos[:, : self.block], videos[:, late.start : late.stop]], dim=1)
        repeats = 0 if from_start or self._below(2) else self._below(max(1, (self.max_position - late.stop) // PERIOD))
        frames = (*range(self.block), *(frame + PERIOD * repeats for frame in late))
        context_blocks = 0 if from_start else 2
        noise = torch.randn(clip[:, context_blocks * self.block :].shape, generator=self.generator)
        damage = self.history_sigma * self._uniform(len(clip), 1, 1, 1, 1)
        history = (1 - damage) * clip + damage * torch.randn(clip.shape, generator=self.generator)
        t = self._levels(len(clip), CLIP_BLOCKS - context_blocks, self.shift)
        text = self.texts.draw(captions, self.generator)
        self._batch |= {"clips": clip, "history": history, "frames": frames, "clip_text": text, "clip_t": t, "clip_noise": noise}
        return self.objective(clip, frames, text, t=t, noise=noise, context_blocks=context_blocks, history=history)

    @torch.no_grad()
    def validate(self, folder: Path, number: int, *, num_prompts: int = 32, num_latent_frames: int = 15) -> dict[str, float]:
        """Videos of prompts that training does not show, by the block loop of inference, read by the oracle; a sheet of them."""
        captions = validation_set(num_prompts)
        latents = self.generate([canonical(c) for c in captions], num_latent_frames, seed=1)
        images = to_uint8(decode_video(self.vae, latents))
        save_strips(images[:12], folder / f"causal_init_{number:06d}.png")
        return {f"oracle/{name}": value for name, value in oracle.read(images).shares(captions).items()}

    def generate(self, prompts: list[str], num_latent_frames: int, *, seed: int) -> Tensor:
        """Latents of one video a prompt, all in one batch, from the averaged weights."""
        network, (height, width) = self.learner.ema.average, self.clips.latents.shape[-2:]
        blocks = sample(
            Denoiser(network),
            PromptSchedule.single("all"),
            lambda _: network.project_text(self.text_encoder.encode(prompts)),
            cache=ring_cache(network, height, width, window=self.window, batch=len(prompts)),
            latent_size=(height, width),
            timesteps=self.sampling,
            fresh_noise=False,
            generator=torch.Generator().manual_seed(seed),
            batch=len(prompts),
            block=self.block,
            num_latent_frames=num_latent_frames,
        )
        return torch.cat([made.latents for made in blocks], dim=1)
