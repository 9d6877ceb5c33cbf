"""Who am I among the processes of this run, on which device, and with how much memory. Knows nothing about what is computed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import psutil
import torch


class World(NamedTuple):
    """The processes that share this run: `rank` of `size`, `local_rank` on this machine; one of one without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def world() -> World:
    """The world as torchrun describes it in RANK, WORLD_SIZE and LOCAL_RANK."""
    return World(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def choose_device(name: str, here: World) -> torch.device:
    """The device called `name`; "auto" is this rank's GPU when there are GPUs, else the CPU. Raises ValueError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}; choose auto, cpu, cuda or cuda:0, cuda:1 …") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = here.local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(
                f"device {name!r} is not there: torch {torch.__version__} sees {count} GPUs; choose device=cpu or start fewer ranks"
            )
        return torch.device("cuda", index)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type called `name`; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device`; on the CPU no more than the control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def configure_logging(here: World) -> None:
    """Messages go to the terminal as they are; ranks other than the first speak only to warn."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("longlive").setLevel(logging.INFO if here.is_first else logging.WARNING)
