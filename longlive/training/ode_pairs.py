"""Trajectories of a teacher on disk, the data of ODE regression; generated once, by any number of ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from longlive.files import replacing, write_json
from longlive.generation.denoiser import Denoiser
from longlive.parallel.world import rank_generator
from longlive.training.ode import Trajectory, trajectory
from longlive.types import Text

log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """Trajectories `[B, S, F, C, H, W]`, from noise to clean, and their prompts."""

    states: Trajectory
    prompts: list[str]


class OdePairs:
    """One file per pair, `000123.safetensors` with float16 `states` `[S, F, C, H, W]` and the prompt in its header; and `settings.json`.

    Args:
        prompts: pair number n has prompt n.
        settings: everything that the trajectories depend on.

    Raises:
        ValueError: when `folder` has pairs of other settings.
    """

    def __init__(self, folder: str | Path, prompts: Sequence[str], settings: dict[str, object]) -> None:
        self.folder, self.prompts = Path(folder), list(prompts)
        file, wanted = self.folder / "settings.json", json.loads(json.dumps(settings))
        if file.exists() and (found := json.loads(file.read_text(encoding="utf-8"))) != wanted:
            raise ValueError(f"{self.folder} has pairs made with {found}, not {wanted}; delete it or choose another folder")
        write_json(file, wanted)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def make(
        self,
        teacher: Callable[[int], Denoiser],
        embed: Callable[[Sequence[str]], Text],
        shape: Sequence[int],
        *,
        seed: int,
        batch: int,
        num_steps: int,
        keep: Sequence[int],
        shift: float,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        """Generate this rank's share of the missing pairs, `batch` at a time.

        Args:
            teacher: the denoiser for a batch of the given size.
            shape: of a clip, `[F, C, H, W]`.
        """
        missing = [number for number in range(rank, len(self.prompts), size) if not self._file(number).exists()]
        for start in tqdm(range(0, len(missing), batch), desc="trajectories", mininterval=5, disable=not missing):
            numbers = missing[start : start + batch]
            # A pair's noise depends on its number alone: any number of ranks generates the same pairs.
            noise = torch.stack([torch.randn(tuple(shape), generator=rank_generator(seed, number)) for number in numbers])
            text = embed([self.prompts[number] for number in numbers])
            states = trajectory(teacher(len(numbers)), noise.to(text.device), text, num_steps=num_steps, keep=keep, shift=shift)
            for number, one in zip(numbers, states.half().cpu(), strict=True):
                with replacing(self._file(number)) as partial:
                    save_file({"states": one.contiguous()}, partial, metadata={"prompt": self.prompts[number]})

    def draw(self, batch: int, generator: torch.Generator) -> Pairs:
        """Random pairs, float32."""
        numbers = torch.randint(len(self.prompts), (batch,), generator=generator).tolist()
        return Pairs(torch.stack([self._read(number) for number in numbers]), [self.prompts[number] for number in numbers])

    def _read(self, number: int) -> Tensor:
        with safe_open(self._file(number), framework="pt") as file:
            if (prompt := (file.metadata() or {}).get("prompt")) != self.prompts[number]:
                wanted = self.prompts[number]
                raise ValueError(f"{self._file(number)} was generated for the prompt {prompt!r}, not {wanted!r}; delete the folder")
            return file.get_tensor("states").float()
