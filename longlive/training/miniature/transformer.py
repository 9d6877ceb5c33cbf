"""What the stages `teacher` and `causal_init` share: captions drawn with weights, their embeddings, validation by the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKLWan

from longlive.config import CausalInitConfig, TeacherConfig
from longlive.miniature import oracle
from longlive.miniature.world import NUM_HELD_OUT, Captioned, training_set, validation_set
from longlive.models.text import TextEncoder
from longlive.models.vae import decode_video
from longlive.models.wan import WanTransformer
from longlive.training.miniature.caption_texts import CaptionTexts, caption_weights
from longlive.training.miniature.latent_videos import LatentVideos, save_strips, to_uint8
from longlive.training.pretraining import PretrainingStage
from longlive.types import Latents


class TransformerStage(PretrainingStage):
    """Pre-training of a transformer on encoded videos of the world, kept in the run folder `data`.

    Random numbers: the stage draws from `seed`, its videos were drawn from `seed + 1` and `seed + 2`, sentences from `seed + 3`.
    """

    def __init__(
        self,
        config: TeacherConfig | CausalInitConfig,
        network: WanTransformer,
        vae: AutoencoderKLWan,
        text_encoder: TextEncoder,
        data: Path,
        *,
        steps: int,
        seed: int,
    ) -> None:
        super().__init__(
            network, steps=steps, lr=config.lr, ema_decay=config.ema_decay, bfloat16_linears=config.bfloat16_linears, seed=seed
        )
        self.vae, self.text_encoder, self.data, self.seed = vae, text_encoder, data, seed
        self.captions = training_set(NUM_HELD_OUT + len(validation_set()))
        self.weights = caption_weights(self.captions, config.oversampled, config.oversampling)
        self.texts = CaptionTexts(text_encoder, self.captions, phrasings=config.phrasings, seed=seed + 3)

    def videos(self, name: str, number: int, *, num_videos: int, num_latent_frames: int) -> LatentVideos:
        """Data set `number` of this stage, in the file `name` of its folder."""
        seed = self.seed + number
        return LatentVideos(
            self.data / name, self.vae, self.captions, num_videos=num_videos, num_latent_frames=num_latent_frames, seed=seed
        )

    def judge(self, latents: Latents, captions: Sequence[Captioned], picture: Path) -> dict[str, float]:
        """What the oracle reads (`Reading.shares`): shares of videos that show each attribute of their caption, overlap with templates.

        Writes images of the first twelve videos to `picture`.
        """
        images = to_uint8(decode_video(self.vae, latents))
        save_strips(images[:12], picture)
        return {f"oracle/{name}": value for name, value in oracle.read(images).shares(list(captions)).items()}
