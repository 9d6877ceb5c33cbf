"""Both losses of DMD, number by number in float64, from the formulas of their docstrings."""

from types import SimpleNamespace

import pytest
import torch

from longlive.training.dmd import DMD

B, F, SHAPE = 2, 3, (2, 3, 4, 2, 2)
T = torch.tensor([[980.0] * F, [250.0] * F])


def gaussian(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Says:
    """A score that answers what it was told to, in turn, and writes down what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, noisy, t, text):
        self.asked.append((noisy, t, text, torch.is_grad_enabled()))
        answer = self.answers.pop(0)
        return SimpleNamespace(x0=answer, velocity=answer)


CLIP, NOISE = gaussian(*SHAPE, seed=0), gaussian(*SHAPE, seed=1)
TEXT, NEGATIVE = gaussian(B, 5, 8, seed=2), gaussian(B, 5, 8, seed=3)
NOISY = torch.stack([(1 - t / 1000) * x + t / 1000 * n for x, n, t in zip(CLIP, NOISE, (980.0, 250.0))])


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 1.5}, {"guidance_scale": 3.0, "guidance_rescale": 0.7}], ids=str)
@pytest.mark.parametrize("fresh", [None, torch.tensor([[False, False, True], [False, True, True]])], ids=["all", "fresh"])
def test_the_generator_loss_by_hand(guided, fresh):
    with_text, without, fake = (gaussian(*SHAPE, seed=seed) for seed in (4, 5, 6))
    teacher, critic = Says(with_text, without), Says(fake)
    clip = CLIP.clone().requires_grad_()
    found = DMD(teacher, critic, **guided).generator_loss(clip, TEXT, NEGATIVE, t=T, noise=NOISE, fresh=fresh)

    scale, phi = guided.get("guidance_scale", 4.0), guided.get("guidance_rescale", 0.0)
    gradient = torch.empty(SHAPE, dtype=torch.float64)
    for n in range(B):
        conditional, unconditional, x = with_text[n].double(), without[n].double(), CLIP[n].double()
        real = unconditional + scale * (conditional - unconditional)
        real = phi * real * conditional.norm() / real.norm() + (1 - phi) * real
        gradient[n] = (fake[n].double() - real) / (x - real).abs().mean()
    torch.testing.assert_close(found.gradient.double(), gradient, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.noisy, NOISY, atol=1e-6, rtol=0)

    counted = torch.ones(B, F, dtype=torch.bool) if fresh is None else fresh
    assert found.loss.item() == pytest.approx(0.5 * gradient[counted].square().mean().item(), rel=1e-5)
    found.loss.backward()
    expected = torch.where(counted[..., None, None, None], gradient / gradient[counted].numel(), 0)
    torch.testing.assert_close(clip.grad.double(), expected, atol=1e-7, rtol=1e-5)

    for asked, text in (*zip(teacher.asked, (TEXT, NEGATIVE), strict=True), *zip(critic.asked, (TEXT,), strict=True)):
        assert torch.equal(asked[0], found.noisy) and torch.equal(asked[1], T) and asked[2] is text
        assert not asked[3]  # what the scores compute is not kept for a backward pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_differences_are_taken_in_float32(dtype):
    answers = [gaussian(*SHAPE, seed=seed).to(dtype) for seed in (7, 8, 9, 10, 11)]
    clip, with_text, without, fake, noise = answers
    found = DMD(Says(with_text, without), Says(fake)).generator_loss(clip, TEXT, NEGATIVE, t=T, noise=noise)
    real = with_text.float() + 3.0 * (with_text.float() - without.float())
    scale = (clip.float() - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert found.gradient.dtype == torch.float32 and torch.equal(found.gradient, (fake.float() - real) / scale)
    loss = DMD(Says(), Says(fake)).critic_loss(clip, TEXT, t=T, noise=noise)
    assert loss.dtype == torch.float32 and torch.equal(loss, (fake.float() - (noise.float() - clip.float())).square().mean())


def test_what_is_not_a_number_is_no_gradient():
    same = DMD(Says(CLIP, CLIP), Says(CLIP)).generator_loss(CLIP, TEXT, NEGATIVE, t=T, noise=NOISE)  # 0 / 0
    assert same.loss == 0 and not same.gradient.any()


def test_a_small_gradient_is_not_lost_in_the_clip():
    """x - stopgrad(x - g) in float32 would round g to the spacing of numbers near x."""
    clip, real = torch.full(SHAPE, 1000.0), torch.full(SHAPE, 1003.0)  # g = 2^-10 / 3, which float32 cannot subtract
    found = DMD(Says(real, real), Says(real + 1e-3)).generator_loss(clip, TEXT, NEGATIVE, t=T, noise=NOISE)
    assert found.loss.item() == pytest.approx(0.5 * found.gradient.double().square().mean().item(), rel=1e-6)
    assert found.loss > 0


@pytest.mark.parametrize("fresh", [None, torch.tensor([[False, False, True], [False, True, True]])], ids=["all", "fresh"])
def test_the_critic_loss_by_hand(fresh):
    said, clip = gaussian(*SHAPE, seed=10).requires_grad_(), CLIP.clone().requires_grad_()
    critic = Says(said)
    loss = DMD(Says(), critic).critic_loss(clip, TEXT, t=T, noise=NOISE, fresh=fresh)
    squares = (said.detach().double() - (NOISE.double() - CLIP.double())).square()
    assert loss.item() == pytest.approx((squares if fresh is None else squares[fresh]).mean().item(), rel=1e-5)
    (noisy, t, text, learns), *others = critic.asked
    torch.testing.assert_close(noisy, NOISY, atol=1e-6, rtol=0)
    assert torch.equal(t, T) and text is TEXT and learns and not others
    loss.backward()
    assert said.grad.any() and clip.grad is None and not noisy.requires_grad


def test_timesteps_are_shifted_and_clamped_at_both_ends():
    drawn = torch.tensor([[0.0, 1.0, 500.0, 999.0]])
    assert DMD(Says(), Says()).timesteps(drawn)[0].tolist() == pytest.approx([20, 20, 833.33333, 980])
    assert DMD(Says(), Says(), shift=1.0, min_t=0.0, max_t=700.0).timesteps(drawn)[0].tolist() == pytest.approx([0, 1, 500, 700])
    assert DMD(Says(), Says(), shift=3.0, max_t=1000.0).timesteps(drawn)[0, 2:].tolist() == pytest.approx([750, 999.66656])


def test_one_timestep_per_sample_from_all_thousand():
    dmd, many = DMD(Says(), Says(), shift=1.0, min_t=0.0, max_t=1000.0), torch.empty(20_000, F, 1, 1, 1)
    t = dmd.draw_timesteps(many, torch.Generator().manual_seed(0))
    assert t.shape == (20_000, F) and (t == t[:, :1]).all() and t.dtype == torch.float32
    assert t[:, 0].round().unique().tolist() == list(range(1000))
    assert torch.equal(t, dmd.draw_timesteps(many, torch.Generator().manual_seed(0)))
    assert dmd.draw_timesteps(torch.empty(2, F, 1, 1, 1, device="meta"), torch.Generator()).device.type == "meta"
