"""Convert weights of Wan, LongLive and Self-Forcing between layouts, and merge a LoRA.

    longlive convert --from longlive_models/models/longlive_base.pt --lora longlive_models/models/lora.pt \
        --to diffusers --output out
    longlive convert --from wan_models/Wan2.1-T2V-1.3B --to diffusers --output Wan2.1-T2V-1.3B-Diffusers
    longlive convert --from some_file.pt          (says what it is)

Layouts, of `--from` and `--to` (components that the source lacks are left out):
    wan           config.json, diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/
    diffusers     transformer/ vae/ text_encoder/ tokenizer/ scheduler/; a LoRA as pytorch_lora_weights.safetensors
    longlive      models/longlive_base.pt, or models/lora.pt
    self-forcing  self_forcing_dmd.pt (generator and generator_ema, the same weights)
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers import __version__ as diffusers_version

from longlive.checkpoints import configs, convert, store
from longlive.checkpoints.lora import load_lora, lora_files, lora_ranks, lora_to_diffusers
from longlive.checkpoints.store import WeightsKind
from longlive.models.lora import merge_lora
from longlive.models.wan import WanTransformer

LAYOUTS = ("wan", "diffusers", "longlive", "self-forcing")
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
PIPELINE = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def parse(argv: Sequence[str] | None, *, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="a file, or a folder of one of the layouts")
    parser.add_argument("--to", choices=LAYOUTS, help="layout to write; without it the source is only described")
    parser.add_argument("--output", type=Path, help="folder to write to")
    parser.add_argument("--which", help="part of a checkpoint: generator, generator_ema, critic, generator_lora, …")
    parser.add_argument("--lora", type=Path, help="a LoRA to merge into the transformer, FILE or FILE:STRENGTH")
    parser.add_argument("--alpha", type=float, help="alpha of that LoRA, if it does not say its own (default: its rank)")
    parser.add_argument("--num-heads", type=int, help="for a single file whose heads are not 128 wide")
    parser.add_argument("--dtype", choices=DTYPES, default="keep")
    parser.add_argument("--max-shard-size", default="5GB")
    args = parser.parse_args(argv)
    if (args.to is None) != (args.output is None):
        parser.error("--to and --output go together")
    if args.alpha is not None and args.lora is None:
        parser.error("--alpha is the strength of the LoRA to merge; give the LoRA with --lora")
    return args


def components(source: Path) -> list[str]:
    """Which of transformer, vae, text_encoder and lora `source` contains."""
    if source.is_dir() and not (source / "adapter_config.json").is_file():
        places = {
            "transformer": ("transformer", "diffusion_pytorch_model*.safetensors*", *store.RELEASED),
            "vae": ("vae", "Wan2.1_VAE.pth"),
            "text_encoder": ("text_encoder", "models_t5_*.pth"),
        }
        found = [name for name, patterns in places.items() if any(any(source.glob(pattern)) for pattern in patterns)]
        return found or ["transformer"]
    state = store.read(source)
    kind = store.identify(state)
    if kind is WeightsKind.CHECKPOINT:
        return ["transformer" if any(name in state for name in (*store.GENERATORS, "critic")) else "lora"]
    names = {
        WeightsKind.LORA: "lora",
        WeightsKind.VAE: "vae",
        WeightsKind.VAE_DIFFUSERS: "vae",
        WeightsKind.TEXT: "text_encoder",
        WeightsKind.TEXT_TRANSFORMERS: "text_encoder",
    }
    return [names.get(kind, "transformer")]


def convert_transformer(args: argparse.Namespace) -> Iterator[str]:
    state, config = store.load_transformer(args.source, which=args.which)
    yield f"found {store.describe(state)}"
    with torch.device("meta"):
        model = WanTransformer(**(config or configs.transformer_config(state, num_heads=args.num_heads)))
    store.fill(model, state, what=f"a transformer of {model.config.num_layers} blocks of width {model.config.dim}")
    if args.lora is not None:
        for lora in lora_files(str(args.lora), alpha=args.alpha):
            merge_lora(model, load_lora(lora.path, alpha=lora.alpha), strength=lora.strength)
        yield f"merged {args.lora}"
    if args.to is not None:
        torch.nn.Module.to(model, DTYPES[args.dtype] or model.dtype)
        yield f"wrote {write_transformer(model, args)}"


def write_transformer(model: WanTransformer, args: argparse.Namespace) -> Path:
    state, config = model.state_dict(), {key: value for key, value in model.config.items() if not key.startswith("_")}
    if args.to == "wan":
        if config["rope_theta"] == 10000:
            del config["rope_theta"]  # not a setting of the original code
        store.write_safetensors(state, args.output, config={"_class_name": "WanModel"} | config, max_shard_size=args.max_shard_size)
        return args.output
    if args.to == "diffusers":
        config = {"_class_name": "WanTransformer3DModel", "_diffusers_version": diffusers_version} | configs.config_to_diffusers(config)
        folder = args.output / "transformer"
        store.write_safetensors(convert.transformer_to_diffusers(state), folder, config=config, max_shard_size=args.max_shard_size)
        return folder
    generator = convert.transformer_to_longlive(state)
    if args.to == "longlive":
        file, parts = args.output / "models" / "longlive_base.pt", {"generator": generator}
    else:
        file, parts = args.output / "self_forcing_dmd.pt", {"generator": generator, "generator_ema": generator}
    store.write_pt(parts, file)
    return file


def convert_vae(args: argparse.Namespace) -> Iterator[str]:
    vae = store.load_vae(args.source, dtype=DTYPES[args.dtype])
    yield f"found {store.describe(vae.state_dict())}"
    if args.to == "wan":
        store.write_pt(convert.vae_to_wan(vae.state_dict()), args.output / "Wan2.1_VAE.pth")
        yield f"wrote {args.output / 'Wan2.1_VAE.pth'}"
    elif args.to == "diffusers":
        vae.save_pretrained(args.output / "vae", max_shard_size=args.max_shard_size)
        yield f"wrote {args.output / 'vae'}"


def convert_text_encoder(args: argparse.Namespace) -> Iterator[str]:
    encoder = store.load_text_model(args.source, dtype=DTYPES[args.dtype])
    yield f"found {store.describe(convert.untied(encoder.state_dict()))}"
    tokenizer = store.tokenizer_folder(args.source)
    if args.to == "wan":
        store.write_pt(convert.text_to_wan(encoder.state_dict()), args.output / T5_FILE)
        yield f"wrote {args.output / T5_FILE}"
    elif args.to == "diffusers":
        encoder.save_pretrained(args.output / "text_encoder", max_shard_size=args.max_shard_size)
        yield f"wrote {args.output / 'text_encoder'}"
    if args.to is not None and tokenizer.is_dir():
        folder = args.output / ("google/umt5-xxl" if args.to == "wan" else "tokenizer")
        shutil.copytree(tokenizer, folder)
        yield f"wrote {folder}"


def convert_lora(args: argparse.Namespace) -> Iterator[str]:
    lora = load_lora(args.source, which=args.which or "generator_lora")
    yield f"found {store.describe(lora)}, rank {', '.join(map(str, lora_ranks(lora)))}"
    if DTYPES[args.dtype]:
        lora = {name: tensor.to(DTYPES[args.dtype]) for name, tensor in lora.items()}
    if args.to == "diffusers":
        store.write_safetensors(lora_to_diffusers(lora), args.output, name="pytorch_lora_weights", max_shard_size="1TB")
        yield f"wrote {args.output / 'pytorch_lora_weights.safetensors'}"
    elif args.to == "longlive":
        store.write_pt({"generator_lora": lora}, args.output / "models" / "lora.pt")
        yield f"wrote {args.output / 'models' / 'lora.pt'}"
    elif args.to is not None:
        raise ValueError(f"a LoRA alone has no {args.to} layout; write it with --to longlive or diffusers, or merge it with --lora")


CONVERTERS = {"transformer": convert_transformer, "vae": convert_vae, "text_encoder": convert_text_encoder, "lora": convert_lora}


def write_pipeline(folder: Path) -> Path:
    """Write the files with which `diffusers.WanPipeline.from_pretrained` loads the folder."""
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    ).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": diffusers_version} | PIPELINE
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder / "model_index.json"


def run(args: argparse.Namespace) -> Iterator[str]:
    """Convert, yielding lines of a report. Raises ValueError or OSError for what cannot be converted."""
    found = components(args.source)
    if args.lora is not None and "transformer" not in found:
        raise ValueError(f"--lora is merged into a transformer, and {args.source} contains {' and '.join(found)}")
    only_networks = args.to in ("longlive", "self-forcing")
    if only_networks and not {"transformer", "lora"} & set(found):
        raise ValueError(f"the {args.to} layout has no {found[0]}; choose --to wan or diffusers")
    if args.output is not None and args.output.is_dir() and any(args.output.iterdir()):
        raise ValueError(f"{args.output} is not empty; choose another folder, or remove it")
    for name in found:
        if only_networks and name in ("vae", "text_encoder"):
            yield f"left out the {name}: the {args.to} layout has none"
        else:
            yield from CONVERTERS[name](args)
    if args.to == "diffusers" and args.output is not None and len(found) == 3:
        yield f"wrote {write_pipeline(args.output)}"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    args = parse(argv, prog=prog)
    try:
        for line in run(args):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
