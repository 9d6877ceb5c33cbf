"""Prompts as the transformer's cross-attention reads them, computed once per prompt."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import torch

from longlive.models.text import TextEncoder, normalize_prompt
from longlive.models.wan import WanTransformer
from longlive.types import TextKV


class Conditioner:
    """Caches the text keys and values of the last few prompts; valid as long as the weights do not change. Thread-safe."""

    def __init__(self, text_encoder: TextEncoder, network: WanTransformer, *, cached_prompts: int = 4) -> None:
        self.text_encoder, self.network, self.cached_prompts = text_encoder, network, cached_prompts
        self._cache: OrderedDict[tuple[str, int], Future[TextKV]] = OrderedDict()
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
        key = (normalize_prompt(prompt), batch)
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

    @torch.no_grad()
    def _compute(self, prompt: str, batch: int) -> TextKV:
        return self.network.project_text(self.text_encoder.encode([prompt]).expand(batch, -1, -1))
