"""From settings to a stage of training."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from longlive.cache.window import Window
from longlive.checkpoints import store
from longlive.config import AutoencoderConfig, CausalInitConfig, TrainConfig
from longlive.models.text import TextEncoder
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments
from longlive.training.autoencoder import AutoencoderStage
from longlive.training.causal_init import CausalInitStage
from longlive.training.language import LanguageStage
from longlive.training.trainer import Stage


def build(config: TrainConfig) -> Stage:
    """The stage that `config.stage` names, with new weights drawn from `config.seed`."""
    torch.manual_seed(config.seed)  # initial weights; everything else draws from the stage's own generators
    if config.stage == "language":
        return LanguageStage(steps=config.steps, batch=config.language.batch, lr=config.language.lr, seed=config.seed)
    if config.stage == "autoencoder":
        return _autoencoder(config, config.autoencoder)
    return _causal_init(config, config.causal_init)


def _autoencoder(config: TrainConfig, settings: AutoencoderConfig) -> AutoencoderStage:
    vae = AutoencoderKLWan(
        base_dim=settings.base_dim,
        dim_mult=list(settings.dim_mult),
        num_res_blocks=settings.num_res_blocks,
        z_dim=settings.z_dim,
        temperal_downsample=[True] * (len(settings.dim_mult) - 1),
        is_residual=True,
        patch_size=2,
        in_channels=12,  # 3 colours of 2 x 2 pixels
        out_channels=12,
        latents_mean=[0.0] * settings.z_dim,  # measured at the end of training
        latents_std=[1.0] * settings.z_dim,
        scale_factor_spatial=2 ** len(settings.dim_mult),
    )
    return AutoencoderStage(
        vae,
        batch=settings.batch,
        steps=config.steps,
        lr=settings.lr,
        seed=config.seed,
        kl_weight=settings.kl_weight,
        subject_weight=settings.subject_weight,
        reset=settings.reset,
        stream_from=settings.stream_from,
        images_per_chunk=settings.images_per_chunk,
    )


def _causal_init(config: TrainConfig, settings: CausalInitConfig) -> CausalInitStage:
    for stage, folder in (("language", settings.language), ("autoencoder", settings.autoencoder)):
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder} does not exist; run configs/miniature/{stage}.yaml first, or say where its export is: causal_init.{stage}=…"
            )
    encoder, tokenizer = store.load_text_encoder(settings.language)
    if settings.initial is None:
        network = WanTransformer(**arguments(settings.size))
    else:
        network = WanTransformer.from_pretrained(settings.initial)
    return CausalInitStage(
        network,
        store.load_vae(settings.autoencoder).requires_grad_(False),
        TextEncoder(encoder, tokenizer, text_len=network.config.text_len),
        Path(config.run),
        steps=config.steps,
        lr=settings.lr,
        seed=config.seed,
        clip_batch=settings.clip_batch,
        first_batch=settings.first_batch,
        num_videos=settings.num_videos,
        num_first_videos=settings.num_first_videos,
        phrasings=settings.phrasings,
        block=settings.block,
        window=Window.of(settings.window, settings.sink),
        shift=settings.timestep_shift,
        first_shift=settings.first_shift,
        history_sigma=settings.history_sigma,
        max_position=settings.max_position,
        denoising_steps=settings.denoising_steps,
        ema_decay=settings.ema_decay,
        clip_every=settings.clip_every,
        bfloat16=settings.bfloat16,
        hard_shapes=settings.hard_shapes,
        hard_weight=settings.hard_weight,
    )
