"""What identifies a result: package versions, commit and hardware. Every recorded number is stored with them."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("longlive", "torch", "diffusers", "transformers", "peft", "numpy", "av")

log = logging.getLogger(__name__)


@cache
def version(name: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python and of everything that decides what is computed."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def commit() -> str | None:
    """The git commit of this source tree, with "-dirty" where files differ from it; None when it is no repository."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("the commit is not known: %s", error)
        return None


def processor() -> str:
    """Model of the processor, and the cores and threads this process has of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def hardware(num_ranks: int = 1) -> dict[str, Any]:
    """The machine of this rank, as far as it decides speed and rounding."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "ranks": num_ranks,
    }


def made_with(num_ranks: int = 1) -> dict[str, Any]:
    """Versions, commit and hardware: what a result depends on beside its settings."""
    return {"versions": versions(), "commit": commit(), "hardware": hardware(num_ranks)}
