"""The learning-rate schedule, and the optimiser that pre-trains the miniature: Muon on matrices, AdamW on everything else.

Muon (Jordan et al. 2024) orthogonalises the momentum of a matrix; for the miniature it needs a third to a quarter of AdamW's steps.
The paper's own stages use AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def warmup_cosine(step: int, steps: int, *, warmup: int = 100, floor: float = 0.02) -> float:
    """Factor on the learning rate at a step: linear warm-up to 1, then half a cosine down to `floor` at step `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def orthogonalized(matrix: Tensor, *, num_steps: int = 5) -> Tensor:
    """U V^T of `matrix` = U S V^T, roughly: singular values between 0.7 and 1.2 (quintic Newton-Schulz, Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Muon):
    """torch's, with updates computed in the weights' own dtype.

    torch computes them in bfloat16, which takes a CPU without instructions for it ten times as long; matrices are small here, so a GPU
    loses nothing.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """m <- mean of gradients; W <- W - 0.2 lr sqrt(max(shape)) orthogonalized(gradient mixed with m), as large as AdamW's updates."""
        for group in self.param_groups:
            beta = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - beta)
                update = orthogonalized(p.grad.lerp(momentum, beta))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape)))


class MatrixOptimizer:
    """`Muon` on weights of two or more dimensions (convolutions as `[out, in * kernel]`), AdamW on the rest.

    Args:
        lr: of Muon, whose updates are scaled to the size of AdamW's; AdamW runs at `lr * adamw_ratio`.
        hidden: whether Muon may train the parameter of this name; embeddings, first and last layers should be left to AdamW.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        adamw_ratio: float = 0.5,
        weight_decay: float = 0.0,
        hidden: Callable[[str], bool] = lambda name: True,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._matrices = [p for name, p in named if p.squeeze().ndim >= 2 and hidden(name)]
        rest = [p for name, p in named if not (p.squeeze().ndim >= 2 and hidden(name))]
        self._flat = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self._matrices]  # shares storage
        self.lr = lr
        self.muon = Muon(self._flat, lr=lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(rest, lr=lr * adamw_ratio, betas=(0.9, 0.99), weight_decay=0.0)
        self._adamw_ratio = adamw_ratio

    def zero_grad(self) -> None:
        for p in self._matrices:
            p.grad = None
        self.adamw.zero_grad()

    def step(self, factor: float) -> None:
        """One update at `factor` times the learning rate."""
        for flat, p in zip(self._flat, self._matrices, strict=True):
            flat.grad = None if p.grad is None else p.grad.view_as(flat)
        for optimizer, lr in ((self.muon, self.lr), (self.adamw, self.lr * self._adamw_ratio)):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
