"""ODE pairs of a flow that is known exactly; regression in one pass is the block loop; flow matching of a perfect network is 0."""

from types import SimpleNamespace

import pytest
import torch

from longlive.cache.window import Window
from longlive.generation.caches import history_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import Euler
from longlive.training.flow_matching import FlowMatching
from longlive.training.ode import ODERegression, trajectory

TIMESTEPS = [1000.0, 937.5, 833.3333, 625.0]


def gaussian(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_trajectory_to_one_known_clip_is_a_straight_line():
    """Where all data is the clip in `text`, the flow is (x_t - clip) / sigma, and Euler's method makes no error."""
    noise, clip, asked = gaussian(0, 2, 3, 4, 4, 4), gaussian(1, 2, 3, 4, 4, 4), []

    def teacher(x, t, text):
        asked.append(t)
        return SimpleNamespace(velocity=(x - text) / (t / 1000))

    states = trajectory(teacher, noise, clip, num_steps=48, keep=[0, 12, 24, 36, 48], shift=5.0)
    assert states.shape == (2, 5, 3, 4, 4, 4) and len(asked) == 48
    assert [asked[number] for number in (0, 12, 24, 36)] == pytest.approx(TIMESTEPS, abs=1e-3)
    for state, t in zip(states.unbind(1), [*TIMESTEPS, 0.0]):
        torch.testing.assert_close(state, (1 - t / 1000) * clip + t / 1000 * noise, atol=1e-5, rtol=0)
    assert torch.equal(trajectory(teacher, noise, clip, keep=[48, 0], shift=5.0), states[:, [4, 0]])
    with pytest.raises(ValueError, match=r"states \[0, 49\] are not all on a trajectory of 48 steps"):
        trajectory(teacher, noise, clip, keep=[0, 49])


def test_a_trajectory_of_a_linear_flow_is_a_product_of_steps():
    """Of flow = a x every Euler step from sigma to sigma' multiplies by 1 + a (sigma' - sigma)."""
    noise, a = gaussian(2, 1, 2, 3, 2, 2), 0.7
    linear = lambda x, t, text: SimpleNamespace(velocity=a * x)  # noqa: E731
    states = trajectory(linear, noise, gaussian(3, 1, 5, 8), num_steps=4, keep=range(5), shift=3.0)
    sigma = [3 * u / (1 + 2 * u) for u in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    factor = 1.0
    for number in range(5):
        torch.testing.assert_close(states[:, number], factor * noise, atol=1e-6, rtol=1e-6)
        if number < 4:
            factor *= 1 + a * (sigma[number + 1] - sigma[number])
    assert factor < 0.6


@pytest.mark.parametrize("clean_history", [True, False], ids=["clean", "noisy"])
@pytest.mark.parametrize("window", [Window(3, 6), Window(0, 6), Window(3, 12)], ids=str)
def test_regression_in_one_pass_equals_the_block_loop(model, window, clean_history):
    """Blocks at levels of their own, seeing through the cache the ends of the blocks before them, or their noisy states."""
    model.requires_grad_(False)
    states, text = gaussian(4, 2, 5, 15, 4, 4, 4), gaussian(5, 2, 5, 8)
    chosen = torch.tensor([[0, 3, 1, 2, 3], [2, 0, 0, 1, 3]])
    objective = ODERegression(model, block=3, window=window, timesteps=TIMESTEPS, clean_history=clean_history)
    loss = objective(states, text, chosen=chosen)

    rollout, squares = Rollout(Denoiser(model), history_cache(model, 4, 4, window=window, batch=2), Euler([1000.0])), []
    for block in range(5):
        part = slice(3 * block, 3 * block + 3)
        noisy = torch.stack([states[row, chosen[row, block], part] for row in range(2)])
        end = states[:, -1, part]
        t = torch.tensor(TIMESTEPS)[chosen[:, block], None].expand(-1, 3)
        found = rollout.denoiser(noisy, t, text, rollout.cache.view(range(part.start, part.stop))).x0
        squares.append((found - end).square())
        if clean_history:
            rollout.remember(end, text)
        else:
            with rollout.cache.record(range(part.start, part.stop)) as view:
                model(noisy, t, text, view)
    torch.testing.assert_close(loss, torch.stack(squares).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [3, 9])
def test_regression_of_a_perfect_network_is_zero_and_carries_gradients(model, frames):
    states, text = gaussian(6, 1, 5, frames, 4, 4, 4), gaussian(7, 1, 5, 8)
    offset = torch.zeros((), requires_grad=True)

    class Perfect:
        config, rope = model.config, model.rope

        def __call__(self, x, t, text, view):
            x, t = x[:, -frames:], t[:, -frames:, None, None, None] / 1000
            velocity = (x - states[:, -1] - offset) / t
            return torch.cat([torch.full((1, len(view.rotation.cos) // 4 - frames, 4, 4, 4), torch.nan), velocity], 1)

    chosen = torch.arange(frames // 3).view(1, -1)
    for clean_history in (True, False):
        objective = ODERegression(Perfect(), block=3, window=Window(3, 6), timesteps=TIMESTEPS, clean_history=clean_history)
        assert objective(states, text, chosen=chosen) < 1e-10
        with torch.no_grad():
            offset.fill_(0.5)
        loss = objective(states, text, chosen=chosen)
        (gradient,) = torch.autograd.grad(loss, offset)
        assert loss.item() == pytest.approx(0.25, abs=1e-5) and gradient.item() == pytest.approx(1.0, abs=1e-5)
        with torch.no_grad():
            offset.zero_()
        with pytest.raises(ValueError, match="trajectories of 4 states do not fit 4 timesteps and the end"):
            objective(states[:, :4], text, chosen=chosen)


def test_flow_matching_of_a_perfect_network_is_zero():
    """It knows the clips and must be shown them mixed with the noise at the level it is told."""
    clip, noise, text = gaussian(8, 2, 3, 4, 4, 4), gaussian(9, 2, 3, 4, 4, 4), gaussian(10, 2, 5, 8)
    t = torch.tensor([250.0, 900.0])
    offset = torch.zeros((), requires_grad=True)

    def network(x, levels, words):
        assert torch.equal(levels, t[:, None].expand(2, 3)) and words is text
        return (x - clip) / (levels[..., None, None, None] / 1000) + offset

    assert FlowMatching(network)(clip, text, t=t, noise=noise) < 1e-10
    with torch.no_grad():
        offset.fill_(0.5)
    loss = FlowMatching(network)(clip, text, t=t, noise=noise)
    loss.backward()
    assert loss.item() == pytest.approx(0.25, abs=1e-5) and offset.grad.item() == pytest.approx(1.0, abs=1e-5)
