"""What a training step spends, told apart: by part of the step, and by what its tensors hold in memory."""

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
from longlive.training.networks import Learner

ROLLOUT = ("prompts", "denoise", "remember", "recache")
PARTS = (*ROLLOUT, "anchor", "teacher", "critic for the generator", "generator backward", "critic forward", "critic backward")


class Parts:
    """By how much a reading grows in each part; what is called within a part belongs to that part."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.sums: dict[str, float] = defaultdict(float)
        self._inside = False

    def wrap(self, name: str | Callable[[], str], call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted as the part called `name`, or what `name()` is when it is called."""

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
def told_apart(parts: Parts, tuner: StreamingTuner, objective: DMD, generator: Learner, critic: Learner) -> Iterator[None]:
    """Within the context, `parts` follows what these objects are asked to do."""
    rollout, judged = tuner.rollout, ["generator"]

    def judging(network: str, loss: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            judged[0] = network
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
        (objective, "generator_loss", judging("generator", objective.generator_loss)),
        (objective, "critic_loss", judging("critic", objective.critic_loss)),
        (torch.Tensor, "backward", parts.wrap(lambda: f"{judged[0]} backward", torch.Tensor.backward)),
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
    """The tensors in what an operation is given or gives back."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


class Live(TorchDispatchMode):
    """Bytes of the tensors of one device made within the context that are still there (`bytes`), and the most at once (`peak`).

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
        if made:  # neither a view of what was there, nor written in place
            given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *(kwargs or {}).values()])}
            for key in made.keys() - given:
                self._made(key, made[key])
        return out

    def _made(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()

        def gone(_: weakref.ref[Any]) -> None:
            del self.known[key]
            self.bytes -= size

        self.known[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class Held(NamedTuple):
    """Bytes that a tensor with a gradient keeps from being freed.

    Attributes:
        saved: what autograd saved, weights aside: of checkpointed blocks their inputs.
        alive: everything: also the remembered frames that the view of a checkpointed block shows.
        backward: more at once while the backward pass runs.
    """

    saved: float
    alive: float
    backward: float


def held(live: Live, make: Callable[[], Tensor]) -> Held:
    """Of what `make` makes; `live` must have begun before anything that it reads, weights aside, was made."""
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
    """Of each of the first clips of a video, made with a gradient one after the other; leaves no gradient behind.

    Raises:
        ValueError: when a video is under way.
    """
    if not tuner.between_videos:
        raise ValueError(f"the video stands at frame {tuner.rollout.end}; bring it to its end first")
    network, found = tuner.rollout.denoiser.network, []
    with Live(network.device) as live:
        for _ in range(clips):
            found.append(held(live, lambda: tuner.clip(grad=True).latents))
            network.zero_grad(set_to_none=True)
    return found


def clips_of(frames: int, clip_frames: int, overlap: int) -> int:
    """Clips of a video that may have so many frames."""
    return 1 + (frames - clip_frames) // (clip_frames - overlap)
