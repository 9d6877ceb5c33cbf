"""CLIP score of every prompt's interval of a video against that prompt (interactive protocol of the LongLive paper, table 2).

Two frames per second, mean cosine of their embeddings and the prompt's, times 100; OpenCLIP ViT-B/32 in transformers' layout.
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

FRAMES_PER_SECOND = 2
WEIGHTS = "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K --local-dir FOLDER, then --clip FOLDER"


class PromptInterval(NamedTuple):
    """The part of a video, `begin` to `end` in seconds, that should show the prompt."""

    begin: float
    end: float
    prompt: str


def prompt_intervals(prompts: Sequence[str], durations: Sequence[float]) -> list[PromptInterval]:
    """The intervals of consecutive prompts; `durations` in seconds."""
    ends = np.cumsum(durations).tolist()
    return [PromptInterval(begin, end, prompt) for begin, end, prompt in zip([0.0, *ends], ends, prompts)]


def sampled_frames(interval: PromptInterval, *, fps: float, num_frames: int) -> list[int]:
    """The frames to embed, in the middle of equal parts of the interval; none beyond the video's end."""
    count = max(1, round((interval.end - interval.begin) * FRAMES_PER_SECOND))
    step = (interval.end - interval.begin) / count
    seconds = [interval.begin + (number + 0.5) * step for number in range(count)]
    return [index for second in seconds if (index := int(second * fps)) < num_frames]


def _digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, independent of the files that they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes() if weight.ndim else str(weight.item()).encode())
    return digest.hexdigest()


class ClipScore:
    """A CLIP model with its processor; `digest`: of its weights; `max_tokens`: how much of a prompt it reads.

    Raises:
        ValueError: when the folder or model name cannot be loaded, with the command that downloads it, or lacks weights.
    """

    def __init__(self, name: str, *, device: torch.device) -> None:
        try:
            loaded: Any = CLIPModel.from_pretrained(name, local_files_only=True, output_loading_info=True)
            self._processor = CLIPProcessor.from_pretrained(name, local_files_only=True)
        except OSError as error:
            raise ValueError(f"there is no CLIP model {name}; {WEIGHTS}") from error
        model, keys = loaded
        if missing := sorted(map(str, [*keys["missing_keys"], *keys["mismatched_keys"]])):
            raise ValueError(f"{name} lacks {len(missing)} of CLIP's weights, {missing[0]} for example; {WEIGHTS}")
        self.digest = _digest(model)
        self._model = model.to(device).eval()
        self.max_tokens: int = self._model.config.text_config.max_position_embeddings

    def num_tokens(self, prompt: str) -> int:
        """Length of a prompt in tokens; CLIP ignores those beyond `max_tokens`."""
        return len(self._processor.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def cosine(self, images: Sequence[np.ndarray], prompt: str) -> float:
        """Mean cosine of frames, uint8 `[H, W, 3]`, and a prompt, times 100."""
        device = self._model.device
        text = self._processor.tokenizer([prompt], truncation=True, max_length=self.max_tokens, return_tensors="pt")
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt")
        embedded = self._model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=pixels["pixel_values"].to(device),
        )
        image, words = (torch.nn.functional.normalize(embeds, dim=-1) for embeds in (embedded.image_embeds, embedded.text_embeds))
        return float(100 * (image @ words.T).mean())

    def score_video(self, path: Path, intervals: Sequence[PromptInterval]) -> list[float]:
        """One score per interval; NaN for one that begins beyond the video's end."""
        info = video.probe(path)
        sampled = [sampled_frames(interval, fps=info.fps, num_frames=info.images) for interval in intervals]
        indices = sorted({index for frames in sampled for index in frames})
        images = dict(zip(indices, video.read_images(path, indices)))
        return [
            self.cosine([images[index] for index in frames], interval.prompt) if frames else float("nan")
            for frames, interval in zip(sampled, intervals)
        ]
