"""Passes over a whole block that sees a full window, which is what an endless video consists of: compiled, and recorded as CUDA graphs.

Such a pass has the same shapes for ever. Its inputs are the noisy latents, a timestep, a rotation, the places of the block in the ring
and the text; everything else stays where it is. So two recordings, one of a denoising pass and one of a clean pass, serve a video of any
length and any number of prompt switches. Every other pass (a video's first blocks, a recache, training) takes the plain way.

Several threads may make videos with one network: recorded passes take turns, and one is recorded in between, since recordings share
their memory. All these threads must use the same CUDA stream, as they do unless they choose another.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Module
from torch.utils import _pytree as pytree

from longlive.cache.memory import CacheView
from longlive.engine.blocks import blocks_of
from longlive.models.lora import adapter_state
from longlive.models.wan import WanTransformer
from longlive.types import KVView, Latents, Memory, Rotation, Text, TextKV, Timesteps

log = logging.getLogger(__name__)

Tensors = Sequence[Tensor]
Pass = Callable[[Tensors], "Tensor | None"]
"""A pass as a function of tensors alone."""

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

MAX_RECORDINGS = 128  # two for each of the rings that are in use


_turn = threading.Lock()  # held from the copy of a pass's inputs to the copy of its output


class _Thread(threading.local):
    steady = False  # during a pass of fixed shapes in this thread


_thread = _Thread()


class Capture(Protocol):
    """Records what a pass does to tensors; the recording is called with tensors at the same places."""

    def __call__(self, function: Pass, tensors: Tensors) -> Pass: ...


@lru_cache
def _graph_pool() -> Any:
    return torch.cuda.graph_pool_handle()


def cuda_graph(function: Pass, tensors: Tensors) -> Pass:
    """A CUDA graph. Its output lies at the same place every time, and is overwritten by the next replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, tunes and allocates what must not happen during a capture
        for _ in range(3):
            function(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # One pool for all, because an output is copied before another graph is replayed; other threads decode and encode text meanwhile.
    with torch.cuda.graph(graph, pool=_graph_pool(), capture_error_mode="thread_local"):
        out = function(tensors)

    def replay(_: Tensors) -> Tensor | None:
        graph.replay()
        return out

    return replay


def operation_tape(function: Pass, tensors: Tensors) -> Pass:
    """What `cuda_graph` records, as operations instead of kernels: runs on every device, to check recordings without a GPU."""
    graph = make_fx(lambda *inputs: function(inputs), tracing_mode="real")(*tensors)
    return lambda tensors: graph(*tensors)


def default_compiler(device: torch.device) -> Compiler:
    """torch.compile of one function into one graph of fixed shapes; on a GPU matrix products are tuned.

    Raises:
        ValueError: when nothing can be compiled here, as without a C++ compiler on a CPU.
    """
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.ones(4, device=device))
    except BackendCompilerFailed as error:
        raise ValueError(f"torch.compile does not work here: {' '.join(str(error).splitlines()[:2])}; leave compile out") from error
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)


class _View(NamedTuple):
    rotation: Rotation
    memories: Sequence[Memory]

    def at(self, layer: int) -> Memory:
        return self.memories[layer]


class _Recording(NamedTuple):
    inputs: list[Tensor]  # into which the caller's are copied before a replay
    replay: Pass


class _Words:
    """Text keys and values at a fixed place, copied there when the prompt changes."""

    def __init__(self, text: TextKV) -> None:
        self.tensors = [part.clone() for part in (*text.keys, *text.values)]
        self._of = text

    def update(self, text: TextKV) -> None:
        if text is not self._of:
            for own, new in zip(self.tensors, (*text.keys, *text.values), strict=True):
                own.copy_(new, non_blocking=True)
            self._of = text


class SteadyPasses:
    """Takes the place of a network's `forward` and `write_kv` until `remove`; the network itself stays as it is.

    Args:
        block: latent frames of the passes that are compiled or recorded.
        compiler: compiles the function of a layer; None: layers run as they are.
        capture: records whole passes; None: they are not recorded.

    Attributes:
        num_passes: passes so far that were compiled or recorded.
    """

    def __init__(self, network: WanTransformer, *, block: int, compiler: Compiler | None = None, capture: Capture | None = None) -> None:
        self.network, self.block, self._capture = network, block, capture
        self._plain = {"forward": network.forward, "write_kv": network.write_kv}
        self._recordings: OrderedDict[Any, _Recording] = OrderedDict()
        self._words: dict[Any, _Words] = {}
        self._warned: set[str] = set()
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.num_passes = 0
        if compiler is not None:
            for layer in blocks_of(network):
                plain = layer.forward
                compiled = self._compiled.setdefault(type(layer), compiler(type(layer).forward))
                layer.forward = partial(self._layer, plain, partial(compiled, layer))  # type: ignore[method-assign]
        network.forward = self.forward  # type: ignore[method-assign]
        network.write_kv = self.write_kv  # type: ignore[method-assign]

    def remove(self) -> None:
        """Let the network run as before."""
        for layer in blocks_of(self.network) if self._compiled else ():
            del layer.forward
        del self.network.forward, self.network.write_kv
        self._recordings.clear()

    def plain_copy(self) -> WanTransformer:
        """The network as it is without this: other module objects, where something was put in place, around the same weights."""

        def bare(module: Module) -> Module:
            copied = copy.copy(module)
            copied.__dict__ = {name: value for name, value in module.__dict__.items() if name not in ("forward", "write_kv")}
            copied._modules = {name: None if child is None else bare(child) for name, child in module._modules.items()}
            return copied

        network = bare(self.network)
        assert isinstance(network, WanTransformer)
        return network

    def forward(self, x: Latents, t: Timesteps, text: Text | TextKV, view: KVView | None = None) -> Latents:
        """See `WanTransformer.forward`."""
        if not (isinstance(text, TextKV) and self._is_steady(x, t, view)):
            return self._plain["forward"](x, t, text, view)
        out = self._run("forward", x, t, text, view)
        assert out is not None
        return out

    def write_kv(self, x: Latents, t: Timesteps, text: Text | TextKV, view: KVView) -> None:
        """See `WanTransformer.write_kv`."""
        if isinstance(text, TextKV) and self._is_steady(x, t, view):
            self._run("write_kv", x, t, text, view)
        else:
            self._plain["write_kv"](x, t, text, view)

    def _is_steady(self, x: Latents, t: Timesteps, view: KVView | None) -> bool:
        whole_block = x.shape[1] == self.block and t.shape == (1, 1)
        return whole_block and isinstance(view, CacheView) and view.moving is not None and not torch.is_grad_enabled()

    def _layer(self, plain: Callable[..., Any], compiled: Callable[..., Any], *inputs: Any) -> Any:
        if _thread.steady:
            try:
                return compiled(*inputs)
            except FailOnRecompileLimitHit:  # Dynamo's, for one function: sizes that came first stay compiled
                self._warn("passes of this size are not compiled: torch.compile takes no more sizes in one process")
        return plain(*inputs)

    def _warn(self, words: str) -> None:
        if words not in self._warned:
            log.warning(words)
            self._warned.add(words)

    def _run(self, name: str, x: Latents, t: Timesteps, text: TextKV, view: KVView | None) -> Tensor | None:
        assert isinstance(view, CacheView)
        self.num_passes += 1
        if self._capture is None:
            return self._fixed(partial(self._plain[name], x, t, text, view))
        with _turn:
            return self._replay(self._capture, name, x, t, text, view)

    def _replay(self, capture: Capture, name: str, x: Latents, t: Timesteps, text: TextKV, view: CacheView) -> Tensor | None:
        assert view.moving is not None
        leaves, structure = pytree.tree_flatten([view.at(layer) for layer in range(len(text.keys))])  # tensors, or None
        parts = [leaf for leaf in leaves if leaf is not None]
        moving = {id(part): part for part in view.moving}
        held = [part for part in parts if id(part) not in moving]  # the cache's buffers, at their places
        given = [x, t, *view.rotation, *moving.values()]
        kind = text.keys[0].shape, text.keys[0].dtype, text.keys[0].device
        if kind not in self._words:
            self._words[kind] = _Words(text)
        words = self._words[kind]
        words.update(text)
        places = tuple((part.data_ptr(), part.shape, part.dtype) for part in (*held, *self.network.parameters()))
        key = (name, kind, structure, adapter_state(self.network), *((own.shape, own.dtype) for own in given), places)
        recording = self._recordings.pop(key, None)
        if recording is None:
            inputs = [own.clone() for own in given]
            function = partial(self._pass, name, len(given), len(words.tensors), self._filling(leaves, moving, held), structure)
            recording = _Recording(inputs, self._fixed(partial(capture, function, [*inputs, *words.tensors, *held])))
        self._recordings[key] = recording  # the newest are kept
        if len(self._recordings) > MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        for own, new in zip(recording.inputs, given, strict=True):
            own.copy_(new, non_blocking=True)
        out = recording.replay([*recording.inputs, *words.tensors, *held])
        return None if out is None else out.clone()

    @staticmethod
    def _filling(leaves: Sequence[Tensor | None], moving: dict[int, Tensor], held: Tensors) -> list[int | None]:
        """Where each leaf of the memories is among the moving tensors and, counted on from there, the cache's buffers."""
        order = {part: n for n, part in enumerate([*moving, *map(id, held)])}
        return [order.get(id(leaf)) for leaf in leaves]

    def _pass(
        self, name: str, num_given: int, num_words: int, filling: Sequence[int | None], structure: Any, tensors: Tensors
    ) -> Tensor | None:
        x, t, cos, sin, *moving = tensors[:num_given]
        words, held = tensors[num_given : num_given + num_words], tensors[num_given + num_words :]
        sources = [*moving, *held]
        memories = pytree.tree_unflatten([None if n is None else sources[n] for n in filling], structure)
        text = TextKV(tuple(words[: num_words // 2]), tuple(words[num_words // 2 :]))
        return self._plain[name](x, t, text, _View(Rotation(cos, sin), memories))

    @staticmethod
    def _fixed(run: Callable[[], Any]) -> Any:
        _thread.steady = True
        try:
            return run()
        finally:
            _thread.steady = False
