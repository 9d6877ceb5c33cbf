"""Combine the exports of the miniature's stages into one pipeline folder: `python scripts/bundle_miniature.py`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from longlive.checkpoints import store
from longlive.checkpoints.lora import load_lora
from longlive.generation.pipeline import BUNDLED, LongLivePipeline
from longlive.miniature.world import SIZE
from longlive.models.lora import merge_lora
from longlive.models.wan import WanTransformer
from longlive.training.networks import load_network

STAGES = ("long", "init", "causal_init")  # the first of these that is finished is bundled


def export_of(runs: Path, stage: str) -> Path:
    """The export of a stage: that of its best validation, if it kept one."""
    best = runs / stage / "best"
    return best if best.is_dir() else runs / stage / "export"


def transformer_of(runs: Path, stage: str) -> WanTransformer:
    """The transformer of a stage; the adapters of `long` are merged into the weights they were trained on."""
    export = export_of(runs, stage)
    if stage != "long":
        return load_network(export)
    settings = json.loads((runs / stage / "settings.json").read_text())["settings"]["long"]
    return merge_lora(load_network(settings["generator"]), load_lora(export / "lora.pt"), alpha=settings["lora_alpha"])


def bundle(runs: Path, to: Path, *, stage: str, guidance_scale: float, teacher: bool = False) -> int:
    """Write the pipeline with the settings of its transformer's training; returns its size in bytes."""
    settings = json.loads((runs / stage / "settings.json").read_text())["settings"][stage]
    encoder, tokenizer = store.load_text_encoder(runs / "language" / "export")
    distilled = stage != "causal_init"
    pipe = LongLivePipeline(
        transformer_of(runs, stage).eval(),
        store.load_vae(runs / "autoencoder" / "export"),
        encoder,
        tokenizer,
        window=settings["window"],
        sink=settings["sink"],
        block=settings["block"],
        denoising_steps=list(settings["denoising_steps"]),
        timestep_shift=settings["timestep_shift"],
        fresh_noise=distilled,  # before distillation: Euler steps of the flow, guided
        guidance_scale=1.0 if distilled else guidance_scale,
        guided_blocks=None if distilled else 1,
        keep_sink=settings["keep_sink"] if distilled else True,
        height=SIZE,
        width=SIZE,
    )
    pipe.save_pretrained(to)
    if teacher:
        load_network(export_of(runs, "teacher")).save_pretrained(to / "teacher" / "transformer")
    return sum(file.stat().st_size for file in to.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/miniature"))
    parser.add_argument("--to", type=Path, default=BUNDLED["miniature"])
    parser.add_argument("--stage", choices=STAGES, help="whose transformer; by default that of the last finished stage")
    parser.add_argument("--teacher", action="store_true", help="also write the teacher, which stages init and long need, to teacher/")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of causal_init (default %(default)s)")
    arguments = parser.parse_args()
    finished = [stage for stage in STAGES if (arguments.runs / stage / "export").is_dir()]
    try:
        if not finished:
            raise ValueError(f"no stage in {arguments.runs} is finished")
        stage = arguments.stage or finished[0]
        size = bundle(arguments.runs, arguments.to, stage=stage, guidance_scale=arguments.guidance_scale, teacher=arguments.teacher)
        print(f"{arguments.to}: the result of {stage}, {size / 2**20:.1f} MiB")
    except (ValueError, OSError) as error:
        print(f"error: {error}; train the stages first (configs/miniature/)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
