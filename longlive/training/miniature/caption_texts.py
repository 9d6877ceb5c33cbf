"""Captions of the miniature world in many phrasings, encoded once by its frozen text encoder; and how often each is drawn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from longlive.miniature.captions import caption
from longlive.miniature.world import ATTRIBUTES, Captioned
from longlive.models.text import TextEncoder, embed, normalize_prompt
from longlive.training.miniature.language import corrupt
from longlive.types import Text


class CaptionTexts:
    """Embeddings of `phrasings` random sentences for each caption.

    Of every sixteen phrasings one lacks words, as people's prompts do, and one is no text at all (zeros), which guidance needs.
    """

    def __init__(self, encoder: TextEncoder, captions: Sequence[Captioned], *, phrasings: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for c in captions:
            texts = [normalize_prompt(caption(c, generator)) for _ in range(phrasings)]
            texts = [corrupt(text, generator, drop=0.25, insert=0.1) if i % 16 == 8 else text for i, text in enumerate(texts)]
            tokens = encoder.tokenizer(texts, padding="max_length", max_length=encoder.text_len, truncation=True, return_tensors="pt")
            parts.append(embed(encoder.encoder, tokens.input_ids, tokens.attention_mask))
        self._texts = torch.stack(parts)  # [captions, phrasings, L, E]
        self._texts[:, ::16] = 0

    def draw(self, captions: Tensor, generator: torch.Generator) -> Text:
        """A random phrasing of each caption of the given indices `[B]`."""
        phrasing = torch.randint(self._texts.shape[1], (len(captions),), generator=generator)
        return self._texts[captions, phrasing]


def caption_weights(captions: Sequence[Captioned], oversampled: Collection[str], oversampling: float) -> Tensor:
    """How often each caption is drawn, relative to the others: a factor of `oversampling` for each attribute with an oversampled value.

    Raises:
        ValueError: for a value that the world does not have.
    """
    known = {value for values in ATTRIBUTES.values() for value in values}
    if unknown := sorted(set(oversampled) - known):
        raise ValueError(f"oversampled values {unknown} are not in this world; choose from {', '.join(sorted(known))}")
    return torch.tensor([oversampling ** sum(getattr(c, name) in oversampled for name in ATTRIBUTES) for c in captions])
