"""What does this machine have, what is missing, and what runs on which card?

Prints versions, devices and attention back-ends, warns of known traps, says which files each configuration needs, and lists for graphics
cards of several sizes the settings with which LongLive-1.3B makes a video of 480 x 832 there, counted part by part. Needs no weights and
no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from longlive.config import InferenceConfig, ServeConfig
from longlive.engine.low_precision import cpu_has_bfloat16
from longlive.ops import attention
from longlive.parallel.world import free_memory
from longlive.programs.configs import CONFIGS
from longlive.programs.memory import RESERVED, MemorySettings, Model, Parts, choose, count, ladder
from longlive.provenance import commit, processor, version
from longlive.settings import load

CARDS = (24, 16, 12, 8, 6)  # GiB
HEIGHT, WIDTH = 480, 832
DISK = {  # GB that a download takes
    "Wan-AI/Wan2.1-T2V-1.3B": 17,
    "Wan-AI/Wan2.1-T2V-14B": 69,
    "Efficient-Large-Model/LongLive-1.3B": 9,
    "gdhe17/Self-Forcing": 6,
}
OPTIONAL = (("flash_attn", "FlashAttention 2", "flash"), ("triton", "compilation on a GPU", None), ("av", "mp4 files", None))
OPTIONAL += (("fastapi", "the server and its page", "serve"), ("prompt_toolkit", "a line of one's own while video is made", "live"))
OPTIONAL += (("wandb", "logging to wandb", "train"), ("matplotlib", "charts of evaluation", "eval"))


class Machine(NamedTuple):
    """What decides which traps there are. `cudnn`: as torch says it, 91500 for 9.15; None without."""

    torch: tuple[int, int]
    cudnn: int | None
    cuda: bool
    bfloat16_cpu: bool
    encoder: bool
    torchvision: tuple[int, int] | None = None

    @classmethod
    def here(cls) -> Machine:
        installed = re.match(r"(\d+)\.(\d+)", version("torchvision"))
        torchvision = (int(installed[1]), int(installed[2])) if installed else None
        major, minor = torch.__version__.split(".")[:2]
        cuda = torch.cuda.is_available()
        cudnn = torch.backends.cudnn.version() if cuda else None
        return cls((int(major), int(minor)), cudnn, cuda, cpu_has_bfloat16(), importlib.util.find_spec("av") is not None, torchvision)


def warnings_for(machine: Machine) -> list[str]:
    """Known traps of this machine, and what to do."""
    found = []
    if machine.cuda and machine.cudnn is not None and machine.cudnn < 91500:
        found.append(
            f"cuDNN {cudnn_name(machine.cudnn)} runs the decoder's Conv3d in bfloat16 up to three times slower than "
            "9.15 does: pip install -U nvidia-cudnn-cu12"
        )
    if machine.cuda and machine.torch == (2, 9):
        found.append("torch 2.9 is slow at Conv3d in bfloat16, which the decoder consists of; choose another version, or decoder=tiny")
    if machine.torchvision is not None and machine.torchvision != (0, machine.torch[1] + 15):
        fitting = f"0.{machine.torch[1] + 15}"
        found.append(
            f"torchvision {'.'.join(map(str, machine.torchvision))} is not that of this torch ({fitting}): transformers fails when it "
            f"imports it; LongLive does not need it: pip uninstall torchvision, or pip install torchvision=={fitting}.*"
        )
    if not machine.cuda:
        found.append("no GPU that torch can use: the 1.3B model needs one for real time; the miniature does not")
    if not machine.cuda and not machine.bfloat16_cpu:
        found.append("this CPU has no bfloat16 instructions: leave dtype=float32, and bfloat16_linears off in training")
    if machine.torch < (2, 8):
        found.append(f"torch {'.'.join(map(str, machine.torch))} is too old; LongLive needs 2.8 or newer")
    if not machine.encoder:
        found.append("PyAV is not installed: no mp4 can be written (pip install av)")
    return found


def cudnn_name(number: int) -> str:
    """ "9.15.0" for 91500, "8.9.7" for 8907."""
    base = 10000 if number >= 10000 else 1000
    return f"{number // base}.{number % base // 100}.{number % 100}"


def machine_lines() -> list[str]:
    """Versions, devices, attention back-ends and programs."""
    lines = [
        f"python {platform.python_version()}, torch {torch.__version__}, longlive {version('longlive')}, commit {commit() or 'unknown'}",
        f"CPU: {processor()}; {psutil.virtual_memory().total / 2**30:.1f} GiB of memory, "
        f"bfloat16 instructions: {'yes' if cpu_has_bfloat16() else 'no'}",
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device, properties = torch.device("cuda", index), torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free_memory(device) / 2**30:.1f} of {properties.total_memory / 2**30:.1f} GiB free; "
            f"CUDA {torch.version.cuda}, cuDNN {cudnn_name(torch.backends.cudnn.version() or 0)}"
        )
    device, dtype = (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)
    used = attention.choose("auto", device, dtype)
    why = "the fastest of those that run here" if device.type == "cuda" else "the only one without a GPU"
    lines.append(f"attention auto: {next(name for name, backend in attention.BACKENDS.items() if backend is used)}, {why}")
    for name in attention.BACKENDS:
        try:
            attention.choose(name, device, dtype)
            lines.append(f"attention {name}: yes")
        except ValueError as error:
            lines.append(f"attention {name}: no, {str(error).split(': ', 1)[-1].removesuffix('; choose auto')}")
    for name, use, extra in OPTIONAL:
        found = importlib.util.find_spec(name) is not None
        missing = "not installed" + (f": pip install 'longlive[{extra}]'" if extra else "")
        lines.append(f"{name} ({use}): {version(name.replace('_', '-')) if found else missing}")
    lines.append(f"ffmpeg: {shutil.which('ffmpeg') or 'not installed, and not needed'}")
    return lines


def configurations(model: Model) -> list[str]:
    """What each configuration of LongLive-1.3B needs on the disk and in memory, which of its files are missing, and how to get them."""
    lines = ["Configurations (paths are relative to this folder):"]
    for path in sorted(CONFIGS.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        downloads = re.findall(r"^# +(hf download (\S+).*)$", text, re.MULTILINE)
        disk = sum(DISK[repository] for _, repository in downloads)
        needs = f"at most {disk} GB on the disk ({shutil.disk_usage('.').free / 1e9:.0f} GB free)"
        if path.name.startswith("train"):
            named = re.findall(r"^ +(?:generator|teacher|critic|components): (\S+)$", text, re.MULTILINE)
            needs += f"; {text.splitlines()[0].removeprefix('# ')}"
        else:
            config = load(ServeConfig, path).video if path.name == "serving.yaml" else load(InferenceConfig, path)
            named = [name for name in (config.wan_dir, config.checkpoint, config.lora) if isinstance(name, str)]
            parts = count(model, MemorySettings(), height=config.height or HEIGHT, width=config.width or WIDTH)
            needs += f", {gigabytes(parts.total + RESERVED)} GiB of GPU memory (less with low_memory=true, see below)"
        missing = [name for name in dict.fromkeys(named) if not Path(name).exists()]
        lines.append(f"{path.name}: {'ready' if not missing else 'missing ' + ', '.join(missing)}; {needs}")
        lines += [f"    {command}" for command, _ in downloads if missing]
    return lines


def gigabytes(number: int) -> str:
    return f"{number / 2**30:.2f}"


def table(model: Model, *, height: int = HEIGHT, width: int = WIDTH) -> list[str]:
    """What every step of the ladder needs, in GiB, in markdown; then what to set for each card."""
    steps = [(settings, count(model, settings, height=height, width=width)) for settings in ladder(tiny=model.tiny is not None)]
    lines = [
        f"LongLive-1.3B at {height} x {width}, bfloat16, GiB by part at its peak (beside {gigabytes(RESERVED)} for CUDA itself):",
        "",
        f"| settings | {' | '.join(name.replace('_', ' ') for name in Parts._fields)} | all |",
        f"| {' | '.join(['---'] * (len(Parts._fields) + 2))} |",
        *(f"| {settings.words()} | {' | '.join(map(gigabytes, parts))} | {gigabytes(parts.total)} |" for settings, parts in steps),
        "",
        "| card, GiB | settings | needed, GiB |",
        "| --- | --- | --- |",
    ]
    for card in CARDS:
        lines.append(f"| {card} | {' | '.join(for_card(model, card, height=height, width=width))} |")
    return lines


def for_card(model: Model, card: int, *, height: int = HEIGHT, width: int = WIDTH) -> tuple[str, str]:
    """The settings for a card of so many GiB, and what they need."""
    try:
        settings, parts = choose(model, card * 2**30 - RESERVED, height=height, width=width)
    except ValueError:
        least = list(ladder(tiny=model.tiny is not None))[-1]
        return "too small", gigabytes(count(model, least, height=height, width=width).total + RESERVED)
    return settings.words(), gigabytes(parts.total + RESERVED)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=HEIGHT, help="pixels of the videos that are counted (default %(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="(default %(default)s)")
    options = parser.parse_args(argv)
    if options.height % 16 or options.width % 16 or min(options.height, options.width) < 16:
        print(f"error: {options.height} x {options.width} is not divisible by 16", file=sys.stderr)
        return 2
    lines = machine_lines()
    lines += [f"warning: {text}" for text in warnings_for(Machine.here())]
    model = Model.released()
    lines += ["", *configurations(model)]
    lines += ["", *table(model, height=options.height, width=options.width)]
    lines += ["", "low_memory=true chooses these settings for the memory that is free."]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
