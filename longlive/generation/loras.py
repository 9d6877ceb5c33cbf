"""The methods of `LongLivePipeline` for LoRAs, under the names that diffusers gives them: load, choose strengths, take out, keep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from longlive.checkpoints.lora import load_lora
from longlive.models.lora import MergedLoras
from longlive.models.wan import WanTransformer


class LoraMethods:
    """LoRAs merged into `transformer`, so that nothing is slower at run time."""

    transformer: WanTransformer
    _loras: MergedLoras | None = None

    def _plain_transformer(self) -> AbstractContextManager[None]:
        """For a change of the transformer."""
        raise NotImplementedError

    def load_lora_weights(
        self,
        path: str | Path | Mapping[str, Any],
        *,
        strength: float = 1.0,
        adapter_name: str | None = None,
        alpha: float | None = None,
        which: str | None = None,
    ) -> None:
        """Merge a LoRA of any layout into the transformer: a file, a peft folder or weights at hand (see `load_lora`).

        Several add up, `set_adapters` changes their strengths and `unload_lora_weights` takes them out again exactly; what that needs is
        kept on the CPU (see `MergedLoras`) until `fuse_lora`. Nothing is slower at run time.

        Args:
            strength: what its change of the weights is multiplied by.
            adapter_name: its name in the other methods; None: lora_0, lora_1, …
            alpha: of a LoRA that does not say its own; None: its rank.
            which: the part of a checkpoint; None: `generator_lora`.

        Raises:
            ValueError: with nothing changed, when it is not understood, does not fit, or the name is taken.
        """
        lora = load_lora(path, which=which, alpha=alpha)
        merged = MergedLoras(self.transformer) if self._loras is None else self._loras
        if adapter_name is None:
            adapter_name = next(name for number in itertools.count() if (name := f"lora_{number}") not in merged.strengths)
        with self._plain_transformer():
            merged.add(adapter_name, lora, strength=strength)
        self._loras = merged

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Merge exactly these LoRAs, with these strengths, one or one for each; the others stay at hand.

        Raises ValueError for a name that there is not, or another number of strengths than of names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        strengths = [adapter_weights] * len(names) if isinstance(adapter_weights, int | float) else list(adapter_weights)
        if len(strengths) != len(names):
            raise ValueError(f"{len(strengths)} strengths for {len(names)} LoRAs; give one, or one for each")
        with self._plain_transformer():
            self._merged_loras().set(dict(zip(names, strengths)))

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that are merged with a strength other than 0."""
        return [name for name, strength in self.lora_strengths.items() if strength != 0]

    @property
    def lora_strengths(self) -> dict[str, float]:
        """The LoRAs that can be changed, with their strengths."""
        return {} if self._loras is None else dict(self._loras.strengths)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take these LoRAs out and forget them. Raises ValueError for a name that there is not."""
        with self._plain_transformer():
            self._merged_loras().remove([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def unload_lora_weights(self) -> None:
        """Take all LoRAs out: the weights are to the bit what they were before the first. Those of `from_original` are the model's own."""
        if self._loras is not None:
            with self._plain_transformer():
                self._loras.remove()
            self._loras = None

    def fuse_lora(self) -> None:
        """Make the LoRAs as they are now part of the model, and free what taking them out again would need."""
        self._loras = None

    def _merged_loras(self) -> MergedLoras:
        if self._loras is None:
            raise ValueError("no LoRA was loaded that could be changed; use load_lora_weights (what is fused is part of the model)")
        return self._loras
