"""Sharded tensors on disk: every rank writes and reads its own shards (`torch.distributed.checkpoint`).

Knows nothing of what the tensors belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class StoredShards:
    """Stands in a state for a sharded tensor whose shards are in files of `folder`; None in a saved state, which may be moved."""

    key: str
    folder: Path | None = None


def write_shards(state: Any, folder: Path) -> Any:
    """Write the sharded tensors of a nested state; returns the state with a `StoredShards` in place of each. All ranks must call.

    A state without sharded tensors is returned as it is, and no folder is made.
    """
    shards = {key: value for key, value in _leaves(state) if isinstance(value, DTensor)}
    if shards:
        dcp.save(shards, checkpoint_id=folder)
    return _mapped(state, lambda key, value: StoredShards(key) if isinstance(value, DTensor) else value)


def located(state: Any, folder: Path) -> Any:
    """The state with every `StoredShards` pointing to `folder`."""
    return _mapped(state, lambda key, value: StoredShards(value.key, folder) if isinstance(value, StoredShards) else value)


def has_stored(state: Any) -> bool:
    """Whether a nested state contains a `StoredShards`."""
    return any(isinstance(value, StoredShards) for _, value in _leaves(state))


def read_shards(state: Any, like: Any) -> Any:
    """The state with every `StoredShards` replaced by its tensor, sharded like the tensor at the same place in `like`.

    All ranks must call.

    Raises:
        ValueError: when a file is missing or `like` has no sharded tensor at that place.
    """
    places = dict(_leaves(like))
    wanted: dict[Path, dict[str, torch.Tensor]] = {}
    found: dict[str, torch.Tensor] = {}
    for key, value in _leaves(state):
        if isinstance(value, StoredShards):
            if value.folder is None or not isinstance(places.get(key), DTensor):
                raise ValueError(f"{value.key} was saved sharded over ranks but is not sharded here; start as many ranks as then")
            found[key] = torch.empty_like(places[key])
            wanted.setdefault(value.folder, {})[value.key] = found[key]
    for folder, tensors in wanted.items():
        try:
            dcp.load(tensors, checkpoint_id=folder)
        except dcp.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise ValueError(f"{folder} cannot be read ({reason}); resume from an older checkpoint") from error
    return _mapped(state, lambda key, value: found.get(key, value))


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Values in nested dicts, lists and tuples, each with the path of keys to it."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}/{name}")
    elif type(tree) in (list, tuple):
        for name, value in enumerate(tree):
            yield from _leaves(value, f"{key}/{name}")
    else:
        yield key, tree


def _mapped(tree: Any, change: Callable[[str, Any], Any], key: str = "") -> Any:
    if isinstance(tree, dict):
        return {name: _mapped(value, change, f"{key}/{name}") for name, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(value, change, f"{key}/{name}") for name, value in enumerate(tree))
    return change(key, tree)
