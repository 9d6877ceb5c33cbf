"""Prompts to what the transformer's cross-attention reads, computed once a prompt."""

from __future__ import annotations

from collections import OrderedDict

import torch

from longlive.models.text import TextEncoder, clean
from longlive.models.wan import WanTransformer
from longlive.types import TextKV


class Conditioner:
    """Remembers the text keys and values of the last few prompts; valid as long as the weights do not change."""

    def __init__(self, text_encoder: TextEncoder, network: WanTransformer, *, cached_prompts: int = 4) -> None:
        self.text_encoder, self.network, self.cached_prompts = text_encoder, network, cached_prompts
        self._cache: OrderedDict[tuple[str, int], TextKV] = OrderedDict()

    @torch.no_grad()
    def read(self, prompt: str, batch: int = 1) -> TextKV:
        """Keys and values of `prompt` for `batch` videos."""
        key = (clean(prompt), batch)
        if key not in self._cache:
            embeddings = self.text_encoder.encode([prompt])
            self._cache[key] = self.network.read(embeddings.expand(batch, -1, -1))
            if len(self._cache) > self.cached_prompts:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]
