"""What does a block consist of? Kernels, bytes and host syncs of one with a full window, counted; or its time on a device, profiled.

    python benchmarks/breakdown.py                        counted at the real size on the meta device; no GPU needed
    python benchmarks/breakdown.py --compiled             and as torch.compile fuses a layer
    python benchmarks/breakdown.py --profile --device cuda   shares of time by kernel, against the counted operations and bytes

An operation is one kernel unless it only makes a view or allocates. Its bytes are those of the tensors that it reads and writes, once
each, a broadcast one as it lies in memory; of an indexed write those of the part that is written. RMS norm is one kernel, as on a GPU.
A host sync is an operation whose result the host reads, or a copy between devices that it waits for. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from compiled_layer import CompiledLayer, compiled_layer
from flops import flops_of_block
from machine import report
from step_count import _flash, on_a_line
from step_parts import _tensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from longlive.cache import memory
from longlive.cache.window import Window
from longlive.generation.caches import ring_cache
from longlive.generation.denoiser import Denoiser
from longlive.generation.rollout import Rollout
from longlive.generation.solver import FewStep
from longlive.models.wan import TransformerBlock, WanTransformer
from longlive.models.zoo import ZOO, arguments
from longlive.ops import attention, rope
from longlive.ops.flow_matching import warp_steps
from longlive.types import TextKV

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "alias"}
READ_BY_HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "_int_mm", "_scaled_mm"}
GROUPS = ("products", "attention", "rest")


def memory_bytes(x: Tensor) -> int:
    """Bytes of what a tensor shows of its storage, a broadcast dimension counted once."""
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        count *= size if stride != 0 else 1
    return count * x.element_size()


class Totals(NamedTuple):
    """Of a block, or of a part of it."""

    calls: float
    kernels: float
    bytes: float
    syncs: float


class Count(TorchDispatchMode):
    """Counts the operations of its thread, by name, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, out)
        return out

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        name = func.overloadpacket.__name__
        given, made = _tensors([*args, *kwargs.values()]), _tensors(out)
        self.calls[name] += 1
        if name in READ_BY_HOST or (name in ("_to_copy", "copy_") and self._waits(given, made, kwargs)):
            self.syncs[name] += 1
        if name in FREE or func.is_view or all(tensor.device.type == "cpu" for tensor in (*given, *made)):
            return  # tables on the CPU are no kernels
        self.kernels[name] += 1
        if name in ("index_put_", "_index_put_impl_", "index_put"):
            self.bytes[name] += 2 * memory_bytes(given[-1])
        elif name in ("index_select", "index"):
            self.bytes[name] += 2 * sum(map(memory_bytes, made))
        elif name == "copy_":
            self.bytes[name] += memory_bytes(given[0]) + memory_bytes(given[1])
        else:
            self.bytes[name] += sum(map(memory_bytes, (*given, *made)))

    @staticmethod
    def _waits(given: Sequence[Tensor], made: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
        devices = {tensor.device.type for tensor in (*given, *made)}
        return len(devices) > 1 and not kwargs.get("non_blocking", False)

    def totals(self) -> Totals:
        return Totals(*(float(sum(counter.values())) for counter in (self.calls, self.kernels, self.bytes, self.syncs)))

    def by_group(self) -> dict[str, Totals]:
        """Matrix products, attention, everything else."""
        found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        for part, counter in enumerate((self.calls, self.kernels, self.bytes, self.syncs)):
            for name, value in counter.items():
                group = "products" if name in PRODUCTS else "attention" if "attention" in name else "rest"
                found[group][part] += value
        return {group: Totals(*found[group]) for group in GROUPS}


@contextmanager
def one_kernel_norms(count: Count) -> Iterator[None]:
    """RMS norm as one operation that reads its input and writes its output: on the meta device it is several."""

    def forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for counter, number in ((count.calls, 1), (count.kernels, 1), (count.bytes, 2 * memory_bytes(x) + memory_bytes(norm.weight))):
            counter["rms_norm"] += number
        return out

    with mock.patch.object(nn.RMSNorm, "forward", forward):
        yield


class Scene(NamedTuple):
    """A rollout whose window is full, and the text of its prompt; on the meta device for counting."""

    rollout: Rollout
    text: TextKV
    shape: tuple[int, ...]

    def block(self) -> None:
        """One block and its clean pass, as in an endless video."""
        noise = torch.empty(self.shape, device=self.rollout.denoiser.network.device, dtype=self.rollout.denoiser.network.dtype)
        self.rollout.remember(self.rollout.block(noise, self.text), self.text)


@torch.no_grad()
def scene(
    sizes: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype,
    height: int,
    width: int,
    window: Window,
    block: int,
    steps: Sequence[int],
) -> Scene:
    """A network of random weights at its first block with a full window of `height` x `width` latents."""
    with device:
        network = WanTransformer(**sizes).eval().requires_grad_(False)
    torch.nn.Module.to(network, dtype)
    cache = ring_cache(network, height, width, window=window)
    with cache.record(range(window.visible)):
        pass  # whatever the buffers hold, the window is full
    draw = torch.empty_like if device.type == "meta" else torch.randn_like
    rollout = Rollout(Denoiser(network), cache, FewStep(warp_steps(list(steps), 5.0), draw))
    text = network.project_text(torch.empty(1, network.config.text_len, network.config.text_dim, device=device, dtype=dtype))
    return Scene(rollout, text, (1, block, network.config.in_dim, height, width))


def _queued(x: Tensor, device: torch.device) -> Tensor:
    """`to_device` as on a GPU, where the host does not wait."""
    return x.to(device, non_blocking=True)


@torch.no_grad()
def counted(sizes: dict[str, Any], *, layers_apart: bool = False, **settings: Any) -> Count:
    """Operations of a block on the meta device. `layers_apart`: without what happens inside the layers' forward passes."""
    made = scene(sizes, device=torch.device("meta"), dtype=torch.bfloat16, **settings)
    with (
        mock.patch.object(attention, "choose", lambda *_: _flash),
        mock.patch.object(rope, "to_device", _queued),
        mock.patch.object(memory, "to_device", _queued),
        Count() as count,
        one_kernel_norms(count),
    ):
        if not layers_apart:
            made.block()
            return count

        with mock.patch.object(TransformerBlock, "forward", lambda layer, x, *_: torch.empty_like(x)):  # allocates only
            made.block()
    return count


def counted_at_depth(sizes: dict[str, Any], layers: int, **settings: Any) -> dict[str, Totals]:
    """Of a block of a network with `layers` layers, from those with one and with two: every layer is the same."""
    one, two = (counted({**sizes, "num_layers": depth}, **settings).by_group() for depth in (1, 2))
    return {group: Totals(*(on_a_line(a, b, layers) for a, b in zip(one[group], two[group], strict=True))) for group in GROUPS}


def whole(parts: dict[str, Totals]) -> Totals:
    return Totals(*(sum(values) for values in zip(*parts.values(), strict=True)))


def with_compiled_layers(outside: Totals, layer: CompiledLayer, *, layers: int, passes: int) -> Totals:
    """A block whose layers are compiled; the last layer of the clean pass only writes its keys and values and is in `outside`."""
    runs = layers * passes - 1
    return Totals(
        outside.calls + runs * layer.kernels,
        outside.kernels + runs * layer.kernels,
        outside.bytes + runs * layer.bytes,
        outside.syncs,
    )


def table(parts: dict[str, Totals], flops: float) -> str:
    lines = [f"{'of a block':24} {'calls':>10} {'kernels':>10} {'GB':>10} {'host syncs':>11}"]
    for name, totals in {**parts, "whole": whole(parts)}.items():
        lines.append(f"{name:24} {totals.calls:10,.0f} {totals.kernels:10,.0f} {totals.bytes / 1e9:10.1f} {totals.syncs:11,.0f}")
    return "\n".join([*lines, f"{'TFLOP':24} {flops / 1e12:10.1f}"])


@torch.no_grad()
def profiled(made: Scene, *, device: torch.device, blocks: int) -> list[tuple[str, float, int]]:
    """Name, seconds and number of the kernels (on a CPU, operations) of a block, the longest first, over `blocks` blocks."""
    made.block()
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(blocks):
            made.block()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [(event.key, vars(event)[spent] / 1e6 / blocks, event.count // blocks) for event in profile.key_averages()]
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])


def table_of_time(rows: Sequence[tuple[str, float, int]], flops: float, most: int = 25) -> str:
    seconds = sum(row[1] for row in rows)
    lines = [f"{'ms':>9} {'share':>7} {'number':>7}  kernel"]
    lines += [f"{1000 * spent:9.2f} {spent / seconds:7.1%} {number:7}  {name[:90]}" for name, spent, number in rows[:most]]
    return "\n".join([*lines, f"{1000 * seconds:9.2f} {1:7.1%} {sum(row[2] for row in rows):7}  all: {flops / seconds / 1e12:.4g} TFLOP/s"])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Count or profile as the command line says; prints the tables and returns the content of the JSON line."""
    sizes, steps = arguments(options.size), [int(step) for step in options.steps.split(",")]
    window = Window.of(options.window, options.sink)
    settings = {"height": options.height // 8, "width": options.width // 8, "window": window, "block": options.block, "steps": steps}
    with torch.device("meta"):
        network = WanTransformer(**sizes)
    layers = network.config.num_layers
    flops = flops_of_block(
        network, height=settings["height"], width=settings["width"], block=options.block, window=window.visible, steps=len(steps)
    )
    found: dict[str, Any] = {"size": options.size, "height": options.height, "width": options.width, "tflop": flops / 1e12}
    if options.profile:
        device = torch.device(options.device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rows = profiled(scene(sizes, device=device, dtype=dtype, **settings), device=device, blocks=options.blocks)
        print(table_of_time(rows, flops))
        return {**found, "device": str(device), "kernels": [dict(zip(("name", "seconds", "number"), row)) for row in rows]}
    parts = counted_at_depth(sizes, layers, **settings)
    print(table(parts, flops))
    found |= {"eager": {group: totals._asdict() for group, totals in {**parts, "whole": whole(parts)}.items()}}
    if options.compiled:
        tokens = options.block * settings["height"] * settings["width"] // 4
        layer = compiled_layer(sizes, block=options.block, window=window, tokens=tokens)
        outside = whole(counted_at_depth(sizes, layers, layers_apart=True, **settings))
        compiled = with_compiled_layers(outside, layer, layers=layers, passes=len(steps) + 1)
        print(f"\na compiled layer: {layer.fused} fused kernels, {layer.extern} others, {layer.bytes / 1e9:.3f} GB")
        print(table({"outside the layers": outside, "compiled layers": Totals(*(a - b for a, b in zip(compiled, outside)))}, flops))
        found |= {"compiled_layer": layer._asdict(), "outside": outside._asdict(), "compiled": compiled._asdict()}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(ZOO), default="1.3b")
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=832, help="pixels")
    parser.add_argument("--window", type=int, default=12, help="latent frames a block sees, sink and itself included")
    parser.add_argument("--sink", type=int, default=3, help="latent frames")
    parser.add_argument("--block", type=int, default=3, help="latent frames")
    parser.add_argument("--steps", default="1000,750,500,250", help="denoising steps")
    parser.add_argument("--compiled", action="store_true", help="also count what torch.compile makes of a layer")
    parser.add_argument("--profile", action="store_true", help="measure time instead of counting")
    parser.add_argument("--device", default="cuda", help="of --profile")
    parser.add_argument("--blocks", type=int, default=3, help="of --profile")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    return report(lambda: run(options), options.output)


if __name__ == "__main__":
    sys.exit(main())
