"""Time or FLOPs of a training step by part, and the memory that its tensors occupy."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from longlive.training.clips import StreamingTuner
from longlive.training.dmd import DMD
from longlive.training.networks import TrainableNetwork

ROLLOUT = ("prompts", "denoise", "remember", "recache")
PARTS = (*ROLLOUT, "anchor", "teacher", "critic for the generator", "generator backward", "critic forward", "critic backward")


class Parts:
    """How much a reading (a clock, a counter) grows in each part; calls within a part count for that part."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.sums: dict[str, float] = defaultdict(float)
        self._inside = False

    def wrap(self, name: str | Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted for the part `name`, or for `name()` at the time of the call."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            part = name if isinstance(name, str) else name()
            self._inside, before = True, self.read()
            try:
                return call(*args, **kwargs)
            finally:
                self.sums[part] += self.read() - before
                self._inside = False

        return counted


@contextmanager
def measured_parts(
    parts: Parts, tuner: StreamingTuner, objective: DMD, generator: TrainableNetwork, critic: TrainableNetwork
) -> Iterator[None]:
    """Within the context, `parts` measures the calls of these objects."""
    rollout, loss_of = tuner.rollout, ["generator"]

    def noting(network: str, loss: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            loss_of[0] = network
            return loss(*args, **kwargs)

        return noted

    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (tuner, "embed", parts.wrap("prompts", tuner.embed)),
        (rollout.denoiser.network, "project_text", parts.wrap("prompts", rollout.denoiser.network.project_text)),
        (rollout, "block", parts.wrap("denoise", rollout.block)),
        (rollout, "remember", parts.wrap("remember", rollout.remember)),
        (rollout, "switch", parts.wrap("recache", rollout.switch)),
        (objective, "teacher", parts.wrap("teacher", objective.teacher)),
        (objective, "critic", parts.wrap(lambda: f"critic for{'ward' if torch.is_grad_enabled() else ' the generator'}", objective.critic)),
        (objective, "generator_loss", noting("generator", objective.generator_loss)),
        (objective, "critic_loss", noting("critic", objective.critic_loss)),
        (torch.Tensor, "backward", parts.wrap(lambda: f"{loss_of[0]} backward", torch.Tensor.backward)),
        (generator, "update", parts.wrap("generator optimiser", generator.update)),
        (critic, "update", parts.wrap("critic optimiser", critic.update)),
    ]
    if tuner.anchor is not None:
        changes.append((tuner, "anchor", parts.wrap("anchor", tuner.anchor)))
    with ExitStack() as stack:
        for owner, name, replacement in changes:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in the arguments or results of an operation."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors of one device created within the context and still alive (`bytes`), and their maximum (`peak`).

    Sees every operation of its own thread; the backward pass of a GPU runs in another.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.bytes, self.peak = device, 0, 0
        self.known: dict[int, weakref.ref[Any]] = {}  # by the address of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = {s._cdata: s for s in map(Tensor.untyped_storage, _tensors(out)) if s.device.type == self.device.type}
        made = {key: storage for key, storage in made.items() if key not in self.known}
        if made:  # neither a view nor written in place
            given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *(kwargs or {}).values()])}
            for key in made.keys() - given:
                self._created(key, made[key])
        return out

    def _created(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def gone(_: weakref.ref[Any]) -> None:
            del self.known[key]
            self.bytes -= size

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class Held(NamedTuple):
    """Bytes that a tensor with a gradient keeps alive.

    Attributes:
        saved: tensors saved by autograd, without weights; of checkpointed blocks their inputs.
        alive: everything, also the cached frames that a checkpointed block attends to.
        backward: further bytes at the peak of the backward pass.
    """

    saved: float
    alive: float
    backward: float


def held(live: LiveMemory, make: Callable[[], Tensor]) -> Held:
    """Bytes held by the result of `make`; everything that it reads, except weights, must have been created under `live`."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata in live.known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = make()
    alive = live.peak = live.bytes
    made.sum().backward()
    return Held(sum(saved.values()), alive, live.peak - alive)


def held_by_clips(tuner: StreamingTuner, clips: int) -> list[Held]:
    """Bytes held by each of the first clips of a video, generated with a gradient; leaves no gradient.

    Raises:
        ValueError: when a video is in progress.
    """
    if not tuner.between_videos:
        raise ValueError(f"a video is in progress at frame {tuner.rollout.end}; finish it first")
    network, found = tuner.rollout.denoiser.network, []
    with LiveMemory(network.device) as live:
        for _ in range(clips):
            found.append(held(live, lambda: tuner.clip(grad=True).latents))
            network.zero_grad(set_to_none=True)
    return found


def clips_of(frames: int, clip_frames: int, overlap: int) -> int:
    """Number of clips of a video of at most `frames` frames."""
    return 1 + (frames - clip_frames) // (clip_frames - overlap)
