"""Length and size of a video: seconds, pixel frames and latent frames of a model's rates, and checks of what is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Rates of a model.

    `fps`: pixel frames per second; `stride`: pixel frames per latent frame, except the first, which is one; `block`: latent frames per
    block.
    """

    fps: float = 16.0
    stride: int = 4
    block: int = 3

    def num_frames(self, num_latent_frames: int) -> int:
        """Pixel frames of a video of F latent frames: stride (F - 1) + 1."""
        return self.stride * (num_latent_frames - 1) + 1

    def first_frame(self, latent_frame: int) -> int:
        """The first pixel frame of a latent frame."""
        return self.num_frames(latent_frame) if latent_frame else 0

    def latent_frames_for(self, seconds: float) -> int:
        """Latent frames, in whole blocks, of a video of at least `seconds`. Raises ValueError when that is not a length."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise ValueError(f"seconds {seconds!r} is no number")
        if not seconds > 0 or math.isinf(seconds):
            raise ValueError(f"a video of {seconds} seconds cannot be made; choose a length above 0")
        latent = math.ceil((math.ceil(seconds * self.fps - 1e-6) - 1) / self.stride) + 1
        return max(1, math.ceil(latent / self.block)) * self.block

    def block_at(self, seconds: float) -> int:
        """The latent frame at which the block nearest to a time of the video starts."""
        return round(seconds * self.fps / self.stride / self.block) * self.block

    def whole_blocks(self, num_latent_frames: int, *, after: int) -> int:
        """The least length, not below `num_latent_frames`, of whole blocks after those that are given."""
        return after + max(1, math.ceil((num_latent_frames - after) / self.block)) * self.block

    def resolve(self, seconds: float | None, num_latent_frames: int | None, num_frames: int | None) -> int | None:
        """The length of a video in latent frames, from whichever of the three is given; None when none is.

        Args:
            seconds: rounded up to whole blocks.
            num_latent_frames: a multiple of the block.
            num_frames: pixel frames, as in diffusers; rounded up to whole blocks, of which the caller shows as many as were asked for.

        Raises:
            ValueError: when several are given, one is no such number, or latent frames are not whole blocks; names the nearest valid one.
        """
        given = {"seconds": seconds, "num_latent_frames": num_latent_frames, "num_frames": num_frames}
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise ValueError(f"both {names[0]} and {names[1]} are given; choose one")
        if seconds is not None:
            return self.latent_frames_for(seconds)
        if num_frames is not None:
            check_whole("num_frames", num_frames, 1)
            return math.ceil((math.ceil((num_frames - 1) / self.stride) + 1) / self.block) * self.block
        if num_latent_frames is not None:
            self.check_blocks(num_latent_frames)
        return num_latent_frames

    def check_blocks(self, num_latent_frames: int | None, *, after: int = 0) -> None:
        """Raises ValueError, with the nearest valid length, unless `num_latent_frames`, beyond those before, is a multiple of the block.

        `after`: how many are given before the first block. None, an endless video, is one too.
        """
        if num_latent_frames is None:
            return
        if isinstance(num_latent_frames, bool) or not isinstance(num_latent_frames, int):
            raise ValueError(f"num_latent_frames {num_latent_frames!r} is no whole number")
        made = num_latent_frames - after
        if made <= 0 or made % self.block:
            beyond = f" after the {after} that are given" if after else ""
            raise ValueError(
                f"{num_latent_frames} latent frames cannot be cut into blocks of {self.block}{beyond}; choose a multiple, "
                f"{after + _nearest(made, self.block)} for example"
            )


def check_whole(name: str, value: int, least: int | None = None) -> None:
    """Raises ValueError, with its name, for a value that is no whole number or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        raise ValueError(f"{name} {value!r}: choose a whole number{'' if least is None else f' of at least {least}'}")


def check_size(height: int, width: int, stride: int) -> None:
    """Raises ValueError, with the nearest valid size, unless height and width, in pixels, are positive multiples of `stride`."""
    for name, pixels in (("height", height), ("width", width)):
        check_whole(name, pixels)
        if pixels <= 0 or pixels % stride:
            raise ValueError(f"{name} {pixels} is not divisible by {stride}; choose {_nearest(pixels, stride)} for example")


def _nearest(value: float, step: int) -> int:
    """The multiple of `step`, at least one, that is nearest to `value`."""
    return max(1, round(value / step)) * step
