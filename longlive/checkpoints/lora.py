"""LoRAs: every layout that people have, translated into that of the released `lora.pt`, with the strength they were trained for.

Names are those of peft, diffusers, kohya and musubi (`lora_unet_…`, `lora_down`, `.alpha`), ComfyUI (`diffusion_model.`), LightX2V (whole
differences `.diff`, `.diff_b` beside the factors) and wrappers (`module.`, FSDP). In ours, a layer's factors are
`base_model.model.<layer>.lora_A.weight` `[rank, in]` and `.lora_B.weight` `[out, rank]`; the layer's weight changes by B A, since
alpha / rank is multiplied into B. What is added whole is `base_model.model.<layer>.diff` (to the weight) and `.diff_b` (to the bias).

What is not understood is refused by name: a LoRA that is half read looks like a bad one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from longlive.checkpoints import store
from longlive.checkpoints.convert import TRANSFORMER, TRANSFORMER_BLOCK, WRAPPERS, State, some, transformer_stem, transformer_to_diffusers

OURS = "base_model.model."
ADAPTER_CONFIG = "adapter_config.json"  # of peft, beside the weights
DIFFUSERS_METADATA = "lora_adapter_metadata"  # in the header of a safetensors file: peft's configuration as JSON
KOHYA_ALPHA = "ss_network_alpha"  # in the header of files of kohya's trainers, which also hold a tensor `alpha` per layer

_PREFIXES = (*WRAPPERS, "module.", OURS, "diffusion_model.", "model.", "transformer.", "pipe.dit.")
_KOHYA = re.compile(r"lora_(unet|transformer)_")
_PART = re.compile(
    r"(?P<layer>.+?)\.(?:(?:(?P<a>lora_A|lora_down|lora\.down)|(?P<b>lora_B|lora_up|lora\.up))(?:\.\w+)?\.(?P<kind>weight|bias)"
    r"|(?P<other>alpha|diff|diff_b))"
)
# peft's settings that say nothing about what the saved weights mean
_HARMLESS = {
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r", "lora_alpha",
    "use_rslora", "alpha_pattern", "rank_pattern", "lora_dropout", "target_modules", "exclude_modules", "init_lora_weights", "lora_bias",
    "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "megatron_core", "megatron_config", "ensure_weight_tying",
}  # fmt: skip


class LoraFile(NamedTuple):
    """A LoRA to be merged: its file or folder, by how much, and what `load_lora` is told."""

    path: str
    strength: float = 1.0
    alpha: float | None = None
    which: str | None = None


Scale = Callable[[str, int], float]
"""(the layer's name in the file, rank) -> what its B A is multiplied by."""


def lora_files(given: Any, *, alpha: float | None = None) -> list[LoraFile]:
    """What a user writes for LoRAs: a path, `path:strength`, `{"path": …, "strength": …}` (also `alpha`, `which`), or a list of these.

    `alpha`: of those that have none. Raises ValueError, with what was wanted, for anything else.
    """
    if given is None:
        return []
    if isinstance(given, LoraFile):
        return [given if given.alpha is not None else given._replace(alpha=alpha)]
    if isinstance(given, str | Path):
        path, _, strength = str(given).rpartition(":")
        try:
            return [LoraFile(path, _number(float(strength), str(given)), alpha)] if path else [LoraFile(str(given), alpha=alpha)]
        except ValueError:
            return [LoraFile(str(given), alpha=alpha)]  # a colon of the path's own
    if isinstance(given, Mapping):
        if unknown := sorted(set(map(str, given)) - set(LoraFile._fields)):
            raise ValueError(f"a LoRA has no {unknown[0]!r}; write {{path: …, strength: …}}, also with alpha and which")
        if not isinstance(given.get("path"), str | Path):
            raise ValueError(f"this LoRA has no path: {dict(given)}; write {{path: …, strength: …}}")
        strength, own = (None if given.get(name) is None else _number(given[name], name) for name in ("strength", "alpha"))
        return [LoraFile(str(given["path"]), 1.0 if strength is None else strength, alpha if own is None else own, given.get("which"))]
    if isinstance(given, Sequence):
        return [file for part in given for file in lora_files(part, alpha=alpha)]
    raise ValueError(f"{given!r} is no LoRA; write a path, path:strength, or a list of them")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what}: {value!r} is no number")
    return float(value)


def load_lora(source: str | Path | Mapping[str, Any], *, which: str | None = None, alpha: float | None = None) -> State:
    """A LoRA of any layout under the names of `lora.pt` (see above), from a file, a peft folder, or weights at hand.

    Its strength is read from wherever the layout keeps it: tensors `alpha`, `adapter_config.json` in the file's folder, the header of a
    safetensors file; it is multiplied into `lora_B`.

    Args:
        which: the part of a checkpoint; None: `generator_lora`.
        alpha: of a LoRA that does not say its own; None: its rank, as in the released `lora.pt`.

    Raises:
        ValueError: when there is no LoRA, or one that is not understood as a whole; says by name what.
        FileNotFoundError: for a file that is not there.
    """
    where, path = ("the LoRA", None) if isinstance(source, Mapping) else (str(source), Path(source))
    state = dict(source) if isinstance(source, Mapping) else store.read(source)
    parts = store.identify(state) is store.WeightsKind.CHECKPOINT
    if parts:
        if not isinstance(state.get(which or "generator_lora"), Mapping):
            raise ValueError(f"{where} has no LoRA {which or 'generator_lora'!r}; it is {store.describe(state)}")
        state = dict(state[which or "generator_lora"])
    elif which not in (None, "generator_lora"):
        raise ValueError(f"{where} has no part {which!r}; it is {store.describe(state)}")
    if store.identify(state) is not store.WeightsKind.LORA:
        raise ValueError(f"{where} contains no LoRA but {store.describe(state)}")
    scale = None if path is None or parts else _lora_scale(path, alpha)
    try:
        return lora_to_longlive(state, scale=scale, alpha=alpha)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _lora_scale(path: Path, alpha: float | None) -> Scale | None:
    file = store.weights_file(path) if path.is_dir() else path
    config = file.parent / ADAPTER_CONFIG
    if config.is_file() and (path.is_dir() or file.stem == "adapter_model"):
        return peft_scale(json.loads(config.read_text(encoding="utf-8")), where=str(config), alpha=alpha)
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, framework="pt") as header:
        return metadata_scale(header.metadata() or {}, where=str(file), alpha=alpha)


def peft_scale(config: Mapping[str, Any], *, where: str, alpha: float | None = None) -> Scale:
    """The scale of each layer under peft's configuration: alpha / rank, or alpha / sqrt(rank) with `use_rslora`; `alpha_pattern` and
    `rank_pattern` name layers with values of their own.

    `alpha`: for a configuration that has none. Raises ValueError for settings with which B A is not what the adapter adds.
    """
    refused = {name: value for name, value in config.items() if name not in _HARMLESS and value not in (None, False, "none", [], {}, "")}
    if str(config.get("init_lora_weights", True)).partition("_")[0].lower() in ("pissa", "olora", "loftq", "corda", "lora"):
        refused["init_lora_weights"] = config["init_lora_weights"]  # these change the weights under the adapter too
    if config.get("peft_type", "LORA") != "LORA":
        refused["peft_type"] = config["peft_type"]
    if refused:
        settings = ", ".join(f"{name} is {json.dumps(value)}" for name, value in refused.items())
        raise ValueError(f"{where}: this is no plain LoRA ({settings}); merge it with peft where it was trained")
    stored = config.get("lora_alpha")
    if stored is not None and alpha is not None:
        raise ValueError(f"{where} says that alpha is {stored}, and alpha {alpha} is given; leave it out, or give a strength")
    usual = alpha if stored is None else stored
    alphas, ranks = config.get("alpha_pattern") or {}, config.get("rank_pattern") or {}

    def scale(layer: str, rank: int) -> float:
        said = ranks.get(get_pattern_key(list(ranks), layer), config.get("r"))
        if said is not None and said != rank:
            raise ValueError(f"{where} says that {layer} has rank {said}, but its weights have rank {rank}")
        own = alphas.get(get_pattern_key(list(alphas), layer), usual)
        if own is None:
            raise ValueError(f"{where} has no lora_alpha; give alpha (lora_alpha=, peft itself would take 8)")
        return own / math.sqrt(rank) if config.get("use_rslora") else own / rank

    return scale


def metadata_scale(metadata: Mapping[str, str], *, where: str, alpha: float | None = None) -> Scale | None:
    """The scale that the header of a safetensors file says; None when it says nothing. Raises ValueError as `peft_scale` does."""
    if DIFFUSERS_METADATA in metadata:
        config = json.loads(metadata[DIFFUSERS_METADATA])
        config = {name.removeprefix("transformer."): value for name, value in config.items()}
        return peft_scale(config, where=f"{DIFFUSERS_METADATA} of {where}", alpha=alpha)
    if KOHYA_ALPHA in metadata and alpha is None:
        kohya = float(metadata[KOHYA_ALPHA])
        return lambda layer, rank: kohya / rank
    return None


def lora_to_longlive(state: Mapping[str, Tensor], *, scale: Scale | None = None, alpha: float | None = None) -> State:
    """A LoRA of any layout under our names (see above), its scale multiplied into `lora_B`.

    Args:
        scale: of each layer, from a configuration. A layer's own `alpha` in the file says it too; both are then the same or it is an error.
        alpha: of a LoRA that does not say its own; None: its rank.

    Raises:
        ValueError: for names that are not understood, factors without their other half, ranks that differ within a pair, and an `alpha`
            beside one that the file stores.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    unknown, names = [], {}
    for name, tensor in state.items():
        match = _PART.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        role = "A" if match["a"] else "B" if match["b"] else str(match["other"])
        role = role if match["kind"] != "bias" else f"{role}.bias"
        raw = _without_prefixes(match["layer"])
        layer = _layer(raw)
        if layer is None or role == "A.bias":
            unknown.append(name)
            continue
        if role in layers.setdefault(layer, {}):
            raise ValueError(f"two weights of this LoRA are both {role} of {layer}, one of them {name!r}; a file holds one adapter")
        layers[layer][role], names[layer] = tensor, raw
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(state)} weights of this LoRA are of no kind that can be merged: {some(unknown)}")
    if not layers:
        raise ValueError("this LoRA is empty")
    return {
        f"{OURS}{layer}.{part}": tensor
        for layer, parts in layers.items()
        for part, tensor in _parts(layer, parts, raw=names[layer], scale=scale, alpha=alpha).items()
    }


def _parts(layer: str, parts: Mapping[str, Tensor], *, raw: str, scale: Scale | None, alpha: float | None) -> State:
    made = {name: parts[name] for name in ("diff", "diff_b") if name in parts}
    for one, other in (("A", "B"), ("B", "A"), ("B.bias", "B"), ("alpha", "A")):
        if one in parts and other not in parts:
            raise ValueError(f"the LoRA has {one} of {layer} but not {other}; the file is incomplete")
    if "A" not in parts:
        return made
    a, b = parts["A"], parts["B"]
    rank = a.shape[0]
    if a.ndim < 2 or b.ndim < 2 or b.shape[1] != rank:
        raise ValueError(f"the factors of {layer} do not go together: A is {list(a.shape)}, B is {list(b.shape)}")
    times = 1.0 if alpha is None or scale is not None else alpha / rank
    if scale is not None:
        times = scale(raw, rank)
    if "alpha" in parts:
        own = float(parts["alpha"])
        if alpha is not None:
            raise ValueError(f"the file says that alpha of {layer} is {own:g}, and {alpha:g} is given; leave alpha out, or give a strength")
        if scale is not None and not math.isclose(times, own / rank, rel_tol=1e-6):
            raise ValueError(f"{layer} has alpha {own:g} in the file, and its configuration says {times * rank:g}")
        times = own / rank
    made |= {"lora_A.weight": a, "lora_B.weight": b if times == 1 else b.float() * times}
    if "B.bias" in parts:
        if "diff_b" in parts:
            raise ValueError(f"the LoRA has two biases of {layer}")
        made["diff_b"] = parts["B.bias"] if times == 1 else parts["B.bias"].float() * times
    return made


def lora_to_diffusers(state: Mapping[str, Tensor]) -> State:
    """A LoRA under the names that diffusers' `WanPipeline.load_lora_weights` reads, which takes alpha to be the rank.

    Raises ValueError for one with whole differences, which that does not read.
    """
    lora = {name.removeprefix(OURS): tensor for name, tensor in lora_to_longlive(state).items()}
    if whole := [name for name in lora if name.endswith((".diff", ".diff_b"))]:
        raise ValueError(f"diffusers' layout of a LoRA has only factors; this one also holds whole differences: {some(whole)}")
    return {f"transformer.{name}": tensor for name, tensor in transformer_to_diffusers(lora).items()}


def lora_ranks(state: Mapping[str, Tensor]) -> list[int]:
    """The ranks that occur in a LoRA under our names."""
    return sorted({tensor.shape[0] for name, tensor in state.items() if name.endswith(".lora_A.weight")})


def _without_prefixes(name: str) -> str:
    stripped = name
    for infix in WRAPPERS:
        stripped = stripped.replace(infix, "")
    while (prefix := next((prefix for prefix in _PREFIXES if stripped.startswith(prefix)), None)) is not None:
        stripped = stripped.removeprefix(prefix)
    return stripped.replace(".base_layer", "")


def _layer(name: str) -> str | None:
    """The original name of a layer, from any; None for one that cannot be a layer of Wan's transformer."""
    if match := _KOHYA.match(name):
        number = re.match(r"blocks_(\d+)_", name[match.end() :])
        found = _UNDERSCORED.get(re.sub(r"^blocks_\d+_", "blocks_#_", name[match.end() :]))
        if found is None:
            return None
        name = found.replace("#", number[1]) if number else found
    return transformer_stem(name) or (None if name.startswith("lora_") else name)


def _underscored() -> dict[str, str]:
    """kohya's names, which write every dot as an underscore, and with `#` for the number of a block."""
    tables = [(TRANSFORMER, ""), (TRANSFORMER_BLOCK, "blocks.#.")]
    names = [prefix + stem for table, prefix in tables for pair in table.items() for stem in pair]
    return {name.replace(".", "_"): name for name in names}


_UNDERSCORED = _underscored()
