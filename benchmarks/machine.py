"""The machine and software of a measurement, which every reported number is stored with."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch

from longlive.generation.pipeline import LongLivePipeline
from longlive.ops import attention
from longlive.provenance import commit, processor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The machine, software and settings of a measurement."""

    size: str
    height: int
    width: int
    window: int
    sink: int
    block: int
    steps: list[int]
    dtype: str
    attention: str
    device: str
    machine: str
    python: str
    torch: str
    cuda: str | None
    cudnn: int | None
    diffusers: str
    commit: str | None


def describe(pipe: LongLivePipeline, *, size: str, height: int, width: int, attention_backend: str) -> Setup:
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    chosen = attention.choose(attention_backend, device, dtype)
    cuda = device.type == "cuda"
    return Setup(
        size=size,
        height=height,
        width=width,
        window=pipe.info.window,
        sink=pipe.info.sink,
        block=pipe.info.block,
        steps=list(pipe.info.denoising_steps),
        dtype=str(dtype).removeprefix("torch."),
        attention=next(name for name, backend in attention.BACKENDS.items() if backend is chosen),
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        machine=processor(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda if cuda else None,
        cudnn=torch.backends.cudnn.version() if cuda else None,
        diffusers=diffusers.__version__,
        commit=commit(),
    )


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on a GPU, including construction and warm-up; of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use(device: torch.device) -> int:
    """Bytes now: of tensors on a GPU; of the whole process on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def clocks_under_load(device: torch.device, work: Callable[[], object]) -> dict[str, str] | None:
    """Clocks, power and temperature from nvidia-smi while `work` runs repeatedly; None without a GPU or without nvidia-smi."""
    if device.type != "cuda":
        return None
    fields = ["clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"]
    which = "--id=GPU-" + str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    try:
        query = ["nvidia-smi", which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        asked = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return None
    while asked.poll() is None:
        work()
    values = [value.strip() for value in asked.communicate()[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def report(run: Callable[[], dict[str, Any]], output: Path | None) -> int:
    """Print what `run` measures as one line of JSON, and write it to `output`; 2, with a message, when it was asked wrongly."""
    try:
        line = json.dumps(run())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(line)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(line + "\n")
    return 0
