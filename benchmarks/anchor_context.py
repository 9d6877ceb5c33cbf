"""How many frames must be decoded for the first frame of a clip: `python benchmarks/anchor_context.py [--model miniature]`.

Streaming training decodes 19 latent frames and encodes their last image again (`training.clips.anchor_frame`). The decoder is causal with
a short memory, so fewer frames give nearly the same image. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch

from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature.world import draw_identity, held_out, render
from longlive.models.vae import encode_video
from longlive.training.clips import anchor_frame
from longlive.training.miniature.latent_videos import to_float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="miniature", help="a pipeline in diffusers layout whose VAE is used (default %(default)s)")
    parser.add_argument("--videos", type=int, default=16)
    parser.add_argument("--num-latent-frames", type=int, default=19, help="latent frames (default %(default)s)")
    arguments = parser.parse_args()
    vae = LongLivePipeline.from_pretrained(arguments.model).vae
    generator = torch.Generator().manual_seed(0)
    captions = held_out(arguments.videos)
    images = render(captions, [draw_identity(generator) for _ in captions], 4 * (arguments.num_latent_frames + 6) - 3)
    with torch.no_grad():
        frames = encode_video(vae, to_float(images))[:, 6:]  # from the middle of a video: every frame encodes four images
        whole = anchor_frame(vae, frames)
        alone = frames[:, -1:]
        rows = []
        for context in [n for n in (1, 2, 3, 4, 6, 8, 12, arguments.num_latent_frames) if n <= arguments.num_latent_frames]:
            began = time.perf_counter()
            found = anchor_frame(vae, frames, context=context)
            seconds = time.perf_counter() - began
            error = (found - whole).square().mean().sqrt() / whole.std()
            rows.append({"context": context, "error": error.item(), "largest": (found - whole).abs().max().item(), "seconds": seconds})
        apart = ((alone - whole).square().mean().sqrt() / whole.std()).item()
    print(f"{'frames decoded':>14} {'error / std':>18} {'largest':>9} {'ms':>8}")
    for row in rows:
        print(f"{row['context']:>14} {row['error']:>18.2e} {row['largest']:>9.2e} {1000 * row['seconds']:>8.0f}")
    print(f"the latent frame itself, without encoding: {apart:.2f} standard deviations away")
    print(json.dumps({"model": arguments.model, "rows": rows, "without_encoding": apart}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
