"""The size of the experiments: in full, and a small one that takes seconds and only shows that everything runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers of steps, videos and seeds.

    Attributes:
        seeds: of training; for each, `init` and all arms that continue it are trained from one common pre-trained start.
        videos: tested per seed, in one batch.
        init_steps, long_steps: steps of distillation, of which every `…_critic_updates`-th trains the generator.
        batch, pretraining_batch: videos per step.
        attention_clips, length_clips: length in clips of the test videos of these experiments.
        resamples: of the bootstrap.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    videos: int = 128
    width: int = 192
    layers: int = 3
    pretraining_batch: int = 16
    pretraining_steps: int = 2500
    pretraining_lr: float = 1.5e-2
    batch: int = 24
    init_steps: int = 400
    init_critic_updates: int = 5
    init_lr: float = 2e-4
    init_critic_lr: float = 1e-3
    long_steps: int = 420
    long_critic_updates: int = 2
    long_lr: float = 5e-4
    long_critic_lr: float = 1.5e-3
    attention_clips: int = 10
    length_clips: int = 20
    resamples: int = 2000


FULL = Scale()
QUICK = Scale(
    seeds=(0, 1),
    videos=4,
    width=24,
    layers=1,
    pretraining_batch=4,
    pretraining_steps=2,
    batch=2,
    init_steps=2,
    long_steps=2,
    init_critic_updates=2,
    long_critic_updates=2,
    attention_clips=3,
    length_clips=3,
    resamples=50,
)
