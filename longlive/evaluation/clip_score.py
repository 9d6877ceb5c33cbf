"""CLIP score of every stretch of a video against the prompt that it should show (interactive protocol of the LongLive paper, table 2).

Two images per second, mean cosine of their embeddings and the prompt's, times 100; OpenCLIP ViT-B/32 in transformers' layout. Knows nothing
of how videos were made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

from longlive import video

IMAGES_PER_SECOND = 2
WEIGHTS = "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K --local-dir FOLDER, then --clip FOLDER"


class Stretch(NamedTuple):
    """Part of a video, `begin` to `end` in seconds, that should show the prompt."""

    begin: float
    end: float
    prompt: str


def stretches(prompts: Sequence[str], durations: Sequence[float]) -> list[Stretch]:
    """The stretches of consecutive prompts; `durations` in seconds."""
    ends = np.cumsum(durations).tolist()
    return [Stretch(begin, end, prompt) for begin, end, prompt in zip([0.0, *ends], ends, prompts)]


def moments(stretch: Stretch, *, fps: float, num_images: int) -> list[int]:
    """The images to embed, in the middle of equal parts of the stretch; none beyond the video's end."""
    count = max(1, round((stretch.end - stretch.begin) * IMAGES_PER_SECOND))
    step = (stretch.end - stretch.begin) / count
    seconds = [stretch.begin + (number + 0.5) * step for number in range(count)]
    return [index for second in seconds if (index := int(second * fps)) < num_images]


def _digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, independent of the files that they came from."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weight.contiguous().view(torch.uint8).numpy().tobytes() if weight.ndim else str(weight.item()).encode())
    return found.hexdigest()


class ClipScore:
    """A CLIP model with its processor; `digest`: of its weights; `max_tokens`: how much of a prompt it reads.

    Raises:
        ValueError: when the folder or model name cannot be loaded, with how to get it, or lacks weights.
    """

    def __init__(self, name: str, *, device: torch.device) -> None:
        try:
            loaded: Any = CLIPModel.from_pretrained(name, local_files_only=True, output_loading_info=True)
            self._processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
        except OSError as error:
            raise ValueError(f"CLIP is not there as {name}; {WEIGHTS}") from error
        model, found = loaded
        if found["missing_keys"] or found["mismatched_keys"]:
            strange = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
            raise ValueError(f"{name} lacks {len(strange)} of CLIP's weights, {strange[0]} for example; {WEIGHTS}")
        self.digest = _digest(model)
        self._model = model.to(device).eval()
        self.max_tokens: int = self._model.config.text_config.max_position_embeddings

    def num_tokens(self, prompt: str) -> int:
        """Of a prompt; CLIP ignores those beyond `max_tokens`."""
        return len(self._processor.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def cosine(self, images: Sequence[np.ndarray], prompt: str) -> float:
        """Mean cosine of images, uint8 `[H, W, 3]`, and a prompt, times 100."""
        device = self._model.device
        text = self._processor.tokenizer([prompt], truncation=True, max_length=self.max_tokens, return_tensors="pt")
        seen = self._processor.image_processor(images=list(images), return_tensors="pt")
        found = self._model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=seen["pixel_values"].to(device),
        )
        image, words = (torch.nn.functional.normalize(one, dim=-1) for one in (found.image_embeds, found.text_embeds))
        return float(100 * (image @ words.T).mean())

    def of_video(self, path: Path, parts: Sequence[Stretch]) -> list[float]:
        """One score per stretch; NaN for one that begins beyond the video's end."""
        info = video.probe(path)
        wanted = [moments(part, fps=info.fps, num_images=info.images) for part in parts]
        indices = sorted({index for part in wanted for index in part})
        images = dict(zip(indices, video.read_images(path, indices)))
        return [
            self.cosine([images[index] for index in part], stretch.prompt) if part else float("nan") for part, stretch in zip(wanted, parts)
        ]
