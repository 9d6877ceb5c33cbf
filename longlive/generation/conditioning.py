"""Prompts as the transformer's cross-attention reads them, computed once per prompt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import torch

from longlive.generation.mixes import parts_of
from longlive.models.lora import adapter_state
from longlive.models.text import TextEncoder, normalize_prompt
from longlive.models.wan import WanTransformer
from longlive.types import Text, TextKV


class Conditioner:
    """Caches the text keys and values of the last few prompts; valid as long as the weights, but for adapters beside them, do not change.

    Thread-safe.
    """

    def __init__(self, text_encoder: TextEncoder, network: WanTransformer, *, cached_prompts: int = 4) -> None:
        self.text_encoder, self.network, self.cached_prompts = text_encoder, network, cached_prompts
        self._cache: OrderedDict[tuple[Any, ...], Future[TextKV]] = OrderedDict()
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="text")

    def project(self, prompt: str, batch: int = 1) -> TextKV:
        """Keys and values of `prompt` for `batch` videos; waits when they are being computed."""
        while True:
            future = self.submit(prompt, batch)
            try:
                return future.result()
            except CancelledError:  # so many newer prompts came that this one was evicted before its turn
                continue

    def submit(self, prompt: str, batch: int = 1) -> Future[TextKV]:
        """Start computing the keys and values of `prompt` in the background, unless they are cached; returns their future.

        Only the newest `cached_prompts` are kept; a future that is evicted before its turn is cancelled.
        """
        key = (normalize_prompt(prompt), batch, *adapter_state(self.network))
        evicted: Future[TextKV] | None = None
        with self._lock:
            known = self._cache.get(key)
            if known is None or (known.done() and known.exception() is not None):
                self._cache[key] = self._worker.submit(self._compute, prompt, batch)
                if len(self._cache) > self.cached_prompts:
                    evicted = self._cache.popitem(last=False)[1]
            self._cache.move_to_end(key)
            found = self._cache[key]
        if evicted is not None:
            evicted.cancel()  # not under the lock: it calls back those who wait for it, and they may take locks of their own
        return found

    def embed(self, prompts: Sequence[str]) -> Text:
        """Embeddings of prompts, `[prompts, L, E]`; of a mix, the weighted sum of those of its prompts."""
        return torch.cat([self._embed(prompt) for prompt in prompts])

    def _embed(self, prompt: str) -> Text:
        parts = parts_of(prompt)
        if parts is None:
            return self.text_encoder.encode([prompt])
        texts = self.text_encoder.encode([part for part, _ in parts])
        weights = torch.tensor([weight for _, weight in parts], device=texts.device)
        return (texts.float() * weights[:, None, None]).sum(0, keepdim=True).to(texts.dtype)

    @torch.no_grad()
    def project_embedding(self, text: Text, batch: int = 1) -> TextKV:
        """Keys and values of one embedding `[1, L, E]` for `batch` videos."""
        return self.network.project_text(text.expand(batch, -1, -1))

    @torch.no_grad()
    def _compute(self, prompt: str, batch: int) -> TextKV:
        return self.project_embedding(self._embed(prompt), batch)
