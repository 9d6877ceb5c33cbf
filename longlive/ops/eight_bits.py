"""Tensors in 8 bits with float32 scales, and products of linear layers with them: int8, and fp8 with 4 exponent bits (e4m3).

x is stored as values * scale, with scale = max |x| / (largest value of the format) over the numbers that share it, so that nothing is
clipped. A linear layer has one scale for each token and one for each output channel: y_mo = s_m s_o sum_k x_mk w_ok + b_o. These factor
out of the sum, which is therefore taken over 8-bit values.

Where there are instructions for it the sum runs in 8 bits: `torch._int_mm` on CUDA and on CPUs with VNNI, `torch._scaled_mm` for fp8 on
CUDA. Elsewhere the same 8-bit values are multiplied in float32: int8 products are then exact while k is at most 1040, and the weights
are still stored in 8 bits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

Format = Literal["int8", "fp8"]
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
CPU_HAS_INT8 = torch.cpu._is_vnni_supported()  # without, torch._int_mm is a plain loop there, 25 times slower than float32

Rows = Float[Tensor, "*B k"]
Weights8 = Shaped[Tensor, "o k"]  # int8 or float8: jaxtyping's Float knows no 8-bit types of torch
Scales = Float[Tensor, " o"]
Outputs = Float[Tensor, "*B o"]


class Quantised(NamedTuple):
    """8-bit values, and the float32 scale of each group of them, which broadcasts against the values."""

    values: Tensor
    scales: Tensor

    def dequantised(self) -> Tensor:
        """values * scales, in float32."""
        return self.values.float().mul_(self.scales)


def dtype_of(name: str) -> torch.dtype:
    """The 8-bit type called `name`. Raises ValueError for an unknown one."""
    if name not in DTYPES:
        raise ValueError(f"the 8-bit format {name!r} is unknown; choose {' or '.join(DTYPES)}")
    return DTYPES[name]


def quantise(x: Tensor, dtype: torch.dtype, dims: int | tuple[int, ...]) -> Quantised:
    """Nearest 8-bit values of `x`, with one scale for all numbers along `dims`, which remain as dimensions of size 1.

    The error is at most scale / 2 in int8, and 2^-4 |x| in fp8 unless |x| is below 2^-6 scale. A group that holds a NaN or an infinity
    has a scale that is not finite, so that its dequantised values are not either.
    """
    x = x.float()
    scales = x.abs().amax(dims, keepdim=True) / LARGEST[dtype]
    ratio = x / scales.clamp(min=torch.finfo(torch.float32).tiny)  # a group of zeros has scale 0
    return Quantised((ratio.round_() if dtype == torch.int8 else ratio).to(dtype), scales)


def int8_linear(x: Rows, values: Weights8, scales: Scales, bias: Scales | None) -> Outputs:
    """Tokens and weights in int8 (W8A8). Scales and bias are applied in plain torch, so that Inductor fuses them into the product."""
    rows = quantise(x.flatten(0, -2), torch.int8, -1)
    product = _int8_product(rows.values, values).float().mul_(rows.scales).mul_(scales)
    return _finish(product, bias, x)


def int8_weights_linear(x: Rows, values: Weights8, scales: Scales, bias: Scales | None) -> Outputs:
    """Only the weights in int8: they are converted to the type of `x`, exactly, in every call.

    In float16 their products would overflow before they are scaled, so that they are taken in float32.
    """
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    product = (x.flatten(0, -2).to(dtype) @ values.to(dtype).T).float().mul_(scales)
    return _finish(product, bias, x)


def fp8_linear(x: Rows, values: Weights8, scales: Scales, bias: Scales | None) -> Outputs:
    """Tokens and weights in fp8. On CUDA the scales and the bias are part of the product, whose result is bfloat16."""
    rows = quantise(x.flatten(0, -2), torch.float8_e4m3fn, -1)
    if x.device.type == "cuda":
        return _scaled_product(rows, values, scales, bias).unflatten(0, x.shape[:-1]).to(x.dtype)
    return _finish((rows.values.float() @ values.float().T).mul_(rows.scales).mul_(scales), bias, x)


def check_device(kind: str, device: torch.device) -> None:
    """Raises ValueError, with the reason, when linear layers of this kind cannot run on the device."""
    needed = {"fp8": (8, 9), "int8": (8, 0)}.get(kind)
    if needed is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) < needed:
        raise ValueError(
            f"{kind} needs compute capability {needed[0]}.{needed[1]} or more, {device} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; choose int8-weights"
        )


def _finish(product: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return (product if bias is None else product.add_(bias)).to(x.dtype).unflatten(0, x.shape[:-1])


def _int8_product(rows: Tensor, weights: Tensor) -> Tensor:
    """rows [m, k] and weights [o, k], int8 -> their products [m, o], int32 or float32."""
    if rows.device.type == "cuda":
        return _padded_int_mm(rows, weights)
    if rows.device.type == "cpu" and CPU_HAS_INT8:
        return torch._int_mm(rows, weights.T)
    return rows.float() @ weights.float().T


def _padded_int_mm(rows: Tensor, weights: Tensor) -> Tensor:
    """`torch._int_mm` as CUDA wants it: with m > 16, and with k and o that are multiples of 8."""
    padded = torch._int_mm(_pad(rows, 17 if len(rows) < 17 else 1, 8), _pad(weights, 8, 8).T)
    return padded[: len(rows), : len(weights)]


def _scaled_product(rows: Quantised, weights: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Rows [m, k] and weights [o, k] in fp8 -> their scaled products [m, o] plus bias, bfloat16; for CUDA."""
    num_outputs = len(weights)
    values, weights = _pad(rows.values, 1, 16), _pad(weights, 16, 16)  # k and o must be multiples of 16
    more = len(weights) - num_outputs
    product = torch._scaled_mm(
        values,
        weights.T,
        rows.scales,
        F.pad(scales, (0, more))[None],
        bias=None if bias is None else F.pad(bias, (0, more)).bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product[:, :num_outputs]


def _pad(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros, to multiples of `rows` and `columns`."""
    below, right = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    if below == right == 0:
        return matrix
    return F.pad(matrix.view(torch.int8), (0, right, 0, below)).view(matrix.dtype)
