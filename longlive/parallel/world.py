"""The processes of a run: this one's rank, device and free memory, and random choices that all ranks share.

Knows nothing about what is computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class World(NamedTuple):
    """The processes that share this run: `rank` of `size`, `local_rank` on this machine; one of one without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs for all."""
        return self.rank == 0


def get_world() -> World:
    """The world as torchrun describes it in RANK, WORLD_SIZE and LOCAL_RANK. Raises ValueError when these are no numbers."""
    given = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    if not all(number.isdecimal() for number in given):
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(map(repr, given))}; torchrun sets them to whole numbers")
    return World(*map(int, given))


def choose_device(name: str, world: World) -> torch.device:
    """The device called `name`; "auto" is this rank's GPU when there are GPUs, else the CPU. Raises ValueError when it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"there is no device {name!r}; choose auto, cpu, cuda or cuda:0, cuda:1 …") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one that LongLive runs on; choose auto, cpu, cuda or cuda:0, cuda:1 …")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = world.local_rank if device.index is None else device.index
        if index >= count:
            raise ValueError(
                f"device {name!r} does not exist: torch {torch.__version__} sees {count} GPUs; choose device=cpu or start fewer ranks"
            )
        return torch.device("cuda", index)
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type called `name`; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; on the CPU within the limit of the control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def configure_logging(world: World) -> None:
    """Write log messages to the terminal without a prefix; ranks other than 0 write only warnings and errors."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("longlive").setLevel(logging.INFO if world.is_main else logging.WARNING)


def join(world: World, device: torch.device) -> None:
    """Join the process group that torchrun's environment describes; a second call does nothing.

    A process without others does not join, except under torchrun on a GPU: networks there compute in bfloat16 by the same means on one
    GPU as on many (`engine.sharding.shard`). GPU tensors are exchanged by NCCL, CPU values by gloo, so that these never wait for a GPU.
    """
    alone = world.size == 1 and (device.type != "cuda" or "RANK" not in os.environ)
    if alone or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=world.rank, world_size=world.size)


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[World]:
    """`join`, and leave the group at the end."""
    join(world, device)
    try:
        yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gather(value: Value, world: World) -> list[Value]:
    """The `value` of every rank, in rank order, on every rank; anything that can be pickled. All ranks must call."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    """Wait until all ranks are here."""
    gather(None, world)


def mean_over_ranks(metrics: Mapping[str, float], world: World) -> dict[str, float]:
    """Mean of every metric, the same on every rank; not finite where the value of any rank is not. All ranks must call.

    Raises:
        RuntimeError: on all ranks, when they report different names.
    """
    parts = gather(dict(metrics), world)
    different = [rank for rank, part in enumerate(parts) if part.keys() != parts[0].keys()]
    if different:
        names = f"{sorted(parts[different[0]])}, rank 0 {sorted(parts[0])}"
        raise RuntimeError(f"ranks report different metrics: rank {different[0]} reports {names}")
    return {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}


class SharedChoices:
    """Random choices that must be the same on all ranks: exit step, rollout length, switch frame.

    Every rank draws from its own CPU generator, all seeded with rank 0's `seed`, so that a draw needs neither communication nor a GPU.
    Ranks agree as long as they make the same draws in the same order; `check` verifies that.
    """

    def __init__(self, seed: int, world: World) -> None:
        self._generator = torch.Generator().manual_seed(gather(seed, world)[0])

    def integer(self, n: int) -> int:
        """A uniform integer from 0 to n - 1. Raises ValueError when n is less than 1."""
        if n < 1:
            raise ValueError(f"cannot choose one of {n} options; give at least one")
        return int(torch.randint(n, (), generator=self._generator))

    def pick(self, sequence: Sequence[Value]) -> Value:
        """A uniformly chosen element of `sequence`."""
        return sequence[self.integer(len(sequence))]

    def state(self) -> Tensor:
        """The state of the generator; the same on all ranks."""
        return self._generator.get_state()

    def load(self, state: Tensor) -> None:
        """The inverse of `state`."""
        self._generator.set_state(state)

    def check(self, world: World) -> None:
        """Compare with the other ranks; all must call. Raises RuntimeError on all ranks, naming those that differ from rank 0."""
        digests = gather(hashlib.sha256(self.state().numpy().tobytes()).hexdigest(), world)
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise RuntimeError(
                f"shared random choices differ: ranks {different} differ from rank 0; all must make the same draws in the same order"
            )


def seed_of(*parts: int | str) -> int:
    """A seed derived from several numbers and names; (0, 1) and (1, 0) give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def rank_generator(seed: int, rank: int) -> torch.Generator:
    """A CPU generator for one rank's own draws (noise, data), unrelated to those of other ranks and seeds."""
    mixed = hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
