"""Prompts become embeddings: cleaned, cut into tokens, read by a UMT5 encoder, zero after the prompt's end.

A prompt is encoded alone and without padding: padding is masked, so it changes nothing but the cost, and a prompt's embedding never
depends on the prompts beside it. Knows nothing about files (`checkpoints.store.load_text_encoder`), about the network that reads the
embeddings, or about when a prompt is switched.
"""

from __future__ import annotations

import html
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import ftfy
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from longlive.types import Text

Tokens = Int[Tensor, "B L"]

logger = logging.getLogger(__name__)


def normalize_prompt(prompt: str) -> str:
    """The prompt as Wan was trained to read it: broken encodings mended, HTML unescaped twice, every run of white space one blank."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


@torch.no_grad()
def embed(encoder: UMT5EncoderModel, ids: Tokens, mask: Tokens) -> Text:
    """Hidden states of tokens `ids`; where `mask` is 0 nothing is attended to and the result is 0."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden.masked_fill(mask[..., None] == 0, 0)


TextEncoderMode = Literal["resident", "on_demand", "cpu"]


def check_mode(mode: str) -> None:
    """Raises ValueError when a text encoder has no such mode."""
    if mode not in get_args(TextEncoderMode):
        raise ValueError(f"text encoder mode {mode!r} is unknown; choose from {', '.join(get_args(TextEncoderMode))}")


class PromptPieces(NamedTuple):
    """How much of a prompt is read: its pieces (tokens, with its end) and those that are read; if it is cut, the words beside the cut."""

    given: int
    read: int
    last_read: str = ""
    first_unread: str = ""


class TextEncoder:
    """Prompts to embeddings `[B, L, E]` on `device`, L = `text_len`; what was encoded is remembered, `cached_prompts` of them, on the CPU.

    `mode="resident"` keeps the encoder on `device`. `mode="on_demand"` keeps it on the CPU and moves it to `device` while a prompt is
    encoded, so that UMT5-XXL's 11 GB are held there only then. `mode="cpu"` encodes on the CPU. The encoder computes in its own dtype;
    `dtype` is that of the result (None: the encoder's). May be called from several threads.
    """

    def __init__(
        self,
        encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_len: int = 512,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        mode: TextEncoderMode = "resident",
        cached_prompts: int = 64,
    ):
        check_mode(mode)
        if text_len < 2:
            raise ValueError(f"text_len {text_len} leaves no room for a prompt; Wan uses 512")
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.mode = mode
        self.dtype = encoder.dtype if dtype is None else dtype
        self.cached_prompts = cached_prompts
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizing = threading.Lock()  # a tokenizer has state; this one is held shortly, the other one while prompts are encoded
        self.to(device)

    @property
    def width(self) -> int:
        """E, the width of the embeddings."""
        return self.encoder.config.d_model

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        """Deliver embeddings to `device` in `dtype` from now on; a resident encoder moves there, its own dtype stays."""
        if device is not None:
            self.device = torch.device(device)
            Module.to(self.encoder, self.device if self.mode == "resident" else "cpu")
        if dtype is not None:
            self.dtype = dtype
        return self

    def encode(self, prompts: Sequence[str]) -> Text:
        """Embeddings of `prompts`, zero after each prompt's end. A prompt longer than L tokens is cut, with a warning that says where.

        Raises ValueError when a prompt is empty once cleaned.
        """
        prompts = [normalize_prompt(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        if not prompts:
            raise ValueError("no prompt to encode; give at least one")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index + 1} of {len(prompts)} is empty; describe what the video should show")
        with self._lock:
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
            encoded = {prompt: self._cache[prompt] for prompt in prompts if prompt not in new}
            encoded |= dict(zip(new, self._encode_new(new)))
            self._remember(encoded)
        text = torch.zeros(len(prompts), self.text_len, self.width, device=self.device, dtype=self.dtype)
        for row, prompt in zip(text, prompts):
            row[: len(encoded[prompt])] = encoded[prompt]
        return text

    def _encode_new(self, prompts: list[str]) -> list[Tensor]:
        """One `[tokens, E]` on the CPU for each prompt, in the encoder's dtype."""
        if not prompts:
            return []
        tokens = [self._tokens(prompt) for prompt in prompts]
        home = [parameter.data for parameter in self.encoder.parameters()]
        device = torch.device("cpu") if self.mode == "cpu" else self.device
        Module.to(self.encoder, device)
        try:
            return [embed(self.encoder, ids, torch.ones_like(ids))[0].cpu() for ids in (t.to(device) for t in tokens)]
        finally:
            if self.mode == "on_demand":  # the weights are still on the CPU (perhaps mapped from a file): nothing to copy back
                for parameter, data in zip(self.encoder.parameters(), home):
                    parameter.data = data

    def pieces(self, prompt: str) -> PromptPieces:
        """How much of a prompt `encode` reads. Does not wait for prompts that are being encoded."""
        return self._read(normalize_prompt(prompt))[1]

    def _read(self, prompt: str) -> tuple[list[int], PromptPieces]:
        """Token ids of a normalized prompt, at most `text_len`."""
        with self._tokenizing:
            ids = self.tokenizer(prompt, verbose=False).input_ids
            if len(ids) <= self.text_len:
                return ids, PromptPieces(len(ids), len(ids))
            kept = self.tokenizer(prompt, truncation=True, max_length=self.text_len, return_offsets_mapping=True)
        cut = max(end for _, end in kept.offset_mapping)
        beside = " ".join(prompt[:cut].split()[-5:]), " ".join(prompt[cut:].split()[:5])
        return kept.input_ids, PromptPieces(len(ids), self.text_len, *beside)

    def _tokens(self, prompt: str) -> Tokens:
        ids, pieces = self._read(prompt)
        if pieces.read < pieces.given:
            words = 'the prompt has %d tokens and the model reads %d: cut after "…%s", "%s…" is not read'
            logger.warning(words, *pieces)
        return torch.tensor([ids])

    def _remember(self, encoded: dict[str, Tensor]) -> None:
        for prompt, tensor in encoded.items():
            self._cache[prompt] = tensor
            self._cache.move_to_end(prompt)
        while len(self._cache) > self.cached_prompts:
            self._cache.popitem(last=False)
