"""Noise levels and what is computed from them, against formulas written out in numpy or in another precision."""

import numpy as np
import pytest
import torch

from longlive.ops import flow_matching as fm

SHAPE = (2, 3, 4, 2, 2)
T = torch.tensor([[1000.0, 500.0, 1.0], [20.0, 333.0, 980.0]])


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sigma_of(t, dtype):
    return (t / 1000).to(dtype)[:, :, None, None, None]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_training_weights_are_a_bell_around_500(shift):
    u = 1 - np.arange(1000) / 1000
    t = 1000 * shift * u / (1 + (shift - 1) * u)
    bell = np.exp(-2 * ((t - 500) / 1000) ** 2)
    expected = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    found = fm.training_weights(shift)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    assert found.min() == 0 and abs(t[found.argmax()] - 500) < 2


def test_steps_are_warped_by_the_shift_and_must_fall_from_1000():
    assert fm.warp_steps([1000, 750, 500, 250, 0], 5.0) == pytest.approx([1000, 937.5, 833.33333, 625, 0], abs=1e-3)
    assert fm.warp_steps([800], 1.0) == pytest.approx([800])
    for steps, words in (
        ([], "must lie in 0..1000"),
        ([1000.5], "must lie"),
        ([500, -1], "must lie"),
        ([500, 500], "must be decreasing"),
        ([1, 2], "must be decreasing"),
    ):
        with pytest.raises(ValueError, match=words):
            fm.warp_steps(steps, 5.0)


def test_the_nearest_timestep_is_that_of_the_table():
    table = 1000 * fm.sigmas(5.0)
    t = torch.tensor([[999.9, 500.0, 3.0], [120.0, 0.0, 731.0]])
    found = fm.nearest_timestep(t, 5.0)
    for one, nearest in zip(t.flatten(), found.flatten(), strict=True):
        assert nearest == min(table, key=lambda entry: abs(entry - one))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_is_added_in_float32_and_returned_in_the_dtype_of_the_noise(dtype):
    x0, noise = gaussian(*SHAPE, seed=1, dtype=dtype), gaussian(*SHAPE, seed=2, dtype=dtype)
    sigma = sigma_of(T, torch.float32)
    expected = ((1 - sigma) * x0.float() + sigma * noise.float()).to(dtype)
    for t in (T, T.double()):
        found = fm.add_noise(x0, noise, t)
        assert found.dtype == dtype and torch.equal(found, expected)
    assert fm.add_noise(x0, noise.float(), T).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversions_are_computed_in_float64(dtype):
    """Not a bit is lost on the way: equal to numpy's float64, rounded once."""
    a, b = gaussian(*SHAPE, seed=3, dtype=dtype), gaussian(*SHAPE, seed=4, dtype=dtype)
    sigma, x, y = (tensor.double().numpy() for tensor in (sigma_of(T, torch.float32), a, b))
    for function, expected in (
        (fm.x0_from_velocity, y - sigma * x),
        (fm.noise_from_velocity, y + (1 - sigma) * x),
        (fm.velocity_from_x0, (y - x) / sigma),
    ):
        found = function(a, b, T)
        assert found.dtype == dtype and torch.equal(found, torch.from_numpy(expected).to(dtype)), function.__name__
        assert function(a, b.double(), T).dtype == dtype


def test_timesteps_may_lie_on_the_host():
    """Latents on a device that computes nothing: a tensor on another one would be refused."""
    latents = torch.empty(SHAPE, device="meta")
    for function in (fm.add_noise, fm.x0_from_velocity, fm.noise_from_velocity, fm.velocity_from_x0):
        assert function(latents, latents, T).device.type == "meta"
    assert fm.nearest_timestep(T.to("meta"), 5.0).shape == T.shape
