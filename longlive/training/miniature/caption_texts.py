"""Captions of the miniature world in many words, read once by its frozen text encoder."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from longlive.miniature.captions import caption
from longlive.miniature.world import ATTRIBUTES, Captioned
from longlive.models.text import TextEncoder, embed, normalize_prompt
from longlive.training.miniature.language import spoil
from longlive.types import Text


class CaptionTexts:
    """Embeddings of `phrasings` random sentences for each caption.

    One phrasing in sixteen has lost words, one is no text at all (zeros): people leave things out, and guidance needs both.
    """

    def __init__(self, encoder: TextEncoder, captions: Sequence[Captioned], *, phrasings: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for c in captions:
            texts = [normalize_prompt(caption(c, generator)) for _ in range(phrasings)]
            texts = [spoil(text, generator, drop=0.25, insert=0.1) if i % 16 == 8 else text for i, text in enumerate(texts)]
            tokens = encoder.tokenizer(texts, padding="max_length", max_length=encoder.text_len, truncation=True, return_tensors="pt")
            parts.append(embed(encoder.encoder, tokens.input_ids, tokens.attention_mask))
        self._texts = torch.stack(parts)  # [captions, phrasings, L, E]
        self._texts[:, ::16] = 0

    def draw(self, captions: Tensor, generator: torch.Generator) -> Text:
        """A random phrasing of each caption of the given indices `[B]`."""
        phrasing = torch.randint(self._texts.shape[1], (len(captions),), generator=generator)
        return self._texts[captions, phrasing]


def weights(captions: Sequence[Captioned], hard: Collection[str], hard_weight: float) -> Tensor:
    """How often each caption is drawn, relative to the others: a factor of `hard_weight` for every attribute whose value is hard.

    Raises:
        ValueError: for a value that the world does not have.
    """
    known = {value for values in ATTRIBUTES.values() for value in values}
    if unknown := sorted(set(hard) - known):
        raise ValueError(f"hard values {unknown} are not in this world; choose from {', '.join(sorted(known))}")
    return torch.tensor([hard_weight ** sum(getattr(c, name) in hard for name in ATTRIBUTES) for c in captions])
