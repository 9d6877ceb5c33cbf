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
    """Caches the text keys and values of the last few prompts; valid as long as the weights do not change. Thread-safe.

    Prompts wait in line for the encoder. Whoever asks for several as the same `owner` waits only for the newest of them: one before it
    that nobody else waits for, and whose turn has not come, is cancelled. Nobody cancels a prompt of another owner.
    """

    def __init__(self, text_encoder: TextEncoder, network: WanTransformer, *, cached_prompts: int = 4) -> None:
        self.text_encoder, self.network, self.cached_prompts = text_encoder, network, cached_prompts
        self._cache: OrderedDict[tuple[str, int], Future[TextKV]] = OrderedDict()
        self._newest: dict[object, tuple[str, int]] = {}  # of each owner, until it is computed
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
        key, owner = (normalize_prompt(prompt), batch), object() if owner is None else owner
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

    def _settled(self, owner: object, key: tuple[str, int]) -> None:
        with self._lock:
            if self._newest.get(owner) == key:
                del self._newest[owner]
            self._evict()

    def _evict(self) -> None:
        """Forget the prompts used longest ago, beyond `cached_prompts`, but none that is to be computed. The caller holds the lock."""
        settled = [key for key, future in self._cache.items() if future.done()]
        for key in settled[: max(0, len(self._cache) - self.cached_prompts)]:
            del self._cache[key]

    @torch.no_grad()
    def _compute(self, prompt: str, batch: int) -> TextKV:
        return self.network.project_text(self.text_encoder.encode([prompt]).expand(batch, -1, -1))
