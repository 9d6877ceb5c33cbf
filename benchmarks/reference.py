"""The plain way to make a video block by block: what the engine is compared with. `python benchmarks/throughput.py --engine reference`.

It is written from the definition of the model and computes the same numbers as `WanTransformer` and `RingCache`, in the order of the
definition, with nothing kept that can be computed again: the remembered keys and values are copied and joined with the new ones in every
layer of every pass, positions are rotated as complex numbers in double precision, adapters run beside the linear layers they adapt, the
prompt passes the text layers in every pass, every frame has its own modulation, a clean pass computes a velocity that nobody reads, and
a recache passes the sink's frames through the network although their keys are thrown away.

The weights, the block loop, the sampling and the decoder are those of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive.cache.window import KVCache, Window
from longlive.generation.pipeline import EVERYTHING, LongLivePipeline
from longlive.models.lora import adapted_linears
from longlive.models.wan import Attention, TransformerBlock, WanTransformer

LORA_RANK = 256  # of the released adapter


class AdaptedLinear(nn.Module):
    """x W^T + b + alpha / rank (x A^T) B^T, an adapter that is not merged."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, alpha: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, alpha / len(a)
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def adapt(network: WanTransformer, state: Mapping[str, Tensor], *, alpha: float) -> None:
    """Put the adapters of `state` (released layout) beside the linear layers of `network`, in place."""
    for name in adapted_linears(network):
        parent, _, child = name.rpartition(".")
        linear = cast(nn.Linear, network.get_submodule(name))
        a, b = (state[f"base_model.model.{name}.lora_{letter}.weight"].to(linear.weight) for letter in "AB")
        setattr(network.get_submodule(parent), child, AdaptedLinear(linear, a, b, alpha))


def random_lora(network: WanTransformer, *, rank: int = LORA_RANK, std: float = 0.02) -> dict[str, Tensor]:
    """Random adapters in the released layout for every linear layer of the blocks, on the network's device and in its type."""
    state = {}
    for name in adapted_linears(network):
        linear = cast(nn.Linear, network.get_submodule(name))
        for letter, shape in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
            state[f"base_model.model.{name}.lora_{letter}.weight"] = std * torch.randn(shape, device=network.device, dtype=network.dtype)
    return state


class Grid(NamedTuple):
    """Rows and columns of the tokens of a frame, and the base of the rotary frequencies."""

    rows: int
    columns: int
    theta: float

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def rotated(x: Tensor, positions: Sequence[int], grid: Grid) -> Tensor:
    """Rotate tokens `[B, frames * rows * columns, A, D]`: neighbouring pairs of channels by the angles of time, height and width."""
    width = x.shape[-1]
    side = 2 * (width // 6)
    tables = []
    for count, channels, at in (
        (0, width - 2 * side, torch.tensor(positions, device=x.device, dtype=torch.float64)),
        (1, side, torch.arange(grid.rows, device=x.device, dtype=torch.float64)),
        (2, side, torch.arange(grid.columns, device=x.device, dtype=torch.float64)),
    ):
        frequencies = grid.theta ** (-torch.arange(0, channels, 2, device=x.device, dtype=torch.float64) / channels)
        angles = torch.outer(at, frequencies)
        shape = [1, 1, 1, channels // 2]
        shape[count] = len(at)
        whole = angles.view(shape).expand(len(positions), grid.rows, grid.columns, -1)
        tables.append(torch.polar(torch.ones_like(whole), whole))
    table = torch.cat(tables, dim=-1).flatten(0, 2)[:, None]  # [N, 1, D / 2]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


class ReferenceCache:
    """Keys and values of the visible frames, in their order, one tensor per layer; finished frames are joined on, old ones cut off.

    See `KVCache`. `relative`: keys are stored before rotation, and the visible frames are numbered 0, 1, 2, … in every pass.
    """

    def __init__(self, num_layers: int, window: Window, grid: Grid, *, relative: bool = False) -> None:
        self.num_layers, self.window, self.grid, self.relative = num_layers, window, grid, relative
        self.reset()

    def reset(self) -> None:
        self.end = 0
        self._begin(0)
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * self.num_layers

    def _begin(self, frame: int) -> None:
        self.sink, self.queries_only = range(frame, frame + self.window.sink), range(0)
        self.frames: list[int] = []  # whose keys and values are held

    def view(self, span: range) -> ReferenceView:
        return ReferenceView(self, span)

    @contextmanager
    def record(self, span: range) -> Iterator[ReferenceView]:
        view = self.view(span)
        yield view
        self.end, self.frames = span.stop, [*view.past, *view.own]
        self.layers = [view.joined[layer] for layer in range(self.num_layers)]

    def skip(self, num_frames: int) -> None:
        self.end += num_frames

    def forget(self, *, keep_sink: bool) -> range:
        end, begin = self.end, self.sink.start
        frames = range(end - min(self.window.visible, end - begin), end)
        if keep_sink and end - begin > self.window.visible:
            self.queries_only = frames[: self.window.sink]
            self._keep(list(self.sink))
        else:
            self._begin(frames.start)
        self.end = frames.start
        return frames

    def clear(self) -> None:
        self._begin(self.end)

    def _keep(self, frames: list[int]) -> None:
        held, self.frames = self.frames, frames
        self.layers = [None if pair is None else cast(Any, tuple(self.taken(part, held, frames) for part in pair)) for pair in self.layers]

    def taken(self, tokens: Tensor, held: Sequence[int], frames: Sequence[int]) -> Tensor:
        """Copies of the tokens of `frames` out of those of the frames `held`, `[B, K, A, D]`."""
        each = tokens.unflatten(1, (len(held), -1)).clone()
        return torch.cat([each[:, held.index(frame)] for frame in frames] or [tokens[:, :0]], dim=1)


class ReferenceView:
    """What one span sees: the frames of sink and window before it, and itself."""

    def __init__(self, cache: ReferenceCache, span: range) -> None:
        self.cache, self.span = cache, span
        first = span.stop - cache.window.recent
        self.past = [frame for frame in cache.frames if frame in cache.sink or frame >= first]
        self.own = [frame for frame in span if frame not in cache.queries_only]  # of which keys are seen
        self.joined: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Tensor:
        """Attention of the span's queries, which like the keys are not rotated yet."""
        cache, frames = self.cache, list(self.span)
        if not cache.relative:
            q, k = rotated(q, frames, cache.grid), rotated(k, frames, cache.grid)
        k, v = (cache.taken(part, frames, self.own) for part in (k, v))
        if (held := cache.layers[layer]) is not None and self.past:
            k, v = (torch.cat([cache.taken(old, cache.frames, self.past), new], dim=1) for old, new in zip(held, (k, v)))
        self.joined[layer] = k, v
        if cache.relative:
            order = [*self.past, *self.own]
            q = rotated(q, [order.index(frame) if frame in order else 0 for frame in frames], cache.grid)
            k = rotated(k, range(len(order)), cache.grid)
        return backend(q, k, v)


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMS norm over all heads together, in float32."""
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + cast(float, norm.eps))).to(x.dtype) * norm.weight


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """(1 + scale) norm(x) + shift with the values `[B, F, M]` of each frame."""
    frames = F.layer_norm(x.float(), x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).to(x.dtype)


def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate y with the gates `[B, F, M]` of each frame."""
    return (x + (y.float().unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)).to(x.dtype)


class ReferenceTransformer(WanTransformer):
    """The same weights and outputs as `WanTransformer`, for views of a `ReferenceCache`."""

    def project_text(self, text: Tensor) -> Any:
        """The text as it is: its keys and values are computed in every pass."""
        return text

    def forward(self, x: Tensor, t: Tensor, text: Any, view: Any = None) -> Tensor:
        batch, frames, _, height, width = x.shape
        tokens = self.patch_embedding(x.transpose(1, 2).to(self.dtype)).flatten(2).transpose(1, 2)  # [B, N, M]
        half = self.config.freq_dim // 2
        angles = t.expand(batch, frames)[..., None] * 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
        time = self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype))  # [B, F, M]
        modulation = self.time_projection(time).float().unflatten(-1, (6, -1))
        text = F.pad(text.to(self.dtype), (0, 0, 0, self.config.text_len - text.shape[1]))
        text = self.text_embedding(text)
        backend = self._backend_for(tokens)
        for layer, block in enumerate(self.blocks):
            tokens = self._layer(layer, cast(TransformerBlock, block), tokens, modulation, text, view, backend)
        shift, scale = (self.head.modulation.float()[:, None] + time.float()[:, :, None]).unbind(2)
        out = self.head.head(modulated(tokens, shift, scale, self.head.eps))
        _, p, q = self.config.patch_size
        out = out.view(batch, frames, height // p, width // q, p, q, self.config.out_dim)
        return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, -1, height, width).to(x.dtype)

    def write_kv(self, x: Tensor, t: Tensor, text: Any, view: Any) -> None:
        self.forward(x, t, text, view)

    @staticmethod
    def _layer(
        layer: int, block: TransformerBlock, x: Tensor, modulation: Tensor, text: Tensor, view: ReferenceView, backend: Any
    ) -> Tensor:
        def heads(part: Attention, y: Tensor) -> Tensor:
            return y.unflatten(-1, (part.num_heads, -1))

        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation.float()[:, None] + modulation).unbind(2)
        own, cross = block.self_attn, block.cross_attn
        h = modulated(x, shift1, scale1, block.eps)
        q, k, v = heads(own, normed(own.q(h), own.norm_q)), heads(own, normed(own.k(h), own.norm_k)), heads(own, own.v(h))
        x = gated(x, own.o(view.attend(layer, q, k, v, backend).flatten(2)), gate1)
        q = heads(cross, normed(cross.q(block.norm3(x)), cross.norm_q))
        k, v = heads(cross, normed(cross.k(text), cross.norm_k)), heads(cross, cross.v(text))
        x = x + cross.o(backend(q, k, v).flatten(2))
        return gated(x, block.ffn(modulated(x, shift2, scale2, block.eps)), gate2)


class ReferencePipeline(LongLivePipeline):
    """A pipeline whose transformer is a `ReferenceTransformer`."""

    def _cache(self, num_latent_frames: int | None, height: int, width: int, batch: int) -> KVCache:
        network = self.transformer
        window = (
            Window.full(num_latent_frames or 0) if self.config.window == EVERYTHING else Window.of(self.config.window, self.config.sink)
        )
        return reference_cache(network, height // self._spatial_stride, width // self._spatial_stride, window, self.config.relative_rope)


def reference_cache(network: WanTransformer, height: int, width: int, window: Window, relative: bool = False) -> KVCache:
    """An empty cache for latents of `height` x `width`."""
    _, rows, columns = network.config.patch_size
    grid = Grid(height // rows, width // columns, network.config.rope_theta)
    return cast(KVCache, ReferenceCache(network.config.num_layers, window, grid, relative=relative))
