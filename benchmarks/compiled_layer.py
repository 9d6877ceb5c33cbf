"""What torch.compile makes of one layer of the transformer: how many kernels, how many bytes.

The number of kernels does not depend on the number of tokens, and bytes grow with it on a straight line, so that a layer is compiled for
few tokens, twice, and nothing of it is run at full size. The kernels themselves are not built: only what Inductor writes is looked at.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from unittest import mock

import torch
from step_count import on_a_line
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code

from longlive.cache.window import Window
from longlive.generation.caches import ring_cache
from longlive.models.wan import WanTransformer
from longlive.ops.attention import BACKENDS

EXTERN = re.compile(r"extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(")
"""A call of a kernel that Inductor did not write: a matrix product, or attention."""


class CompiledLayer(NamedTuple):
    """Kernels that Inductor wrote, other ones that it calls, and the bytes that all of them read and write."""

    fused: int
    extern: int
    bytes: float

    @property
    def kernels(self) -> int:
        return self.fused + self.extern


def _bytes_of(graph: GraphLowering, *, ring: int, written: int) -> int:
    """Bytes that the kernels of a graph read and write, each tensor once a kernel.

    A kernel of Inductor's that writes the span into the ring counts there as one that reads what it overwrites, or reads and writes the
    whole ring, of `ring` bytes; it writes `written` of them and reads none.
    """
    total = 0
    for node in graph.scheduler.nodes:
        overwritten = {name for out in node.get_outputs() for name in out.get_mutations()}
        for writes in (False, True):
            for name, size in node.get_read_write_buffer_accesses(include_reads=not writes, include_writes=writes).items():
                if name in overwritten and not writes:
                    continue
                of_ring = size == ring and not node.is_extern()
                total += (written if writes else 0) if of_ring else size
    return total


@torch.no_grad()
def _compiled(sizes: dict[str, Any], *, block: int, window: Window, rows: int) -> tuple[CompiledLayer, int]:
    """With `rows` x 1 tokens a frame, in bfloat16; and the number of tokens of a block."""
    with torch.device("meta"):
        network = WanTransformer(**{**sizes, "num_layers": 1})
    network = network.to_empty(device="cpu").bfloat16().eval().requires_grad_(False)
    config = network.config
    cache = ring_cache(network, 2 * rows, 2, window=window)
    with cache.record(range(window.visible)):
        pass
    view = cache.view(range(window.visible, window.visible + block))
    tokens, heads = block * rows, (1, config.text_len, config.num_heads, config.dim // config.num_heads)
    x = torch.zeros(1, tokens, config.dim, dtype=torch.bfloat16)
    text = torch.zeros(heads, dtype=torch.bfloat16), torch.zeros(heads, dtype=torch.bfloat16)
    ring, written = 2 * window.visible * rows * config.dim, 2 * tokens * config.dim
    calls: list[None] = []  # one for each time that a kernel of Inductor's is called
    found: list[int] = []

    def built(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)  # now its kernels are known
        found.append(_bytes_of(graph, ring=ring, written=written))
        return module

    compile_to_module = GraphLowering.compile_to_module
    torch.compiler.reset()
    layer = torch.compile(type(network.blocks[0]).forward, fullgraph=True, dynamic=False)
    inputs = (network.blocks[0], x, torch.zeros(1, 1, 6, config.dim), *text, view.rotation, view.at(0), BACKENDS["sdpa"])
    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: calls.append(None)),
        mock.patch.object(GraphLowering, "compile_to_module", built),
        inductor_config.patch(fx_graph_cache=False),
    ):
        _, codes = run_and_get_code(layer, *inputs)
    extern = sum(len(EXTERN.findall(code)) for code in codes)
    return CompiledLayer(len(calls), extern, float(sum(found))), tokens


def compiled_layer(sizes: dict[str, Any], *, block: int, window: Window, tokens: int) -> CompiledLayer:
    """One layer in a pass over `tokens` tokens of a block that sees a full window.

    Raises:
        RuntimeError: when the number of kernels depends on the number of tokens, so that few do not stand for many.
    """
    (one, tokens_of_one), (two, tokens_of_two) = (_compiled(sizes, block=block, window=window, rows=rows) for rows in (16, 32))
    if one[:2] != two[:2]:
        raise RuntimeError(f"a layer has {one.kernels} kernels for {tokens_of_one} tokens and {two.kernels} for {tokens_of_two}")
    return one._replace(bytes=on_a_line(one.bytes, two.bytes, tokens / tokens_of_one))  # type: ignore[arg-type]  # a fraction is as good
