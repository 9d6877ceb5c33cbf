"""Length and size of a video: checks, and lengths in any unit as latent frames in whole blocks."""

from __future__ import annotations

from longlive.generation.cues import TEMPORAL_STRIDE, num_images_of, num_latent_frames_for


def check_whole_blocks(num_latent_frames: int, block: int) -> None:
    """Raises ValueError, with the nearest valid length, unless `num_latent_frames` is a positive multiple of `block`."""
    if num_latent_frames <= 0 or num_latent_frames % block:
        raise ValueError(
            f"{num_latent_frames} latent frames cannot be cut into blocks of {block}; choose a multiple, "
            f"{_nearest(num_latent_frames, block)} for example"
        )


def resolve_length(*, seconds: float | None, num_latent_frames: int | None, num_frames: int | None, block: int, fps: float) -> int | None:
    """The length of a video in latent frames, from whichever of the three is given; None when none is.

    Args:
        seconds: rounded up to whole blocks.
        num_latent_frames: a multiple of `block`.
        num_frames: pixel frames, as in diffusers: F latent frames are 4 F - 3 of them.

    Raises:
        ValueError: when several are given, or when latent or pixel frames are not whole blocks; names the nearest valid number.
    """
    given = {"seconds": seconds, "num_latent_frames": num_latent_frames, "num_frames": num_frames}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"both {names[0]} and {names[1]} are given; choose one")
    if seconds is not None:
        return num_latent_frames_for(seconds, block=block, fps=fps)
    if num_frames is not None:
        num_latent_frames = _nearest((num_frames - 1) / TEMPORAL_STRIDE + 1, block)
        if num_images_of(num_latent_frames) != num_frames:
            raise ValueError(
                f"num_frames {num_frames} is not the length of a video in blocks of {block} latent frames (4 x latent frames - 3); "
                f"choose {num_images_of(num_latent_frames)} for example"
            )
    if num_latent_frames is not None:
        check_whole_blocks(num_latent_frames, block)
    return num_latent_frames


def check_size(height: int, width: int, stride: int) -> None:
    """Raises ValueError, with the nearest valid size, unless height and width, in pixels, are positive multiples of `stride`."""
    for name, pixels in (("height", height), ("width", width)):
        if pixels <= 0 or pixels % stride:
            raise ValueError(f"{name} {pixels} is not divisible by {stride}; choose {_nearest(pixels, stride)} for example")


def _nearest(value: float, step: int) -> int:
    """The multiple of `step`, at least one, that is nearest to `value`."""
    return max(1, round(value / step)) * step
