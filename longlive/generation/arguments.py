"""What `LongLivePipeline.from_pretrained` may be given, checked by name: diffusers itself would ignore what it does not know."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging

from longlive.generation.dimensions import check_whole

HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
FOLDER_OPTIONS = ("variant", "use_safetensors", "device_map", "low_cpu_mem_usage")


def check_arguments(given: Mapping[str, Any], constructor: Callable[..., Any]) -> None:
    """Raises ValueError, with the nearest name, for an argument that neither loading nor the pipeline's constructor knows."""
    known = [*list(inspect.signature(constructor).parameters)[1:], "torch_dtype", "dtype", "attention", *HUB_OPTIONS, *FOLDER_OPTIONS]
    for name in given:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}; did you mean {difflib.get_close_matches(name, known, 1, 0.0)[0]!r}?")


def check_settings(*, whole: Mapping[str, tuple[Any, int]], numbers: Mapping[str, tuple[Any, float, float]]) -> None:
    """Raises ValueError, by name, for a setting that is no whole number of at least so much (None is one), or no number between two."""
    for name, (value, least) in whole.items():
        if value is not None:
            check_whole(name, value, least)
    for name, (number, least, most) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not least <= number <= most:
            raise ValueError(f"{name} {number!r}: choose a number from {least} to {most}")


def check_choices(output_type: str, tensor_inputs: Sequence[str], available: Sequence[str]) -> None:
    """Raises ValueError for an unknown kind of output, or a tensor that a callback cannot be given."""
    if output_type not in ("np", "pt", "pil", "latent"):
        raise ValueError(f"output_type {output_type!r} is unknown; choose np, pt, pil or latent")
    if unknown := [name for name in tensor_inputs if name not in available]:
        raise ValueError(f"a callback cannot be given {unknown[0]!r}; there is {', '.join(available)}")


def chosen_dtype(given: dict[str, Any]) -> torch.dtype | None:
    """Takes `torch_dtype` or `dtype` out of the arguments: a type, or its name. Raises ValueError for another value, or both."""
    taken = {name: given.pop(name, None) for name in ("torch_dtype", "dtype")}
    asked = {name: value for name, value in taken.items() if value is not None}
    if len({str(value).removeprefix("torch.") for value in asked.values()}) > 1:
        raise ValueError(f"both torch_dtype {asked['torch_dtype']} and dtype {asked['dtype']} are given; choose one")
    for name, value in asked.items():
        types = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}
        if (kind := types.get(str(value).removeprefix("torch."))) is None:
            raise ValueError(f"{name} {value!r}: choose {', '.join(types)}")
        return kind
    return None


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """While a model is read from a folder, which takes a second or two: what is printed belongs to the program."""
    libraries = [library for library in (diffusers.utils.logging, transformers.utils.logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
