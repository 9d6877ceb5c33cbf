"""A world smaller than the miniature's: a latent frame is a fixed linear function of a small state. No pixels, no autoencoder.

The state of a frame: shape, colour and background, which a caption names; size, texture and position x, y on a torus of 8 x 8 cells,
which it does not. The captioned motion is not visible in a single frame: it moves the position by one cell per frame. Each of these seven
attributes has its own subspace of the 128 numbers of a frame, all with the same variance: centred one-hots for choices, two harmonics of
the angle for positions and for the texture. The texture, the direction of the light, has so many values that copying it is never exact,
so errors can accumulate. Every state has the same norm, and a reader and a teacher (`exact_teacher`) exist in closed form. Every latent
element has mean 0 and variance 1 over the world. Knows nothing of models or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longlive.miniature.world import ATTRIBUTES, LATTICE, LIGHTS, MOTIONS, RADII, SIZE, Captioned, Identity, render
from longlive.types import Latents, Text

LATENT_SHAPE = (8, 4, 4)  # channels, height, width
ELEMENTS = 128
CELLS = SIZE // LATTICE  # of the torus, along x and along y
TURN = 64  # directions of the light
IDENTITY: dict[str, int] = {"size": len(RADII), "texture": TURN, "x": CELLS, "y": CELLS}
DRAWN: dict[str, int] = {name: len(ATTRIBUTES[name]) for name in ("shape", "color", "background")} | IDENTITY  # visible in one frame
UNSURE = 0.7  # relative distance above which a value is not recognised; halfway between two choices is 0.76 or more
TEXT_LEN, TEXT_DIM = 8, 64
_SEED = 20250922  # of the embeddings of states and words: trained weights depend on it

Prompt = Captioned | Sequence[Captioned]
"""One caption for all frames, or one for each (a prompt switch)."""


@dataclass(frozen=True)
class StateIdentity:
    """What no prompt names, as indices: `size` 0..2, `texture` 0..63, cell `x`, `y` 0..7 at the first frame of the video."""

    size: int
    texture: int
    x: int
    y: int

    def __post_init__(self) -> None:
        for (name, count), value in zip(IDENTITY.items(), (self.size, self.texture, self.x, self.y), strict=True):
            if not 0 <= value < count:
                raise ValueError(f"{name} {value} is not in this world; choose from 0..{count - 1}")


def draw_identity(generator: torch.Generator) -> StateIdentity:
    """A uniformly random size, texture and start position."""
    return StateIdentity(*(int(torch.randint(count, (), generator=generator)) for count in IDENTITY.values()))


class _Block(NamedTuple):
    """The subspace of an attribute: `points` `[values, R]`, all of the same norm, in the orthonormal rows of `basis` `[R, 128]`."""

    points: Tensor
    basis: Tensor


def _simplex(count: int) -> Tensor:
    """The corners of a regular simplex around 0: centred one-hots in an orthonormal (Helmert) basis of their span."""
    corners = torch.zeros(count, count - 1, dtype=torch.float64)
    for j in range(1, count):
        corners[:j, j - 1] = 1 / (j * (j + 1)) ** 0.5
        corners[j, j - 1] = -j / (j * (j + 1)) ** 0.5
    return corners * (count / (count - 1)) ** 0.5


def _circle(count: int) -> Tensor:
    """Angles as two harmonics: neighbours of eight are then 1.14 norms apart, with the first harmonic alone 0.77."""
    angle = torch.arange(count, dtype=torch.float64) * (2 * torch.pi / count)
    return torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), (2 * angle).sin()], dim=1) / 2**0.5


@lru_cache(maxsize=1)
def _blocks() -> dict[str, _Block]:
    """The embedding, float64, in columns of a shuffled Hadamard matrix, whose entries all have the same magnitude."""
    points = {name: _circle(count) if name in ("x", "y", "texture") else _simplex(count) for name, count in DRAWN.items()}
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < ELEMENTS:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    generator = torch.Generator().manual_seed(_SEED)
    rows, columns = (torch.randperm(ELEMENTS, generator=generator) for _ in range(2))
    signs = 2.0 * torch.randint(2, (ELEMENTS, 1), generator=generator) - 1
    directions = (signs * hadamard[rows][:, columns]).T / ELEMENTS**0.5
    parts = directions[: sum(p.shape[1] for p in points.values())].split([p.shape[1] for p in points.values()])
    return {name: _Block((ELEMENTS / len(DRAWN)) ** 0.5 * points[name], part) for name, part in zip(DRAWN, parts, strict=True)}


@lru_cache(maxsize=1)
def tables() -> dict[str, Float[Tensor, "V 128"]]:
    """For each attribute of `DRAWN` the contribution of each value to a flat latent frame, float64; a frame is the sum of seven rows.

    Rows of one attribute have the same norm and sum to 0; rows of different attributes are orthogonal.
    """
    return {name: block.points @ block.basis for name, block in _blocks().items()}


def indices(prompts: Sequence[Prompt], num_latent_frames: int) -> dict[str, Int[Tensor, "B F"]]:
    """The captioned attributes of each frame, as indices into `world.ATTRIBUTES`.

    Raises:
        ValueError: when a list of captions does not have one entry per frame.
    """
    for prompt in prompts:
        if not isinstance(prompt, Captioned) and len(prompt) != num_latent_frames:
            raise ValueError(f"a list of captions must have one entry for each of the {num_latent_frames} frames, not {len(prompt)}")
    frames = [[prompt] * num_latent_frames if isinstance(prompt, Captioned) else prompt for prompt in prompts]
    result = {}
    for name, values in ATTRIBUTES.items():
        places = {value: place for place, value in enumerate(values)}
        result[name] = torch.tensor([[places[getattr(c, name)] for c in video] for video in frames]).view(len(frames), num_latent_frames)
    return result


def steps(prompts: Sequence[Prompt], num_latent_frames: int) -> Int[Tensor, "B F 2"]:
    """Cells (x, y) by which each frame's caption moves the subject from the previous frame."""
    return torch.tensor(list(MOTIONS.values()))[indices(prompts, num_latent_frames)["motion"]]


def offsets(prompts: Sequence[Prompt], num_latent_frames: int) -> Int[Tensor, "B F 2"]:
    """Cells (x, y) of each frame from the first one: the sum of the steps between."""
    moved = steps(prompts, num_latent_frames)
    return moved.cumsum(dim=1) - moved[:, :1]


def latents(captions: Sequence[Prompt], identities: Sequence[StateIdentity], num_latent_frames: int, *, start: int = 0) -> Latents:
    """Frames `start` to `start + num_latent_frames - 1` of the given videos: float32 `[B, F, 8, 4, 4]`.

    `captions[b]` is one `Captioned` for the whole video, or one for each of its `start + num_latent_frames` frames (a prompt switch). The
    position runs on through a switch: it is the identity's, shown by frame 0, plus the steps of all frames since.
    """
    if len(captions) != len(identities):
        raise ValueError(f"{len(captions)} captions for {len(identities)} identities; their numbers must be equal")
    end = start + num_latent_frames
    position = torch.tensor([[i.x, i.y] for i in identities]).view(-1, 1, 2) + offsets(captions, end)
    state: dict[str, Tensor] = indices(captions, end)
    state |= {"x": position[..., 0] % CELLS, "y": position[..., 1] % CELLS}
    state |= {name: torch.tensor([getattr(i, name) for i in identities])[:, None].expand(-1, end) for name in ("size", "texture")}
    flat = torch.zeros(len(captions), num_latent_frames, ELEMENTS, dtype=torch.float64)
    for name, table in tables().items():
        flat += table[state[name][:, start:]]
    return flat.float().unflatten(-1, LATENT_SHAPE)


def _wrap(distance: Tensor) -> Tensor:
    return (distance + CELLS / 2) % CELLS - CELLS / 2


@dataclass(frozen=True)
class StateReading:
    """What frames `[B, F]` show, as indices; -1 where it is not recognised.

    `motion` of a frame is the step from the previous frame; for the first frame it is the step to the second.
    `position` `[B, F, 2]` is (x, y) in cells and `light` `[B, F]` the texture in degrees, neither rounded; `residual` `[B, F]` the
    distance to the nearest valid state over its norm (0 is a state, 1 the mean of the world).
    """

    shape: Int[Tensor, "B F"]
    color: Int[Tensor, "B F"]
    background: Int[Tensor, "B F"]
    motion: Int[Tensor, "B F"]
    size: Int[Tensor, "B F"]
    texture: Int[Tensor, "B F"]
    x: Int[Tensor, "B F"]
    y: Int[Tensor, "B F"]
    position: Float[Tensor, "B F 2"]
    light: Float[Tensor, "B F"]
    residual: Float[Tensor, "B F"]

    def correct_frames(self, captions: Sequence[Prompt]) -> dict[str, Bool[Tensor, "B F"]]:
        """For each captioned attribute whether each frame shows it; unrecognised values count as wrong."""
        return {name: getattr(self, name).cpu() == said for name, said in indices(captions, self.shape.shape[1]).items()}

    def correct(self, captions: Sequence[Captioned], frames: slice = slice(None)) -> dict[str, Bool[Tensor, " B"]]:
        """For each captioned attribute whether most of the video's `frames` show it; unrecognised values count as wrong."""
        said = indices(captions, 1)
        return {name: _majority(getattr(self, name).cpu(), frames) == said[name][:, 0] for name in ATTRIBUTES}

    def identity_changed(self, reference: slice) -> dict[str, Bool[Tensor, "B F"]]:
        """Whether the size of each frame differs from that of most `reference` frames, and the texture from their mean direction by
        more than 22.5 degrees; unrecognised values count as changed.

        Of two unrelated videos 2/3 differ in size and 7/8 in texture.
        """
        size = self.size != _majority(self.size, reference)[:, None]
        alike = self.turned(reference) <= 22.5  # false where it is not a number
        return {"size": size | (self.size < 0), "texture": ~alike | (self.texture < 0)}

    def turned(self, reference: slice) -> Float[Tensor, "B F"]:
        """Degrees between the light of each frame and the mean direction of the `reference` frames, 0 to 180; 90 is chance."""
        chosen = torch.deg2rad(self.light[:, reference])
        if chosen.shape[1] == 0:
            raise ValueError(f"{reference} of {self.light.shape[1]} frames selects none")
        usual = torch.rad2deg(torch.atan2(chosen.sin().mean(dim=1), chosen.cos().mean(dim=1)))
        return ((self.light - usual[:, None] + 180) % 360 - 180).abs()

    def jump(self, captions: Sequence[Prompt]) -> Float[Tensor, "B F"]:
        """Cells between each position and that expected from the previous frame and the caption's motion; 0 for the first frame.

        Two unrelated frames are 3.1 apart on average.
        """
        expected = steps(captions, self.position.shape[1])[:, 1:].to(self.position)
        beyond = _wrap(self.position[:, 1:] - self.position[:, :-1] - expected).norm(dim=-1)
        return torch.cat([torch.zeros_like(self.residual[:, :1]), beyond], dim=1)


def _majority(values: Int[Tensor, "B F"], frames: slice) -> Int[Tensor, " B"]:
    chosen = values[:, frames]
    if chosen.shape[1] == 0:
        raise ValueError(f"{frames} of {values.shape[1]} frames selects none")
    return chosen.mode(dim=1).values


class _Nearest(NamedTuple):
    """The nearest value of each attribute and the relative distance to it; the other fields as in `StateReading`."""

    values: dict[str, Tensor]
    distances: dict[str, Tensor]
    position: Tensor
    light: Tensor
    residual: Tensor


def _nearest(latents: Latents) -> _Nearest:
    if latents.ndim != 5 or latents.shape[2:] != LATENT_SHAPE:
        raise ValueError(f"this world's latents are [B, F, {', '.join(map(str, LATENT_SHAPE))}], got {list(latents.shape)}")
    flat = latents.detach().flatten(2).double()
    norm = ELEMENTS**0.5
    outside, squares = flat, torch.zeros_like(flat[..., 0])
    values, distances, angles = {}, {}, {}
    for name, block in _blocks().items():
        points, basis = (part.to(flat.device) for part in block)
        seen = flat @ basis.T
        outside = outside - seen @ basis
        distance, values[name] = (seen[..., None, :] - points).norm(dim=-1).min(dim=-1)
        distances[name] = distance * len(DRAWN) ** 0.5 / norm
        squares = squares + distance.square()
        if name in ("x", "y", "texture"):
            angles[name] = torch.atan2(seen[..., 1], seen[..., 0]) / (2 * torch.pi)
    position = torch.stack([angles["x"], angles["y"]], dim=-1) * CELLS % CELLS
    light = 360 * angles["texture"] % 360
    residual = (squares + outside.square().sum(dim=-1)).sqrt() / norm
    return _Nearest(values, distances, position.float(), light.float(), residual.float())


def read(latents: Latents) -> StateReading:
    """The nearest value in each attribute's subspace; -1 where a frame or an attribute is far from all values.

    Raises:
        ValueError: when the latents are not `[B, F, 8, 4, 4]`.
    """
    near = _nearest(latents)
    known = near.residual <= UNSURE
    named = {name: torch.where(known & (near.distances[name] <= UNSURE), value, -1) for name, value in near.values.items()}
    place = torch.stack([named["x"], named["y"]], dim=-1)
    moved = (place[:, 1:] - place[:, :-1] + CELLS // 2) % CELLS - CELLS // 2
    match = (moved[..., None, :] == torch.tensor(list(MOTIONS.values()), device=place.device)).all(dim=-1)
    seen = match.any(dim=-1) & (place[:, 1:] >= 0).all(dim=-1) & (place[:, :-1] >= 0).all(dim=-1)
    motion = torch.where(seen, match.long().argmax(dim=-1), -1)
    first = motion[:, :1] if motion.shape[1] else torch.full_like(named["x"], -1)
    return StateReading(**named, motion=torch.cat([first, motion], dim=1), position=near.position, light=near.light, residual=near.residual)


def to_images(latents: Latents) -> Tensor:
    """The nearest state of each frame as rendered by the pixel world, with the texture as the direction of the light.

    uint8 `[B, F, 3, 64, 64]`; the farther a frame is from every state, the greyer.
    """
    near = _nearest(latents)
    state = {name: value.flatten().tolist() for name, value in near.values.items()}
    captioned = zip(*([ATTRIBUTES[name][v] for v in state[name]] for name in ("shape", "color", "background")), strict=True)
    state["texture"] = [round(value * LIGHTS / TURN) % LIGHTS for value in state["texture"]]
    identity = zip(*(state[name] for name in ("size", "x", "y", "texture")), strict=True)
    scenes = [Captioned(*words, motion="still") for words in captioned]
    drawn = render(scenes, [Identity(RADII[size], LATTICE * x, LATTICE * y, light) for size, x, y, light in identity], 1)
    sure = (1 - near.residual).nan_to_num(0.0).clamp(0, 1).cpu()[..., None, None, None]
    return torch.lerp(torch.full((), 127.5), drawn.float().view(*sure.shape[:2], 3, SIZE, SIZE), sure).round().to(torch.uint8)


@lru_cache(maxsize=4)
def _words(text_dim: int) -> dict[str, Float[Tensor, "V E"]]:
    generator = torch.Generator().manual_seed(_SEED)
    return {name: torch.randn(len(values), text_dim, generator=generator) for name, values in ATTRIBUTES.items()}


def text_of(captions: Sequence[Captioned], text_len: int = TEXT_LEN, text_dim: int = TEXT_DIM) -> Text:
    """Embeddings of captions `[B, L, E]`: a fixed random token for the value of each attribute, the other tokens 0."""
    if text_len < len(ATTRIBUTES):
        raise ValueError(f"{text_len} tokens cannot hold the {len(ATTRIBUTES)} attributes of a caption; text_len must be at least as many")
    text = torch.zeros(len(captions), text_len, text_dim)
    for token, (name, said) in enumerate(indices(captions, 1).items()):
        text[:, token] = _words(text_dim)[name][said[:, 0]]
    return text


def negative(batch: int, text_len: int = TEXT_LEN, text_dim: int = TEXT_DIM) -> Text:
    """The embedding of empty text: zeros `[B, L, E]`."""
    return torch.zeros(batch, text_len, text_dim)


def captions_of(text: Text) -> list[Captioned | None]:
    """The captions given to `text_of`, by nearest token; None for a row of zeros (`negative`).

    Raises:
        ValueError: when a row is neither.
    """
    text = text.detach().float().cpu()
    chosen, far = [], torch.zeros(len(text))
    for token, (name, values) in enumerate(ATTRIBUTES.items()):
        words = _words(text.shape[-1])[name]
        distance, place = (text[:, token, None] - words).norm(dim=-1).min(dim=-1)
        far = torch.maximum(far, distance / words[place].norm(dim=-1))
        chosen.append([values[i] for i in place.tolist()])
    empty = (text == 0).all(dim=2).all(dim=1)
    unknown = (~empty & (far > 0.1)).nonzero().flatten().tolist()
    if unknown:
        raise ValueError(f"text rows {unknown} are not captions of the state world; make them with text_of or negative")
    return [None if none else Captioned(*words) for none, words in zip(empty.tolist(), zip(*chosen, strict=True), strict=True)]
