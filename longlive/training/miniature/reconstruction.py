"""The reconstruction loss of the miniature world: the subject counts more than the background, and its edge most.

All on a torus, like the world. Knows no network.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import max_pool3d, pad

from longlive.types import Images

LEAST_CONTRAST = 0.1  # of images in [-1, 1]; no subject of this world has less


class Regions(NamedTuple):
    """The subject of an image, its edge (two pixels wide), and its contrast with the background."""

    subject: Bool[Tensor, "B 1 T H W"]
    edge: Bool[Tensor, "B 1 T H W"]
    contrast: Float[Tensor, "B 1 T 1 1"]


def regions(images: Images) -> Regions:
    """The background is an image's median; the subject, the pixels more than 0.1 from it; its contrast, their root mean square distance."""
    distance = images - images.flatten(3).median(dim=-1).values[..., None, None]
    subject = distance.abs().amax(1, keepdim=True) > 0.1
    inside = subject.float()
    grown, shrunk = (max_pool3d(pad(sign * inside, (1, 1, 1, 1, 0, 0), mode="circular"), (1, 3, 3), stride=1) for sign in (1, -1))
    square = (inside * distance.square()).sum((1, 3, 4), keepdim=True) / (3 * inside.sum((1, 3, 4), keepdim=True)).clamp(min=1)
    return Regions(subject, grown + shrunk > 0, square.sqrt().clamp(min=LEAST_CONTRAST))


def reconstruction_loss(
    decoded: Images, images: Images, *, subject_weight: float, edge_weight: float, gradient_weight: float
) -> Float[Tensor, ""]:
    """Weighted mean of |e| + e^2, and `gradient_weight` times that of |e's difference between neighbours, right and below|.

    e is the error in units of the image's contrast: a pixel on the wrong side of an edge has an error of about one half, on gray as on
    black. Weights of pixels are 1, or `subject_weight` on the subject, plus `edge_weight` on its edge; of differences 1 + `edge_weight`.
    """
    where = regions(images)
    edge = edge_weight * where.edge.float()
    weight = 1 + (subject_weight - 1) * where.subject.float() + edge
    error = (decoded - images) / where.contrast
    value = (weight * (error.abs() + error.square())).mean() / weight.mean()
    differences = sum((error - error.roll(-1, axis)).abs() for axis in (-1, -2))
    return value + gradient_weight * ((1 + edge) * differences).mean() / (2 * (1 + edge).mean())
