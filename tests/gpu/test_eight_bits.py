"""Linear layers and the ring in 8 bits on a GPU: the instructions there compute what fake quantisation in float64 does."""

import pytest
import torch
from torch import nn

from longlive.cache.quantised import QuantisedRing
from longlive.cache.window import Window
from longlive.engine.linears import KINDS, QuantisedLinear
from longlive.ops import eight_bits
from longlive.ops.attention import BACKENDS
from longlive.ops.rope import Rope

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
SHAPES = [(4680, 1536, 8960), (512, 8960, 1536), (1, 1536, 1536), (16, 40, 24), (33, 1030, 19)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_equals_the_one_on_the_cpu(kind, shape, compiled):
    try:
        eight_bits.check_device(kind, DEVICE)
    except ValueError as reason:
        pytest.skip(str(reason))
    torch.manual_seed(0)
    m, k, o = shape
    x, layer = torch.randn(2, m, k).bfloat16()[:1], QuantisedLinear(nn.Linear(k, o), kind)
    wanted = layer(x.float())
    layer.to(DEVICE)
    found = (torch.compile(layer, fullgraph=True) if compiled else layer)(x.to(DEVICE))
    assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
    assert (found.cpu().float() - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("relative", [False, True])
@torch.no_grad()
def test_the_ring_equals_the_one_on_the_cpu(kind, relative):
    found, generator = [], torch.Generator().manual_seed(0)
    made = torch.randn(6, 3, 2, 3 * 12, 4, 32, generator=generator)
    for device in ("cpu", DEVICE):
        rope = Rope(3, 4, 32, device=device)
        ring = QuantisedRing(num_layers=1, batch=2, num_heads=4, rope=rope, window=Window(3, 6), kind=kind, relative=relative)
        for start, (q, k, v) in zip(range(0, 18, 3), made.to(device)):
            with ring.record(range(start, start + 3)) as view:
                out = view.at(0).attend(q, k, v, BACKENDS["sdpa"])
        found.append(out.cpu())
    torch.testing.assert_close(found[1], found[0], atol=2e-2, rtol=0)  # a value on the edge between two roundings may fall to either
