"""Attention behind one signature: FlashAttention 3 and 2, cuDNN, torch's own choice; and the view of a sequence without a cache.

A backend is chosen by name or automatically; the choice is logged once per network. CUDA libraries are imported only when they are used.
With a mask every backend uses torch's own choice.

Two backends compute in 8 bits, which changes the numbers: "sage" (SageAttention, arXiv 2411.10958) and "fa3-fp8" (FlashAttention 3 on
e4m3). They quantise queries, keys and values in every call, and are used only when they are asked for by name.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive.ops.eight_bits import quantise
from longlive.types import AttentionBackend, Heads, Mask, Rotation

log = logging.getLogger(__name__)


class MaskedMemory(NamedTuple):
    """A span attends to itself only, through a mask `[N, N]` or, with None, to all of itself."""

    mask: Mask | None

    def write(self, k: Heads, v: Heads) -> None:
        """Nothing is stored."""

    def attend(self, q: Heads, k: Heads, v: Heads, backend: AttentionBackend) -> Heads:
        return backend(q, k, v, self.mask)


class SequenceView(NamedTuple):
    """The `KVView` of a whole sequence without a past: bidirectional, or with the mask of a causal order (teacher forcing)."""

    rotation: Rotation
    mask: Mask | None = None

    def at(self, layer: int) -> MaskedMemory:
        return MaskedMemory(self.mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return _sdpa(q, k, v, mask)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _fa2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return _sdpa(q, k, v, mask)
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _fa3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return _sdpa(q, k, v, mask)
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # older releases also return the log-sum-exp


def _fa3_fp8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One scale per video and head. Softmax ignores the mean of all keys, which is subtracted to make the scale of the keys finer."""
    if mask is not None:
        return _sdpa(q, k, v, mask)
    from flash_attn_interface import flash_attn_func

    parts = [quantise(part, torch.float8_e4m3fn, (1, 3)) for part in (q, k - k.mean(1, keepdim=True), v)]
    names = ("q_descale", "k_descale", "v_descale")
    out = flash_attn_func(*(part.values for part in parts), **{n: part.scales[:, 0, :, 0] for n, part in zip(names, parts)})  # [B, A]
    return (out[0] if isinstance(out, tuple) else out).to(q.dtype)  # bfloat16


def _sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is not None:
        return _sdpa(q, k, v, mask)
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


BACKENDS: dict[str, AttentionBackend] = {
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "fa2": _fa2,
    "fa3": _fa3,
    "fa3-fp8": _fa3_fp8,
    "sage": _sage,
}
EIGHT_BIT_BACKENDS = ("fa3-fp8", "sage")  # whose numbers differ visibly from those of the others
_MODULES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa3-fp8": "flash_attn_interface", "sage": "sageattention"}


def _why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the backend cannot run here; None when it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, this is {dtype}"
    major = torch.cuda.get_device_capability(device)[0]
    if name == "cudnn":
        return None if major >= 8 and torch.backends.cudnn.is_available() else "it needs cuDNN and compute capability 8.0 or more"
    if name in ("fa2", "sage") and major < 8:
        return f"{'FlashAttention 2' if name == 'fa2' else 'SageAttention'} needs compute capability 8.0 or more"
    if name in ("fa3", "fa3-fp8") and major != 9:
        return "FlashAttention 3 is for Hopper (compute capability 9.x)"
    if importlib.util.find_spec(_MODULES[name]) is None:
        return f"module {_MODULES[name]!r} is not installed"
    return None


def choose(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend called `name` (see `BACKENDS`), or with "auto" the fastest that runs on this device and dtype and is not in 8 bits.

    torch's own default order prefers FlashAttention 2 on Hopper, which is slower there than FlashAttention 3 and cuDNN.

    Raises:
        ValueError: for an unknown name, or a backend that cannot run here (with the reason).
    """
    if name == "auto":
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
        candidates = ("fa3", "cudnn", "fa2", "sdpa") if hopper else ("fa2", "sdpa")
        name = next(candidate for candidate in candidates if _why_not(candidate, device, dtype) is None)
    elif name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; choose auto, {', '.join(BACKENDS)}")
    elif reason := _why_not(name, device, dtype):
        raise ValueError(f"attention backend {name!r} cannot be used: {reason}; choose auto")
    log.info("attention backend: %s", name)
    return BACKENDS[name]
