"""Measure the miniature with its oracle: `python scripts/evaluate_miniature.py [--model FOLDER] [--output DIR]`.

Videos of held-out prompts (combinations of attributes that are not in the training set) by the ordinary pipeline, and reconstructions by
the autoencoder at three lengths. Writes results.json and two pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature import oracle
from longlive.miniature.captions import canonical, caption
from longlive.miniature.world import ATTRIBUTES, Captioned, draw_identity, held_out, render
from longlive.models.vae import decode_video, encode_video
from longlive.training.miniature.latent_videos import save_strips, to_float, to_uint8
from longlive.video import contact_sheet

PARTS = ("autoencoder", "canonical", "phrased")


def scores(videos: Tensor, captions: list[Captioned], frames: slice = slice(None)) -> dict[str, float]:
    """Share of videos that show each attribute, by majority over `frames`, and the mean overlap with the best template."""
    reading = oracle.read(videos)
    right = {name: value.float().mean().item() for name, value in reading.correct(captions, frames).items()}
    return {**{name: round(right[name], 4) for name in ATTRIBUTES}, "iou": round(reading.iou[:, frames].mean().item(), 4)}


def generate(pipe: LongLivePipeline, prompts: list[str], num_latent_frames: int, seed: int) -> Tensor:
    """One video per prompt, uint8 `[B, T, 3, Y, X]`, with seeds seed, seed + 1, …"""
    videos = []
    for number, prompt in enumerate(tqdm(prompts, desc="videos", mininterval=5)):
        session = pipe.session(prompt, num_latent_frames=num_latent_frames, generator=torch.Generator().manual_seed(seed + number))
        videos.append(torch.cat([block.images for block in session], dim=1)[0].movedim(-1, 1))
    return torch.stack(videos)


@torch.no_grad()
def reconstructions(pipe: LongLivePipeline, captions: list[Captioned], num_images: int) -> tuple[Tensor, Tensor]:
    """Originals and their reconstructions, uint8 `[B, T, 3, Y, X]`."""
    generator = torch.Generator().manual_seed(5)
    originals = render(captions, [draw_identity(generator) for _ in captions], num_images)
    parts = [to_uint8(decode_video(pipe.vae, encode_video(pipe.vae, to_float(part)))) for part in originals.split(10)]
    return originals, torch.cat(parts)


def measure_autoencoder(pipe: LongLivePipeline, captions: list[Captioned], output: Path) -> dict[str, Any]:
    results = {}
    for num_images, count in ((33, len(captions)), (97, len(captions)), (385, min(20, len(captions)))):
        originals, decoded = reconstructions(pipe, captions[:count], num_images)
        error = (originals.float() - decoded.float()).square().mean() / 255**2
        results[f"autoencoder_{num_images}"] = {
            "videos": count,
            **scores(decoded, captions[:count]),
            "psnr": round(-10 * error.log10().item(), 2),
        }
        if num_images == 97:
            save_strips(torch.stack([originals[:6], decoded[:6]], 1).flatten(0, 1), output / "reconstructions.png")
    return results


def measure_prompts(
    pipe: LongLivePipeline, name: str, captions: list[Captioned], prompts: list[str], num_latent_frames: int, output: Path
) -> dict[str, Any]:
    began = time.perf_counter()
    videos = generate(pipe, prompts, num_latent_frames, seed=1000)
    seconds = (time.perf_counter() - began) / len(prompts)
    picks = torch.linspace(0, videos.shape[1] - 1, 6).round().long()
    shown = range(min(12, len(prompts)))
    tiles = [videos[i, t].movedim(0, -1).numpy() for i in shown for t in picks]
    words = [f"{t / pipe.info.fps:.1f} s\n{prompts[i]}" for i in shown for t in picks.tolist()]
    contact_sheet(tiles, output / f"contact_sheet_{name}.png", columns=6, captions=words, title="held-out prompts")
    whole = {"videos": len(prompts), "images": videos.shape[1], **scores(videos, captions), "seconds_a_video": round(seconds, 2)}
    return {name: whole, f"{name}_last_second": scores(videos, captions, slice(videos.shape[1] - 16, videos.shape[1]))}


def evaluate(pipe: LongLivePipeline, parts: Sequence[str], output: Path, *, num_prompts: int, num_latent_frames: int) -> dict[str, Any]:
    """Measure the given parts; what results.json says of the others stays."""
    captions = held_out(num_prompts)
    file = output / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if "autoencoder" in parts:
        results |= measure_autoencoder(pipe, captions, output)
    if "canonical" in parts:
        results |= measure_prompts(pipe, "canonical", captions, [canonical(c) for c in captions], num_latent_frames, output)
    if "phrased" in parts:
        phrasing = torch.Generator().manual_seed(7)
        results |= measure_prompts(pipe, "phrased", captions, [caption(c, phrasing) for c in captions], num_latent_frames, output)
    file.write_text(json.dumps(results, indent=2) + "\n")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--output", type=Path, default=Path("docs/miniature"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--num-latent-frames", type=int, default=21, help="latent frames per video")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more do not speed up a model this small, and slow it down beside other programs
    try:
        pipe = LongLivePipeline.from_pretrained(arguments.model)
        results = evaluate(
            pipe, arguments.parts, arguments.output, num_prompts=arguments.num_prompts, num_latent_frames=arguments.num_latent_frames
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
