"""Rotary embedding against complex numbers."""

import pytest
import torch

from longlive.ops.rope import Rope, near_again, rope_for, rotate
from longlive.types import Rotation


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_rotation_equals_complex_numbers(theta):
    d, (frames, height, width) = 20, (4, 3, 2)
    rope = Rope(height, width, d) if theta == 10000.0 else rope_for(height, width, d, theta, torch.device("cpu"))
    rope = rope.at(range(5, 5 + frames))
    x = torch.randn(2, frames * height * width, 3, d)
    side = 2 * (d // 6)
    for token in range(frames * height * width):
        place = (5 + token // (height * width), token // width % height, token % width)
        angles = [p / theta ** (2 * i / w) for p, w in zip(place, (d - 2 * side, side, side)) for i in range(w // 2)]
        z = torch.view_as_complex(x[:, token].double().unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones(d // 2).double(), torch.tensor(angles).double()
        )
        torch.testing.assert_close(rotate(x, rope)[:, token].double(), torch.view_as_real(z).flatten(-2), atol=1e-5, rtol=0)


def test_a_time_shift_moves_keys_and_only_differences_matter():
    q, k = torch.randn(1, 6, 2, 24), torch.randn(1, 6, 2, 24)
    rope = Rope(2, 3, 24)
    at = lambda frame: rope.at((frame,))  # noqa: E731
    torch.testing.assert_close(rotate(rotate(k, at(7)), rope.time_shift(100_000)), rotate(k, at(100_007)), atol=1e-4, rtol=0)
    near, far = ((rotate(q, at(f + 3)) * rotate(k, at(f))).sum() for f in (0, 1_000_000))
    torch.testing.assert_close(near, far, atol=1e-3, rtol=0)


def test_rope_works_under_autograd_wherever_it_was_made_and_keeps_the_dtype():
    rope_for.cache_clear()
    with torch.inference_mode():
        rope = rope_for(2, 3, 12, 10000.0, torch.device("cpu"))
        turned = rope.at((4, 5))
    assert (rope.rows, rope.columns) == (2, 3) and rope_for(2, 3, 12, 10000.0, torch.device("cpu")) is rope
    for rotation in (turned, rope.at((4, 5)), rope.at((4,))):
        x = torch.randn(1, rotation.cos.shape[0], 2, 12, requires_grad=True)
        rotate(x, rotation).sum().backward()
        assert x.grad.any()
    half = torch.randn(1, 12, 2, 12).bfloat16()
    assert torch.equal(rotate(half, turned), rotate(half.float(), turned).bfloat16())


def test_the_gradient_of_a_rotation_is_the_rotation_back_rounded_once():
    x, incoming = torch.randn(2, 1, 12, 2, 12).bfloat16().unbind()
    x, (cos, sin) = x.requires_grad_(), Rope(2, 3, 12).at((4, 5))
    rotate(x, Rotation(cos, sin)).backward(incoming)
    assert torch.equal(x.grad, rotate(incoming.float(), Rotation(cos, -sin)).bfloat16())


def test_rope_is_made_on_its_device_in_float32():
    rope = rope_for(2, 3, 12, 10000.0, torch.device("meta"))
    assert {(part.device.type, part.dtype) for part in (*rope.at((0, 1)), *rope.time_shift(3))} == {("meta", torch.float32)}
    assert rope.at((0, 1)).cos.shape == (12, 6) and rope.time_shift(3).sin.shape == (1, 6)


def test_distances_at_which_wans_frames_look_near_again():
    """The lengths at which LoL (arXiv 2601.16914) sees the sink take the picture over: no weights are needed to say them."""
    assert near_again(128, beyond=120, up_to=240) == [132, 201]
