"""Put what the miniature's stages exported together into one pipeline folder: `python scripts/bundle_miniature.py`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longlive.checkpoints import store
from longlive.generation.pipeline import BUNDLED, LongLivePipeline
from longlive.miniature.world import SIZE
from longlive.models.wan import WanTransformer


def bundle(runs: Path, to: Path, *, guidance: float) -> int:
    """Write the pipeline with the settings its transformer was trained with; returns its size in bytes."""
    run = runs / "causal_init"
    settings = json.loads((run / "settings.json").read_text())["settings"]["causal_init"]
    transformer = WanTransformer.from_pretrained(run / "export" / "transformer")
    encoder, tokenizer = store.load_text_encoder(runs / "language" / "export")
    pipe = LongLivePipeline(
        transformer.eval(),
        store.load_vae(runs / "autoencoder" / "export"),
        encoder,
        tokenizer,
        window=settings["window"],
        sink=settings["sink"],
        block=settings["block"],
        denoising_steps=list(settings["denoising_steps"]),
        timestep_shift=settings["timestep_shift"],
        fresh_noise=False,  # not distilled: Euler steps of the flow, guided
        guidance=guidance,
        guided_blocks=1,
        height=SIZE,
        width=SIZE,
    )
    pipe.save_pretrained(to)
    return sum(file.stat().st_size for file in to.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--to", type=Path, default=BUNDLED["miniature"])
    parser.add_argument("--guidance", type=float, default=3.0, help="w of classifier-free guidance (default %(default)s)")
    arguments = parser.parse_args()
    try:
        print(f"{arguments.to}: {bundle(arguments.runs, arguments.to, guidance=arguments.guidance) / 2**20:.1f} MiB")
    except (ValueError, OSError) as error:
        print(f"error: {error}; train the stages first (configs/miniature/)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
