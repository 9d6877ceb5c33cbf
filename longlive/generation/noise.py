"""Gaussian noise from the generators that a caller gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longlive.ops.transfer import to_device

Generators = torch.Generator | Sequence[torch.Generator] | None


class Noise:
    """Draws from one generator, or from one per video of a batch; a generator on the CPU gives the same noise on every device."""

    def __init__(self, generator: Generators, batch: int, *, device: torch.device, dtype: torch.dtype) -> None:
        shared = generator is None or isinstance(generator, torch.Generator)
        self._generators: list[torch.Generator | None] = [generator] if shared else list(generator)  # type: ignore[list-item,arg-type]
        if not shared and len(self._generators) != batch:
            raise ValueError(f"{len(self._generators)} generators for {batch} videos; give one, or one for each")
        self._device, self._dtype = device, dtype

    def __call__(self, shape: Sequence[int]) -> Tensor:
        if len(self._generators) == 1:
            return self._one(shape, self._generators[0])
        return torch.cat([self._one((1, *shape[1:]), generator) for generator in self._generators])

    def snapshot(self) -> Callable[[], None]:
        """Remembers the state of the generators; the returned function restores it."""
        states = [None if generator is None else generator.get_state() for generator in self._generators]

        def restore() -> None:
            for generator, state in zip(self._generators, states, strict=True):
                if generator is not None and state is not None:
                    generator.set_state(state)

        return restore

    def like(self, latents: Tensor) -> Tensor:
        return self(latents.shape)

    def _one(self, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        device = "cpu" if generator is None else generator.device
        return to_device(torch.randn(tuple(shape), generator=generator, device=device), self._device).to(self._dtype)
