"""Weights on disk: read any released layout, identify it, refuse what does not fit, write shards.

Files are memory-mapped, so a weight needs memory only when it is used; files that could run code are refused. Names are translated by
`checkpoints.convert`. Builds only networks of other libraries (the VAE of diffusers, the text encoder of transformers); of ours it knows
the shapes it is given.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longlive.checkpoints import configs, convert
from longlive.checkpoints.convert import State, some
from longlive.files import replacing

GENERATORS = ("generator", "generator_ema", "model")
SHORT = {"ema": "generator_ema"}  # of names of parts
RELEASED = ("models/longlive_base.pt", "longlive_base.pt", "checkpoints/self_forcing_dmd.pt", "self_forcing_dmd.pt", "ode_init.pt")
WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}


class WeightsKind(str, Enum):
    """What a set of weights is, identified by its names; the value is a description."""

    WAN = "a Wan transformer (original names)"
    WAN_DIFFUSERS = "a Wan transformer (diffusers' names)"
    LORA = "a LoRA"
    VAE = "a Wan VAE (original names)"
    VAE_DIFFUSERS = "a Wan VAE (diffusers' names)"
    TEXT = "a T5 text encoder (original names)"
    TEXT_TRANSFORMERS = "a T5 text encoder (transformers' names)"
    CHECKPOINT = "a checkpoint of several parts"
    UNKNOWN = "unknown weights"


MARKS = {
    WeightsKind.WAN: "blocks.0.self_attn.q.weight",
    WeightsKind.WAN_DIFFUSERS: "blocks.0.attn1.to_q.weight",
    WeightsKind.VAE: "decoder.middle.0.residual.0.gamma",
    WeightsKind.VAE_DIFFUSERS: "decoder.mid_block.resnets.0.norm1.gamma",
    WeightsKind.TEXT: "blocks.0.attn.q.weight",
    WeightsKind.TEXT_TRANSFORMERS: "encoder.block.0.layer.0.SelfAttention.q.weight",
}


LORA_MARK = re.compile(r"\.(lora_[AB]|lora_down|lora_up|lora\.down|lora\.up|hada_w1_a|lokr_w1|dora_scale)(\.|$)")


class Transformer(NamedTuple):
    """Weights under original Wan names, and the constructor arguments from a `config.json` beside them (None without one)."""

    state: State
    config: dict[str, Any] | None


def identify(state: Mapping[str, Any]) -> WeightsKind:
    """What `state` is: one network's weights, or a checkpoint whose values are such mappings."""
    if any(isinstance(value, Mapping) for value in state.values()):
        return WeightsKind.CHECKPOINT
    if any(LORA_MARK.search(name) for name in state):
        return WeightsKind.LORA
    names = {convert.clean_name(name) for name in state}
    return next((kind for kind, mark in MARKS.items() if mark in names), WeightsKind.UNKNOWN)


def describe(state: Mapping[str, Any]) -> str:
    """`identify` in words, with sizes: "a LoRA (original names): 600 tensors, 350.2 million numbers, float32"."""
    kind = identify(state)
    if kind is WeightsKind.CHECKPOINT:
        return f"{kind.value}: {', '.join(name for name, value in state.items() if isinstance(value, Mapping))}"
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    dtypes = "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    names = f" ({some(list(state), 3)})" if kind is WeightsKind.UNKNOWN else ""
    return f"{kind.value}{names}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors) / 1e6:.1f} million numbers, {dtypes}"


def check_fit(expected: Mapping[str, torch.Size | tuple[int, ...]], state: Mapping[str, Tensor], *, what: str = "the model") -> None:
    """Raises ValueError unless `state` has exactly the names and shapes of `expected`; says what is missing, unexpected or of another
    shape, and what the weights are instead."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    other = [name for name in expected if name in state and tuple(state[name].shape) != tuple(expected[name])]
    shapes = [f"{name} is {list(state[name].shape)} instead of {list(expected[name])}" for name in other]
    problems = ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
    wrong = [f"{len(names)} {words} ({some(names, 3)})" for names, words in problems if names]
    if wrong:
        raise ValueError(f"the weights do not fit {what}: {'; '.join(wrong)}. They look like {describe(state)}")


def fill(model: nn.Module, state: Mapping[str, Tensor], *, what: str, dtype: torch.dtype | None = None) -> None:
    """Make `state` the weights of `model`, which may be on the meta device; raises ValueError as `check_fit` does.

    Tensors are assigned, and copied only to cast them to `dtype`: changing the model in place (merging a LoRA) changes `state`.
    """
    check_fit({name: tensor.shape for name, tensor in model.state_dict().items()}, state, what=what)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)


def read(path: str | Path) -> dict[str, Any]:
    """The contents of a `.safetensors` file, an index of shards, a `.pt` or `.pth` file, or of a folder with one of them; memory-mapped.

    Raises FileNotFoundError when there is none, ValueError when the file is damaged or contains more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found{_advice(path)}")
    if path.name.endswith(".index.json"):
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        return {name: tensor for shard in shards for name, tensor in read(path.parent / shard).items()}
    if path.suffix not in WEIGHTS:
        raise ValueError(f"{path} is not a weights file; known suffixes are {', '.join(sorted(WEIGHTS))}")
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            raise ValueError(f"{path} is only a Git LFS pointer: the weights were not downloaded{_advice(path)}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} contains more than tensors or is not a weights file: refused, since reading it could run code") from error
    except (RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({path.stat().st_size:,} bytes); download it again") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} contains a {type(state).__name__}, not named weights")
    wrapped = state.get("state_dict")  # of Lightning and of many training scripts
    return dict(wrapped) if isinstance(wrapped, Mapping) and not any(name in state for name in GENERATORS) else dict(state)


def load_transformer(path: str | Path, *, which: str | None = None) -> Transformer:
    """A Wan transformer from any layout, under original names: a folder of original Wan, diffusers (or its `transformer/`), LongLive or
    our `save_pretrained`; `longlive_base.pt`, `self_forcing_dmd.pt`, `ode_init.pt`; a single weights file.

    `which` names the part of a checkpoint (`generator`, `generator_ema` or `ema`, `critic`, …; None: the first of generator, generator_ema,
    model). Raises ValueError when the file is something else, or has no such part.
    """
    path = Path(path)
    if path.is_dir():
        released = [path / name for name in RELEASED if (path / name).is_file()]
        if (path / "transformer").is_dir():
            path = path / "transformer"
        elif released and not (path / "config.json").is_file():
            path = released[0]
    state = _part(read(path), which, path)
    kind = identify(state)
    if kind is WeightsKind.WAN:
        state = convert.clean_names(state)
    elif kind is WeightsKind.WAN_DIFFUSERS:
        state = convert.transformer_to_wan(convert.clean_names(state))
    else:
        advice = "; it goes on top of a transformer (--lora, lora_pt=)" if kind is WeightsKind.LORA else ""
        raise ValueError(f"{path} contains no Wan transformer but {describe(state)}{advice}")
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    beside = config_file.is_file() and (path.is_dir() or path.name.startswith("diffusion_pytorch_model"))
    return Transformer(state, configs.config_to_wan(json.loads(config_file.read_text())) if beside else None)


def load_vae(path: str | Path, *, dtype: torch.dtype | None = None) -> AutoencoderKLWan:
    """The VAE from a folder of original Wan (`Wan2.1_VAE.pth`) or of diffusers (`vae/`), or from a file; `dtype` None keeps the file's."""
    path = _component(Path(path), "vae", "Wan2.1_VAE.pth")
    state = read(path)
    kind = identify(state)
    if kind not in (WeightsKind.VAE, WeightsKind.VAE_DIFFUSERS):
        raise ValueError(f"{path} contains no Wan VAE but {describe(state)}")
    if path.is_dir():
        config = json.loads((path / "config.json").read_text())
    else:
        config = configs.vae_config(convert.vae_to_wan(state) if kind is WeightsKind.VAE_DIFFUSERS else state)
    ours = {name: config.pop(name) for name in ("spatial_padding",) if name in config}  # see models/vae.py; diffusers would warn of it
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    assert isinstance(vae, AutoencoderKLWan)
    vae.register_to_config(**ours)
    fill(vae, convert.vae_to_diffusers(state) if kind is WeightsKind.VAE else state, what=f"the VAE in {path}", dtype=dtype)
    return vae.eval()


def load_text_encoder(folder: str | Path, *, dtype: torch.dtype | None = None) -> tuple[UMT5EncoderModel, PreTrainedTokenizerBase]:
    """The text encoder and its tokenizer from a folder of original Wan (`models_t5_*.pth`, `google/umt5-xxl/`) or of diffusers
    (`text_encoder/`, `tokenizer/`); `dtype` None keeps that of the file."""
    folder = Path(folder)
    return load_text_model(folder, dtype=dtype), load_tokenizer(tokenizer_folder(folder))


def load_text_model(path: str | Path, *, dtype: torch.dtype | None = None) -> UMT5EncoderModel:
    """The text encoder without its tokenizer, from a folder as for `load_text_encoder` or from a file."""
    path = _component(Path(path), "text_encoder", "models_t5_*.pth")
    state = read(path)
    kind = identify(state)
    if kind not in (WeightsKind.TEXT, WeightsKind.TEXT_TRANSFORMERS):
        raise ValueError(f"{path} contains no T5 text encoder but {describe(state)}")
    original = state if kind is WeightsKind.TEXT else convert.text_to_wan(state)
    config = UMT5Config.from_pretrained(path) if path.is_dir() else UMT5Config(**configs.text_config(original))
    with torch.device("meta"):
        encoder = UMT5EncoderModel(config)
    # Two modules share the token embedding, which is in the file once: assigning weights unties it, so tie it again.
    state = convert.text_to_transformers(original)
    fill(encoder, state | {"encoder.embed_tokens.weight": state["shared.weight"]}, what=f"the text encoder in {path}", dtype=dtype)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight
    return encoder.eval()


def tokenizer_folder(folder: str | Path) -> Path:
    """The tokenizer's folder within a folder of original Wan or of diffusers."""
    original = Path(folder) / "google" / "umt5-xxl"
    return original if original.is_dir() else Path(folder) / "tokenizer"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, exactly as its `tokenizer.json` defines it: from that file transformers 5 would build a T5 tokenizer with
    other rules for white space and Unicode than those Wan was trained with."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} not found{_advice(folder)}")
    if not (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    tokens = {key: config[key] for key in ("pad_token", "eos_token", "unk_token") if config.get(key)}
    tokens = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens)


def write_safetensors(
    state: Mapping[str, Tensor],
    folder: str | Path,
    *,
    name: str = "diffusion_pytorch_model",
    config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write `folder/name.safetensors`, or shards and their index, with `config.json` beside it. An interrupted call leaves no files.

    Raises OSError before anything is written when the disk has too little space.
    """
    folder = Path(folder)
    _make_room(folder, state)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as part:
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        save_torch_state_dict(tensors, part, filename_pattern=name + "{suffix}.safetensors", max_shard_size=max_shard_size)
        if config is not None:
            (Path(part) / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        for file in Path(part).iterdir():
            file.chmod(folder.stat().st_mode & 0o666)  # safetensors creates files that only their owner can read
            file.replace(folder / file.name)


def write_pt(parts: Mapping[str, Any], path: str | Path) -> None:
    """Write `parts` (weights, or named mappings of weights) to a `.pt` file, atomically. Raises OSError when the disk is too full."""
    path = Path(path)
    tensors = {f"{part}.{name}": tensor for part, value in parts.items() if isinstance(value, Mapping) for name, tensor in value.items()}
    _make_room(path.parent, tensors | {name: value for name, value in parts.items() if isinstance(value, Tensor)})
    with replacing(path) as partial:
        torch.save(dict(parts), partial)


def _part(state: dict[str, Any], which: str | None, path: Path) -> State:
    which = None if which is None else SHORT.get(which, which)
    parts = [name for name, value in state.items() if isinstance(value, Mapping)]
    if not parts:
        if which not in (None, "generator"):
            raise ValueError(f"{path} has no part {which!r}; it is {describe(state)}")
        return state
    chosen = which or next((name for name in GENERATORS if name in parts), None)
    if chosen not in parts:
        advice = "; a LoRA goes on top of a transformer (--lora, lora_pt=)" if "generator_lora" in parts else ""
        raise ValueError(f"{path} has no {which or 'generator'!r}; it has {', '.join(parts)}{advice}")
    return dict(state[chosen])


def weights_file(folder: Path) -> Path:
    """The only index, or else the only weights file, in `folder`."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.pt", "*.bin"):
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            names = some([file.name for file in files])
            raise ValueError(f"{folder} has {len(files)} weights files ({names}) and no index; name one of them")
        if files:
            return files[0]
    raise FileNotFoundError(f"no weights in {folder}{_advice(folder)}")


def _component(path: Path, name: str, original: str) -> Path:
    """The file or diffusers folder of a component, when `path` is the folder that contains it."""
    if not path.is_dir() or (path.name == name and (path / "config.json").is_file()):
        return path
    if (path / name / "config.json").is_file():
        return path / name
    files = sorted(path.glob(original))
    if not files:
        raise FileNotFoundError(f"neither {original} nor {name}/ in {path}{_advice(path / original)}")
    return files[0]


def _advice(path: Path) -> str:
    """How to download what is missing at `path`, as the end of a sentence."""
    words = "/".join(path.parts[-3:]).lower()
    if "longlive" in words or path.name == "lora.pt":
        folder = path.parent.parent if path.suffix in WEIGHTS else path
        return f"; download it with: hf download Efficient-Large-Model/LongLive-1.3B --local-dir {folder}"
    if "self_forcing" in words or path.name == "ode_init.pt":
        return f"; download it with: hf download gdhe17/Self-Forcing {path.name} --local-dir {path.parent}"
    if path.name in ("export", "best") or path.parent.name in ("export", "best"):
        return "; a training writes it at its end (`best`: with keep_best)"
    for name in ("google", "transformer", "vae", "text_encoder", "tokenizer"):
        if name in path.parts:
            path = Path(*path.parts[: path.parts.index(name)])
    folder = path.parent if path.suffix in WEIGHTS else path
    return f"; download it with: hf download Wan-AI/Wan2.1-T2V-1.3B{'-Diffusers' if 'diffusers' in words else ''} --local-dir {folder}"


def _make_room(folder: Path, state: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.nbytes for tensor in state.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{needed / 1e9:.1f} GB are needed in {folder}, which has {free / 1e9:.1f} GB free")
