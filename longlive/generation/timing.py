"""Seconds, pixel frames and latent frames: the arithmetic of a model's rates."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Rates of a model: `fps` pixel frames per second, `stride` of them per latent frame but one for the first, and the `block`."""

    fps: float = 16.0
    stride: int = 4
    block: int = 3

    def latent_frames_for(self, seconds: float) -> int:
        """Latent frames, in whole blocks, of a video of at least `seconds`. Raises ValueError when that is not a length."""
        if not seconds > 0 or math.isinf(seconds):
            raise ValueError(f"a video of {seconds} seconds cannot be made; choose a length above 0")
        return self._whole_blocks(math.ceil((math.ceil(seconds * self.fps - 1e-6) - 1) / self.stride) + 1)

    def latent_frames_of(self, num_frames: int) -> int:
        """Latent frames of a video of exactly `num_frames` pixel frames. Raises ValueError when no whole number of blocks makes so many."""
        latent = self._whole_blocks(math.ceil((num_frames - 1) / self.stride) + 1)
        if num_frames < 1 or self.num_frames(latent) != num_frames:
            raise ValueError(f"a video of {num_frames} frames is no whole number of blocks; choose {self.num_frames(latent)} for example")
        return latent

    def num_frames(self, latent_frames: int) -> int:
        """Pixel frames of a video of `latent_frames`: stride (F - 1) + 1."""
        return self.stride * (latent_frames - 1) + 1

    def block_at(self, seconds: float) -> int:
        """The latent frame at which the block nearest to a time of the video starts."""
        return round(seconds * self.fps / self.stride / self.block) * self.block

    def check_blocks(self, latent_frames: int) -> None:
        """Raises ValueError when a video of `latent_frames` is no whole number of blocks."""
        if latent_frames <= 0 or latent_frames % self.block:
            nearest = max(self.block, round(latent_frames / self.block) * self.block)
            raise ValueError(
                f"{latent_frames} latent frames cannot be cut into blocks of {self.block}; choose a multiple, {nearest} for example"
            )

    def _whole_blocks(self, latent_frames: int) -> int:
        return max(1, math.ceil(latent_frames / self.block)) * self.block
