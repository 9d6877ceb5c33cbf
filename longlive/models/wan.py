"""The Wan2.1 diffusion transformer: student, teacher and critic in one module.

Predicts the velocity of a span of frames, given what it may attend to. Every latent frame has its own timestep;
self-attention goes through the memory that a `KVView` gives each layer (without a view the frames attend to one another:
bidirectional). Module names are those of the original Wan checkpoints. Knows nothing of windows, sinks, eviction or prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longlive.ops import attention
from longlive.ops.rope import Rope, rope_for, rotate
from longlive.types import AttentionBackend, Heads, KVView, Latents, Memory, Rotation, Text, TextKV, Timesteps, Visible

Tokens = Float[Tensor, "B N M"]  # M = A D, the model's width
PerFrame = Float[Tensor, "#B #F M"]  # [1, 1, M]: the same for all frames, as when they have one timestep
Modulation = Float[Tensor, "#B #F n M"]


def sinusoid(t: Timesteps, width: int) -> Float[Tensor, "#B #F width"]:
    """Sinusoidal embedding of timesteps, cosines first; float64 (t is not rounded on its way in)."""
    half = width // 2
    angles = t[..., None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tokens, shift: PerFrame, scale: PerFrame, eps: float) -> Tokens:
    """Layer norm without weights, then (1 + scale) x + shift with each frame's own values, in float32."""
    if shift.shape[:2] == (1, 1):
        return F.layer_norm(x.float(), x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps).to(x.dtype)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps).unflatten(1, (shift.shape[1], -1))  # [B, F, n, M]
    return torch.addcmul(shift[:, :, None], normed, 1 + scale[:, :, None]).flatten(1, 2).to(x.dtype)


def add_gated(x: Tokens, y: Tokens, gate: PerFrame) -> Tokens:
    """x + gate y with each frame's own gate, in the gate's float32."""
    if gate.shape[:2] == (1, 1):
        return torch.addcmul(x, y, gate).to(x.dtype)
    x_frames, y_frames = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, y))  # [B, F, n, M]
    return torch.addcmul(x_frames, y_frames, gate[:, :, None]).flatten(1, 2).to(x.dtype)


class Attention(nn.Module):
    """Projections and q/k RMS-norm over all heads together; attention itself happens between `keys_values` and `merge`."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def queries(self, x: Tokens) -> Heads:
        return self._split(self.norm_q(self.q(x)))

    def keys_values(self, x: Tokens) -> tuple[Heads, Heads]:
        return self._split(self.norm_k(self.k(x))), self._split(self.v(x))

    def merge(self, heads: Heads) -> Tokens:
        return self.o(heads.flatten(2))

    def _split(self, x: Tokens) -> Heads:
        return x.unflatten(-1, (self.num_heads, -1))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; modulated by time through shift, scale and gate.

    `forward` takes tensors, named tuples of tensors and the attention backend, and is the only definition of a layer: compilation,
    sharding and quantisation all act on it.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(dim, num_heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = Attention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tokens,
        modulation: Modulation,
        text_k: Visible,
        text_v: Visible,
        rotation: Rotation,
        memory: Memory,
        backend: AttentionBackend,
    ) -> Tokens:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float()[:, None] + modulation).unbind(2)
        x = add_gated(x, self._self_attention(modulate(x, shift1, scale1, self.eps), rotation, memory, backend), gate1)
        x = x + self.cross_attn.merge(backend(self.cross_attn.queries(self.norm3(x)), text_k, text_v))
        return add_gated(x, self.ffn(modulate(x, shift2, scale2, self.eps)), gate2)

    def _self_attention(self, h: Tokens, rotation: Rotation, memory: Memory, backend: AttentionBackend) -> Tokens:
        """A function of its own, so that queries, keys and values are freed before the feed-forward."""
        q, (k, v) = self.self_attn.queries(h), self.self_attn.keys_values(h)
        return self.self_attn.merge(memory.attend(rotate(q, rotation), rotate(k, rotation), v, backend))

    def write_kv(self, x: Tokens, modulation: Modulation, rotation: Rotation, memory: Memory) -> None:
        """Only write the keys and values that `forward` would write."""
        shift, scale = (self.modulation.float()[:, None] + modulation)[:, :, :2].unbind(2)
        k, v = self.self_attn.keys_values(modulate(x, shift, scale, self.eps))
        memory.write(rotate(k, rotation), v)


class Head(nn.Module):
    """Modulated norm, then a projection to the P latent values of a patch."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tokens, time_embedding: PerFrame) -> Float[Tensor, "B N P"]:
        shift, scale = (self.modulation.float()[:, None] + time_embedding[:, :, None]).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


class WanTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Velocity of noisy latents: Wan2.1 (arXiv 2503.20314) with one timestep per frame and a view of the past.

    Adapters beside the weights, to be trained or switched, are those of diffusers' `PeftAdapterMixin` (`load_lora_adapter`, `set_adapters`,
    …); `LongLivePipeline.load_lora_weights` merges them instead, and nothing is slower.

    Args:
        patch_size: latent frames, rows and columns of a token; the first must be 1.
        text_len: positions the cross-attention sees, all of them, unmasked; shorter texts are padded with zeros.
        freq_dim: width of the sinusoidal time embedding.
        rope_theta: base of the rotary frequencies; 10000 in every released model.
    """

    config: Any  # diffusers' frozen dictionary, read by attribute
    _no_split_modules = ("TransformerBlock",)

    @register_to_config
    def __init__(
        self,
        *,
        model_type: str = "t2v",
        patch_size: Sequence[int] = (1, 2, 2),
        text_len: int = 512,
        in_dim: int = 16,
        dim: int = 1536,
        ffn_dim: int = 8960,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 12,
        num_layers: int = 30,
        eps: float = 1e-6,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        if model_type != "t2v":
            raise ValueError(f"model_type {model_type!r} is not supported; this is the text-to-video transformer ('t2v')")
        if patch_size[0] != 1:
            raise ValueError(f"patch_size {tuple(patch_size)} spans {patch_size[0]} frames; only 1 is possible with a timestep per frame")
        if dim % num_heads or dim // num_heads % 2:
            raise ValueError(f"dim {dim} cannot be cut into {num_heads} heads of even width; choose a multiple of {2 * num_heads}")
        patch = (1, patch_size[1], patch_size[2])
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, ffn_dim, num_heads, eps) for _ in range(num_layers))
        self.head = Head(dim, patch[1] * patch[2] * out_dim, eps)
        self._backend = "auto"
        self._chosen: tuple[torch.device, torch.dtype, AttentionBackend] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer, which is never quantised."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def use_attention(self, backend: str) -> None:
        """Choose the attention backend by name: auto, or one of `ops.attention.BACKENDS`.

        Raises:
            ValueError: when there is none of that name; at the first forward pass, where device and dtype are known, when it cannot run.
        """
        if backend != "auto" and backend not in attention.BACKENDS:
            raise ValueError(f"attention backend {backend!r} is unknown; choose auto, {', '.join(attention.BACKENDS)}")
        self._backend, self._chosen = backend, None

    def _backend_for(self, tokens: Tokens) -> AttentionBackend:
        kind = (tokens.device, tokens.dtype)  # under mixed precision not the type of the weights
        if self._chosen is None or self._chosen[:2] != kind:
            self._chosen = (*kind, attention.choose(self._backend, *kind))
        return self._chosen[2]

    def project_text(self, text: Text) -> TextKV:
        """Keys and values of a prompt for the cross-attention of every layer: computed once per prompt, valid until the weights change."""
        _, length, width = text.shape
        if length > self.config.text_len or width != self.config.text_dim:
            raise ValueError(
                f"text embeddings are {length} x {width}; this model reads at most {self.config.text_len} x {self.config.text_dim}"
            )
        text = F.pad(text.to(self.dtype), (0, 0, 0, self.config.text_len - length))
        embedded = self.text_embedding(text)
        keys, values = zip(*(cast(TransformerBlock, block).cross_attn.keys_values(embedded) for block in self.blocks))
        return TextKV(keys, values)

    def forward(self, x: Latents, t: Timesteps, text: Text | TextKV, view: KVView | None = None) -> Latents:
        """Velocity of latents at timesteps `t` (0 to 1000, floating point) under a text, in the shape and dtype of `x`.

        Args:
            t: `[1, 1]` when all frames have the same timestep: modulation is then computed once for all of them.
            view: what the frames may attend to; None: one another (bidirectional).

        Raises:
            ValueError: when height or width is no multiple of the patch, the view is for another number of tokens, the text is too
                long or of another width, or the chosen attention backend cannot run here.
        """
        rope = self.rope(*x.shape[-2:])
        if view is None:
            view = attention.SequenceView(rope.at(range(x.shape[1])))
        tokens, time, modulation = self._embed(x, t, view)
        tokens = self._run(self.blocks, tokens, modulation, text if isinstance(text, TextKV) else self.project_text(text), view)
        out = self.head(tokens, time.float())
        _, p, q = self.config.patch_size
        return rearrange(out, "B (F h w) (p q C) -> B F C (h p) (w q)", F=x.shape[1], h=rope.rows, p=p, q=q).to(x.dtype)

    def write_kv(self, x: Latents, t: Timesteps, text: Text | TextKV, view: KVView) -> None:
        """A forward pass only for the keys and values that it writes into `view`: the last layer ends with them.

        Arguments and errors are those of `forward`.
        """
        tokens, _, modulation = self._embed(x, t, view)
        last = len(self.blocks) - 1
        tokens = self._run(self.blocks[:last], tokens, modulation, text if isinstance(text, TextKV) else self.project_text(text), view)
        cast(TransformerBlock, self.blocks[last]).write_kv(tokens, modulation, view.rotation, view.at(last))

    def _embed(self, x: Latents, t: Timesteps, view: KVView) -> tuple[Tokens, PerFrame, Modulation]:
        """Tokens of the latents, and of the timesteps the embedding and what the layers make their modulation from."""
        _, p, q = self.config.patch_size
        # as a matrix product: a convolution whose kernels do not overlap is one, and libraries are slow at it
        patches = rearrange(x.to(self.dtype), "B F C (h p) (w q) -> B (F h w) (C p q)", p=p, q=q)
        # cloned, because the result is a view and the inputs of later layers are none: one compiled graph serves all
        tokens = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).clone()
        if len(view.rotation.cos) != tokens.shape[1]:
            frames, height, width = x.shape[1], *x.shape[-2:]
            raise ValueError(
                f"{tokens.shape[1]} tokens of {frames} frames of {height} x {width} do not fit a view of {len(view.rotation.cos)}"
            )
        time = self.time_embedding(sinusoid(t, self.config.freq_dim).to(self.dtype))
        return tokens, time, self.time_projection(time).float().unflatten(-1, (6, -1))  # the layers' gradients are summed in float32

    def _run(self, blocks: nn.ModuleList, tokens: Tokens, modulation: Modulation, prompt: TextKV, view: KVView) -> Tokens:
        backend = self._backend_for(tokens)
        for layer, block in enumerate(blocks):
            tokens = block(tokens, modulation, prompt.keys[layer], prompt.values[layer], view.rotation, view.at(layer), backend)
        return tokens

    def rope(self, height: int, width: int) -> Rope:
        """Rotary angles of the tokens of latents of `height` x `width`, on the device of the weights.

        Raises:
            ValueError: when height or width is no multiple of the patch.
        """
        _, rows, columns = self.config.patch_size
        if height % rows or width % columns:
            raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {rows} x {columns}")
        head_dim = self.config.dim // self.config.num_heads
        return rope_for(height // rows, width // columns, head_dim, self.config.rope_theta, self.device)
