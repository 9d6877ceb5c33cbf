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

Key = tuple[Any, ...]
"""A prompt, how many videos, and which adapters act."""


class Conditioner:
    """Caches the text keys and values of the last few prompts; valid as long as the weights, but for adapters
    beside them, do not change. Thread-safe.

    Prompts wait in line for the encoder. Whoever asks for several as the same `owner` waits only for the newest of them: one before it
    that nobody else waits for, and whose turn has not come, is cancelled. Nobody cancels a prompt of another owner.
    """

    def __init__(self, text_encoder: TextEncoder, network: WanTransformer, *, cached_prompts: int = 4) -> None:
        self.text_encoder, self.network, self.cached_prompts = text_encoder, network, cached_prompts
        self._cache: OrderedDict[Key, Future[TextKV]] = OrderedDict()
        self._newest: dict[object, Key] = {}  # of each owner, until it is computed
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="text")

    def project(self, prompt: str, batch: int = 1) -> TextKV:
        """Keys and values of `prompt` for `batch` videos; waits when they are being computed."""
        while True:
            future = self.submit(prompt, batch)
            try:
                return future.result()
            except CancelledError:  # its owner asked for a newer one before its turn came
                continue

    def submit(self, prompt: str, batch: int = 1, *, owner: object = None) -> Future[TextKV]:
        """Start computing the keys and values of `prompt` in the background, unless they are cached; returns their future.

        `owner`: who asks, if a newer prompt of the same owner makes this one useless; None: it is computed in any case.
        """
        key, owner = (normalize_prompt(prompt), batch, *adapter_state(self.network)), object() if owner is None else owner
        useless: Future[TextKV] | None = None
        with self._lock:
            known = self._cache.get(key)
            if known is None or (known.done() and known.exception() is not None):
                known = self._cache[key] = self._worker.submit(self._compute, prompt, batch)
                self._evict()
            self._cache.move_to_end(key)
            replaced = self._newest.get(owner, key)
            self._newest[owner] = key
            if replaced not in self._newest.values():
                useless = self._cache.pop(replaced, None)
        if useless is not None and not useless.cancel():  # not under the lock: it calls back those who wait, who may take locks
            with self._lock:
                self._cache.setdefault(replaced, useless)  # its turn has come
        known.add_done_callback(lambda _: self._settled(owner, key))
        return known

    def _settled(self, owner: object, key: Key) -> None:
        with self._lock:
            if self._newest.get(owner) == key:
                del self._newest[owner]
            self._evict()

    def _evict(self) -> None:
        """Forget the prompts used longest ago, beyond `cached_prompts`, but none that is to be computed. The caller holds the lock."""
        settled = [key for key, future in self._cache.items() if future.done()]
        for key in settled[: max(0, len(self._cache) - self.cached_prompts)]:
            del self._cache[key]

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
