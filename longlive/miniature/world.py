"""A captioned video world in which every video can be rendered and measured exactly.

One shaded subject (shape, colour, motion) on a plain background, 64x64 pixels, 16 frames per second, on a torus: without borders an
endless video is stationary. A prompt names the captioned attributes; it cannot restore the identity (size, start position, direction of
the light). Knows nothing of models, text or training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

SIZE = 64  # pixels, height and width
FPS = 16
SPEED = 2  # pixels per frame: one latent cell (8 pixels) per latent frame (4 pixel frames)
LATTICE = 8  # pixels between possible start positions: one latent cell

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 245),
    "yellow": (250, 215, 30),
    "purple": (160, 50, 215),
    "cyan": (40, 215, 225),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 16),
    "white": (242, 242, 240),
    "gray": (126, 126, 130),
    "brown": (104, 72, 44),
    "pink": (250, 176, 196),
}
MOTIONS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1), "still": (0, 0)}
RADII = (10.0, 12.0, 14.0)  # of the circle with the subject's area, in pixels
SHADE = 0.3  # how much darker the unlit side is than the lit one
LIGHTS = 8  # directions of the light
NUM_HELD_OUT = 100  # combinations of attributes that are kept for testing

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "background": tuple(BACKGROUNDS),
    "motion": tuple(MOTIONS),
}


@dataclass(frozen=True)
class Captioned:
    """The attributes of a video that a prompt names."""

    shape: str
    color: str
    background: str
    motion: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is not in this world; choose from {', '.join(values)}")

    def with_one_change(self, attribute: str, value: str) -> Captioned:
        """The same with one attribute changed, as by a prompt switch."""
        return replace(self, **{attribute: value})


@dataclass(frozen=True)
class Identity:
    """What no prompt names: `radius` in pixels, start `x`, `y` in pixels, `light` an index into `LIGHTS` directions."""

    radius: float
    x: int
    y: int
    light: int


def all_captioned() -> list[Captioned]:
    """Every combination of attributes, in a fixed order."""
    return [Captioned(*values) for values in itertools.product(*ATTRIBUTES.values())]


def held_out(count: int = NUM_HELD_OUT, seed: int = 20250922) -> list[Captioned]:
    """Combinations that are not in the training set, which has every single attribute value many times."""
    everything = all_captioned()
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    return [everything[i] for i in order[:count].tolist()]


def validation_set(count: int = 50) -> list[Captioned]:
    """Further combinations, for choosing between trainings, so that the held-out ones only measure the result."""
    return held_out(NUM_HELD_OUT + count)[NUM_HELD_OUT:]


def training_set(num_held_out: int = NUM_HELD_OUT) -> list[Captioned]:
    """The combinations used in training: all but the held-out ones; with `num_held_out=150` without those of `validation_set` too."""
    kept_out = set(held_out(num_held_out))
    return [item for item in all_captioned() if item not in kept_out]


def draw_identity(generator: torch.Generator, *, lattice: int = LATTICE) -> Identity:
    """A uniformly random size, start position (multiples of `lattice` pixels) and light."""

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    return Identity(
        radius=RADII[below(len(RADII))],
        x=lattice * below(SIZE // lattice),
        y=lattice * below(SIZE // lattice),
        light=below(LIGHTS),
    )


def soft_mask(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """Coverage in [0, 1] of pixels at (dx, dy) from the subject's centre; the area is pi * radius^2 for every shape.

    Signed distances, positive inside, turned into one pixel of anti-aliasing. `dx`, `dy`, `radius` broadcast.
    """
    if shape == "circle":
        inside = radius - torch.hypot(dx, dy)
    elif shape == "square":
        inside = 0.886227 * radius - torch.maximum(dx.abs(), dy.abs())
    elif shape == "triangle":  # equilateral, point up; inradius r with area 3 sqrt(3) r^2
        inradius = 0.777558 * radius
        inside = inradius - torch.maximum(dy, 0.866025 * dx.abs() - 0.5 * dy)
    elif shape == "cross":  # plus of two bars of 3 w by w: area 5 w^2
        half = 0.396333 * radius
        across, along = torch.minimum(dx.abs(), dy.abs()), torch.maximum(dx.abs(), dy.abs())
        inside = torch.minimum(half - across, 3 * half - along)
    elif shape == "ring":  # inner radius half the outer: area 3/4 pi R^2
        outer = 1.154701 * radius
        distance = torch.hypot(dx, dy)
        inside = torch.minimum(outer - distance, distance - 0.5 * outer)
    else:
        raise ValueError(f"shape {shape!r} is not in this world; choose from {', '.join(SHAPES)}")
    return (inside + 0.5).clamp(0, 1)


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor]:
    """Coverage `[shape, radius, y, x]` and shading `[light, y, x]` of a subject centred at pixel (0, 0) of the torus."""
    offset = (torch.arange(SIZE) + SIZE // 2) % SIZE - SIZE // 2
    dy, dx = torch.meshgrid(offset.float(), offset.float(), indexing="ij")
    coverage = torch.stack([torch.stack([soft_mask(s, dx, dy, r) for r in RADII]) for s in SHAPES])
    angle = torch.arange(LIGHTS) * (2 * torch.pi / LIGHTS)
    along = (dx * angle.cos()[:, None, None] + dy * angle.sin()[:, None, None]) / (1.3 * max(RADII))
    return coverage, 1 - SHADE * (0.5 - 0.5 * along.clamp(-1, 1))


def _table(values: dict[str, tuple[int, int, int]]) -> Tensor:
    return torch.tensor(list(values.values()), dtype=torch.float32)


def render(captions: Sequence[Captioned] | Sequence[Sequence[Captioned]], identities: Sequence[Identity], num_images: int) -> Tensor:
    """Videos of the given scenes: uint8 `[B, T, 3, 64, 64]`.

    `captions[b]` is one `Captioned` for the whole video, or one per pixel frame (a prompt switch). The position continues through a
    switch: it is the start plus the sum of all previous steps.
    """
    if len(captions) != len(identities):
        raise ValueError(f"{len(captions)} captions for {len(identities)} identities; their numbers must be equal")
    per_frame = [[c] * num_images if isinstance(c, Captioned) else list(c) for c in captions]
    if any(len(c) != num_images for c in per_frame):
        raise ValueError(f"a list of captions must have one entry for each of the {num_images} pixel frames")

    def index(name: str) -> Tensor:  # [B, T]
        places = {value: i for i, value in enumerate(ATTRIBUTES[name])}
        return torch.tensor([[places[getattr(c, name)] for c in video] for video in per_frame])

    coverage, shading = _templates()
    step = SPEED * torch.tensor(list(MOTIONS.values()))[index("motion")]  # [B, T, 2] in (x, y)
    start = torch.tensor([[i.x, i.y] for i in identities])
    centre = start[:, None] + torch.cumsum(step, dim=1) - step[:, :1]  # the first image shows the start
    radius = torch.tensor([RADII.index(i.radius) for i in identities])[:, None].expand(-1, num_images)
    light = torch.tensor([i.light for i in identities])[:, None].expand(-1, num_images)

    pixel = torch.arange(SIZE)
    column = ((pixel - centre[..., 0, None]) % SIZE)[..., None, :]  # [B, T, 1, X]
    row = ((pixel - centre[..., 1, None]) % SIZE)[..., :, None]  # [B, T, Y, 1]
    mask = coverage[index("shape")[..., None, None], radius[..., None, None], row, column]
    shade = shading[light[..., None, None], row, column]
    subject = _table(COLORS)[index("color")][..., None, None] * shade[..., None, :, :]
    ground = _table(BACKGROUNDS)[index("background")][..., None, None]
    return torch.lerp(ground.expand_as(subject), subject, mask[..., None, :, :]).round().to(torch.uint8)
