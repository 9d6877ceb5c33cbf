"""Which attention backend is chosen where, and that each is called as it wants to be; those that need a GPU are in `tests/gpu`."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from longlive.ops import attention
from longlive.ops.rope import Rope

CPU, CUDA, HALF = torch.device("cpu"), torch.device("cuda"), torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """A machine of a compute capability on which some modules are installed."""

    def pretend(major, *modules, cudnn=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: cudnn)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: True if name in modules else None)

    return pretend


@pytest.mark.parametrize(
    ("major", "modules", "cudnn", "chosen"),
    [
        (9, ["flash_attn_interface", "flash_attn"], True, "fa3"),
        (9, ["flash_attn"], True, "cudnn"),
        (9, ["flash_attn"], False, "fa2"),
        (9, [], False, "sdpa"),
        (10, ["flash_attn_interface", "flash_attn"], True, "cudnn"),
        (8, ["flash_attn_interface", "flash_attn"], True, "fa2"),
        (8, [], True, "sdpa"),
    ],
)
def test_the_fastest_that_runs_is_chosen(machine, caplog, major, modules, cudnn, chosen):
    machine(major, *modules, cudnn=cudnn)
    caplog.set_level(logging.INFO)
    for dtype in (torch.bfloat16, torch.float16):
        assert attention.choose("auto", CUDA, dtype) is attention.BACKENDS[chosen]
    assert attention.choose(chosen, CUDA, HALF) is attention.BACKENDS[chosen]
    assert attention.choose("auto", CUDA, torch.float32) is attention.choose("auto", CPU, HALF) is attention.BACKENDS["sdpa"]
    assert f"attention backend: {chosen}" in caplog.text


@pytest.mark.parametrize("name", ["cudnn", "fa2"])
def test_an_ampere_gpu_is_enough_for(machine, name):
    machine(8, "flash_attn")
    assert attention.choose(name, CUDA, HALF) is attention.BACKENDS[name]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "major", "modules", "cudnn", "reason"),
    [
        ("fa3", CPU, HALF, 9, ["flash_attn_interface"], True, "it needs a CUDA device, this is cpu"),
        ("fa3", CUDA, torch.float32, 9, ["flash_attn_interface"], True, r"it needs bfloat16 or float16, this is torch\.float32"),
        ("fa3", CUDA, HALF, 8, ["flash_attn_interface"], True, "for Hopper"),
        ("fa3", CUDA, HALF, 9, ["flash_attn"], True, "module 'flash_attn_interface' is not installed"),
        ("fa2", CUDA, HALF, 8, ["flash_attn_interface"], True, "module 'flash_attn' is not installed"),
        ("cudnn", CUDA, HALF, 7, [], True, r"compute capability 8\.0 or more"),
        ("cudnn", CUDA, HALF, 9, [], False, r"it needs cuDNN"),
        ("fa2", CUDA, HALF, 7, ["flash_attn"], True, r"compute capability 8\.0 or more"),
        ("fa3-fp8", CUDA, HALF, 10, ["flash_attn_interface"], True, "for Hopper"),
        ("fa3-fp8", CUDA, HALF, 9, ["flash_attn"], True, "module 'flash_attn_interface' is not installed"),
        ("sage", CPU, HALF, 9, ["sageattention"], True, "it needs a CUDA device, this is cpu"),
        ("sage", CUDA, HALF, 7, ["sageattention"], True, r"SageAttention needs compute capability 8\.0 or more"),
        ("sage", CUDA, HALF, 9, [], True, "module 'sageattention' is not installed"),
    ],
)
def test_why_a_backend_cannot_run(machine, name, device, dtype, major, modules, cudnn, reason):
    machine(major, *modules, cudnn=cudnn)
    with pytest.raises(ValueError, match=f"'{name}' cannot be used: .*{reason}.*; choose auto"):
        attention.choose(name, device, dtype)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'flash' is unknown; choose auto, sdpa, cudnn, fa2, fa3, fa3-fp8, sage"):
        attention.choose("flash", CPU, torch.float32)


def heads():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 3, 8, generator=random) for length in (4, 6, 6)]


MASK = torch.tril(torch.ones(4, 6, dtype=torch.bool), 2)


def by_hand(q, k, v, mask):
    scores = torch.einsum("bnad,bkad->bank", q, k) / math.sqrt(8)
    return torch.einsum("bank,bkad->bnad", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("mask", [None, MASK[:, :4]], ids=["bidirectional", "causal"])
def test_a_sequence_without_a_past_attends_to_itself_through_its_mask(mask):
    rope = Rope(2, 2, 8).at((0,))
    view = attention.SequenceView(rope) if mask is None else attention.SequenceView(rope, mask)
    q, k, v = (part[:, :4] for part in heads())
    expected = by_hand(q, k, v, torch.ones(4, 4, dtype=torch.bool) if mask is None else mask)
    assert view.rotation is rope
    for layer in (0, 1):
        torch.testing.assert_close(view.at(layer).attend(q, k, v, attention.BACKENDS["sdpa"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", attention.BACKENDS)
def test_with_a_mask_every_backend_is_torchs_own(name):
    q, k, v = heads()
    torch.testing.assert_close(attention.BACKENDS[name](q, k, v, MASK), by_hand(q, k, v, MASK), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "module", "pair"),  # FlashAttention 3 has returned the output alone and with the log-sum-exp
    [("fa2", "flash_attn", False), ("fa3", "flash_attn_interface", False), ("fa3", "flash_attn_interface", True)],
)
def test_flash_attention_is_given_heads_as_they_are(monkeypatch, name, module, pair):
    q, k, v = heads()
    out = torch.randn(q.shape)

    def flash_attn_func(*arguments):
        assert all(given is wanted for given, wanted in zip(arguments, (q, k, v), strict=True))
        return (out, None) if pair else out

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    assert attention.BACKENDS[name](q, k, v, None) is attention.BACKENDS[name](q, k, v) is out


def test_8_bits_are_used_only_when_they_are_asked_for(machine):
    machine(9, "flash_attn_interface", "sageattention")
    assert attention.choose("auto", CUDA, HALF) is attention.BACKENDS["fa3"]
    for name in ("fa3-fp8", "sage"):
        assert attention.choose(name, CUDA, HALF) is attention.BACKENDS[name]


@pytest.mark.parametrize("pair", [False, True])
def test_flash_attention_in_8_bits_is_given_values_and_a_scale_per_head(monkeypatch, pair):
    """A large mean of all keys makes no difference."""

    def flash_attn_func(q, k, v, *, q_descale, k_descale, v_descale):
        parts = []
        for values, scales in ((q, q_descale), (k, k_descale), (v, v_descale)):
            assert values.dtype == torch.float8_e4m3fn and scales.shape == (2, 3) and scales.dtype == torch.float32
            parts.append(values.float() * scales[:, None, :, None])
        out = by_hand(parts[0], parts[1], parts[2], torch.ones(4, 6, dtype=torch.bool)).bfloat16()
        return (out, None) if pair else out

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = heads()
    scaled = [part * torch.tensor([0.1, 1.0, 10.0])[:, None] for part in (q, v)]  # each head has a size of its own
    found = attention.BACKENDS["fa3-fp8"](scaled[0] / 10, k + 5, scaled[1])
    expected = by_hand(scaled[0] / 10, k, scaled[1], torch.ones(4, 6, dtype=torch.bool))
    assert found.dtype == q.dtype
    error, size = (part.square().mean((0, 1, 3)).sqrt() for part in (found - expected, expected))
    assert (error < size / 16).all()  # the coarsest rounding of e4m3


def test_sage_attention_is_told_the_order_of_the_dimensions(monkeypatch):
    q, k, v = heads()
    given = []
    sageattn = lambda *arguments, **settings: given.append((arguments, settings)) or q  # noqa: E731
    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    assert attention.BACKENDS["sage"](q, k, v) is q
    assert given[0][1] == {"tensor_layout": "NHD"} and all(a is b for a, b in zip(given[0][0], (q, k, v), strict=True))


def test_cudnn_is_asked_for_and_no_other(monkeypatch):
    """torch says which kernels are allowed while attention runs."""
    allowed = []

    def watched(q, k, v, attn_mask):
        allowed.append((torch._C._get_cudnn_sdp_enabled(), torch._C._get_math_sdp_enabled()))
        assert q.shape[2] == 4 and k.shape[2] == v.shape[2] == 6
        return q

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    for name, mask in (("cudnn", None), ("cudnn", MASK), ("sdpa", None)):
        q, k, v = heads()
        attention.BACKENDS[name](q, k, v, mask)
    assert allowed[0] == (True, False) and allowed[1] == allowed[2] and allowed[1][1]
