"""Every attention backend that can run here computes the same attention."""

import math

import pytest
import torch

from longlive.ops import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
TOKENS = 1560  # of a frame at 480 x 832
EXACT = [name for name in attention.BACKENDS if name not in ("fa3-fp8", "sage")]
EIGHT_BITS = {"fa3-fp8": 0.15, "sage": 0.06}  # fake quantisation of these queries gives 0.09 and 0.033
SHAPES = {
    "first block": (3 * TOKENS, 3 * TOKENS),
    "full ring": (3 * TOKENS, 12 * TOKENS),
    "recache": (9 * TOKENS, 12 * TOKENS),
    "prompt": (3 * TOKENS, 512),
}


def heads(length, *, scale=1.0, seed=0, batch=1, num_heads=12, width=128):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, length, num_heads, width, generator=generator)).to(DEVICE, torch.bfloat16)


def exact(q, k, v, chunk=256):
    """Attention by its formula in float32, some queries at a time."""
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    weights = ((part @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) for part in q.split(chunk, dim=2))
    return torch.cat([weight @ v for weight in weights], dim=2).transpose(1, 2)


def relative_error(ours, wanted):
    return ((ours.float() - wanted).norm() / wanted.norm()).item()


def usable(name, dtype=torch.bfloat16):
    if reason := attention._why_not(name, DEVICE, dtype):
        pytest.skip(reason)
    return attention.choose(name, DEVICE, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EXACT)
def test_backend_is_the_formula(name, shape):
    """Large queries make attention peaked: an average over thousands of keys would hide what is wrong."""
    attend = usable(name)
    num_queries, num_keys = SHAPES[shape]
    q, k, v = heads(num_queries, scale=3.0, seed=1), heads(num_keys, seed=2), heads(num_keys, seed=3)
    picked = torch.arange(0, num_queries, 37, device=DEVICE)  # the formula costs too much for all queries
    wanted = exact(q[:, picked], k, v)
    ours = attend(q, k, v, None)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    assert relative_error(ours[:, picked], wanted) < 1e-2
    without_last = exact(q[:, picked], k[:, : -TOKENS // 4], v[:, : -TOKENS // 4])
    assert relative_error(without_last, wanted) > 2e-2  # so much would fewer keys change


@pytest.mark.parametrize("name", EXACT)
def test_backend_takes_a_part_of_a_ring(name):
    """Keys as a ring gives them while it fills: a slice of a longer buffer, for two videos."""
    attend = usable(name)
    q, k, v = (heads(length, seed=seed, batch=2, scale=scale) for length, seed, scale in ((96, 1, 3.0), (512, 2, 1.0), (512, 3, 1.0)))
    wanted = exact(q, k[:, :200], v[:, :200])
    assert relative_error(attend(q, k[:, :200], v[:, :200], None), wanted) < 1e-2
    assert relative_error(exact(q, k, v), wanted) > 0.1  # so much would the rest of the buffer change


@pytest.mark.parametrize("name", attention.BACKENDS)
def test_a_mask_is_obeyed(name):
    attend = usable(name)
    q, k, v = heads(64, seed=1), heads(128, seed=2), heads(128, seed=3)
    mask = torch.zeros(64, 128, dtype=torch.bool, device=DEVICE)
    mask[:, :80] = True
    assert relative_error(attend(q, k, v, mask), exact(q, k[:, :80], v[:, :80])) < 1e-2


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_8_bits_are_near_the_formula(name):
    attend = usable(name)
    q, k, v = heads(512, scale=3.0, seed=1), heads(4096, seed=2) + 2.0, heads(4096, seed=3)
    ours, wanted = attend(q, k, v, None), exact(q, k, v)
    assert ours.shape == q.shape and ours.dtype == q.dtype
    assert relative_error(ours, wanted) < EIGHT_BITS[name] < relative_error(exact(q, k[:, :3072], v[:, :3072]), wanted)


def test_auto_is_the_fastest_that_runs():
    chosen = attention.choose("auto", DEVICE, torch.bfloat16)
    order = [name for name in ("fa3", "cudnn", "fa2", "sdpa") if attention._why_not(name, DEVICE, torch.bfloat16) is None]
    assert chosen is attention.BACKENDS[order[0]]
    assert attention.choose("auto", DEVICE, torch.float32) is attention.BACKENDS["sdpa"]
