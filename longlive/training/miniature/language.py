"""Train the miniature's text encoder: shape, colour, background and motion must be readable from its embeddings.

Each attribute has a reader as simple as a diffusion model's cross-attention: one query attends over a prompt's tokens, a linear layer
classifies the value. Captions are new at every step, and half of them are corrupted: words are dropped and foreign words inserted. The
readers are discarded after training.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from longlive.config import LanguageConfig
from longlive.miniature.captions import COMMON, TEMPLATES, UNSEEN_TEMPLATES, canonical, caption, parse
from longlive.miniature.language import PIECES, PUNCTUATION, build_text_encoder, build_tokenizer, save_language
from longlive.miniature.world import ATTRIBUTES, Captioned, all_captioned, held_out, training_set
from longlive.models.text import embed
from longlive.training.optimizer import warmup_cosine
from longlive.types import Text

Mask = Bool[Tensor, "B L"]
Said = Int[Tensor, "B 4"]

NOT_SAID = -100  # the label that cross_entropy ignores
SYLLABLES = (*PIECES, *PUNCTUATION, *string.digits, *string.ascii_lowercase)  # of invented words: every token is trained
CORRUPTED, DROP, INSERT = 0.5, 0.15, 0.25  # probabilities: of a caption to be corrupted; then of each word, see `corrupt`


class Reader(nn.Module):
    """Logits `[B, values]` of every attribute from text embeddings."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(len(ATTRIBUTES), width))
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in ATTRIBUTES.values())

    def forward(self, text: Text, mask: Mask) -> list[Tensor]:
        scores = torch.einsum("ae,ble->bal", self.queries, text).masked_fill(~mask[:, None], -torch.inf)
        pooled = scores.softmax(-1) @ text  # [B, attributes, E]
        return [head(pooled[:, a]) for a, head in enumerate(self.heads)]


def labels(texts: Sequence[str]) -> Said:
    """Index of every attribute's value that a text names; `NOT_SAID` where it names none."""
    rows = []
    for text in texts:
        said = parse(text)
        rows.append([values.index(said[name]) if name in said else NOT_SAID for name, values in ATTRIBUTES.items()])
    return torch.tensor(rows)


def corrupt(text: str, generator: torch.Generator, *, drop: float, insert: float) -> str:
    """Drop each word with probability `drop`; before each, with probability `insert`, insert a common or an invented word."""

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    words = []
    for word, (kept, foreign) in zip(text.split(), torch.rand(len(text.split()), 2, generator=generator).tolist()):
        if foreign < insert / 2:
            words.append(COMMON[below(len(COMMON))])
        elif foreign < insert:
            words.append("".join(SYLLABLES[below(len(SYLLABLES))] for _ in range(1 + below(4))))
        if kept >= drop:
            words.append(word)
    return " ".join(words) or text


class LanguageStage:
    """Cross-entropy of the readers on new captions of the training combinations."""

    between_videos = True

    def __init__(self, config: LanguageConfig, *, steps: int, seed: int) -> None:
        self.config, self.steps = config, steps
        self.tokenizer = build_tokenizer()
        self.encoder = build_text_encoder(len(self.tokenizer), seed=seed)
        # The final norm keeps embeddings at unit scale, which the transformer expects.
        self.encoder.encoder.final_layer_norm.weight.requires_grad_(False)
        self.reader = Reader(self.encoder.config.d_model)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.reader.parameters():
                parameter.normal_(0, 0.02, generator=self.generator)
        self.trained = [p for module in (self.encoder, self.reader) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.combinations = training_set()
        self.last_batch: dict[str, Any] = {}

    def _draw(self) -> str:
        generator = self.generator
        text = caption(self.combinations[int(torch.randint(len(self.combinations), (), generator=generator))], generator)
        if float(torch.rand((), generator=generator)) < CORRUPTED:
            text = corrupt(text, generator, drop=DROP, insert=INSERT)
        return text

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """Logits of every attribute for `texts`."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt", verbose=False)
        text = self.encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return self.reader(text, tokens.attention_mask.bool())

    def step(self, number: int) -> dict[str, float]:
        texts = [self._draw() for _ in range(self.config.batch)]
        wanted = labels(texts)
        self.last_batch = {"texts": texts, "labels": wanted}
        loss = torch.stack([functional.cross_entropy(got, want) for got, want in zip(self.read(texts), wanted.unbind(1))]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * warmup_cosine(number, self.steps)
        self.optimizer.step()
        return {"language/loss": loss.item(), "language/grad_norm": norm.item()}

    @torch.no_grad()
    def _accuracy(self, scenes: Sequence[Captioned], texts: Sequence[str]) -> dict[str, float]:
        accuracy = {}
        for (name, values), got in zip(ATTRIBUTES.items(), self.read(texts)):
            wanted = torch.tensor([values.index(getattr(scene, name)) for scene in scenes])
            accuracy[name] = (got.argmax(-1) == wanted).float().mean().item()
        return accuracy

    @torch.no_grad()
    def validate(self, folder: Path, number: int) -> dict[str, float]:
        """Accuracy per attribute on held-out combinations in known and unseen phrasings and on all canonical sentences; scale."""
        generator = torch.Generator().manual_seed(1)
        scenes = [scene for scene in held_out() for _ in range(20)]
        everything = all_captioned()
        known = self._accuracy(scenes, [caption(scene, generator, templates=TEMPLATES) for scene in scenes])
        unseen = self._accuracy(scenes, [caption(scene, generator, templates=UNSEEN_TEMPLATES) for scene in scenes])
        plain = self._accuracy(everything, [canonical(scene) for scene in everything])
        tokens = self.tokenizer([canonical(scene) for scene in everything], padding=True, return_tensors="pt")
        scale = embed(self.encoder, tokens.input_ids, tokens.attention_mask)[tokens.attention_mask.bool()].square().mean().sqrt()
        return (
            {f"language/{name}": value for name, value in known.items()}
            | {f"language/{name}_unseen_phrasing": value for name, value in unseen.items()}
            | {"language/canonical": min(plain.values()), "language/scale": scale.item()}
        )

    def state(self) -> dict[str, Any]:
        return {
            "encoder": self.encoder.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.encoder.load_state_dict(state["encoder"])
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])

    def export(self, folder: Path) -> None:
        """Write `tokenizer/` and `text_encoder/`."""
        save_language(folder, self.encoder, self.tokenizer)
