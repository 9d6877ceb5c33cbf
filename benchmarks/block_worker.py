"""Makes one block of a video for every line it is sent: the other end of `in_turn.py`, in a process with a version of the package.

Imports nothing of this folder but for the plain way, and of the package only what older versions have too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from longlive import LongLivePipeline, PromptSchedule
from longlive.miniature.language import build_tokenizer
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments

PROMPT = "a red circle moving right on a black background"


def pipeline(way: str, size: str, layers: int, **settings: Any) -> LongLivePipeline:
    """A pipeline of random weights, the same ones in every version; its decoder is not used."""
    if way == "reference":
        from random_model import build

        return build(size, device=torch.device("cpu"), dtype=torch.float32, reference=True, layers=layers, **settings)
    torch.manual_seed(0)
    transformer = WanTransformer(**{**arguments(size), "num_layers": layers}).eval().requires_grad_(False)
    for part in transformer.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.02)
    vae = AutoencoderKLWan(base_dim=8, z_dim=transformer.config.in_dim, dim_mult=[1, 1, 1, 1], num_res_blocks=0)
    tokenizer, width = build_tokenizer(), transformer.config.text_dim
    reader = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, num_heads=1, d_ff=8, num_layers=1))
    pipe = LongLivePipeline(transformer, vae, reader, tokenizer, **settings)
    if way in ("int8", "fp8"):
        pipe.accelerate(quantize=way)  # type: ignore[arg-type]
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way")
    parser.add_argument("size")
    parser.add_argument("layers", type=int)
    parser.add_argument("height", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("latents", type=Path, help="where to write the latents of all blocks at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = pipeline(options.way, options.size, options.layers, height=options.height, width=options.width)
    generator = torch.Generator().manual_seed(0)
    blocks, made = iter(pipe.stream(PromptSchedule.single(PROMPT), num_latent_frames=None, generator=generator)), []
    for _ in sys.stdin:
        began = time.thread_time()
        made.append(next(blocks).latents)
        print(json.dumps(time.thread_time() - began), flush=True)
    torch.save(torch.cat(made, dim=1), options.latents)


if __name__ == "__main__":
    main()
