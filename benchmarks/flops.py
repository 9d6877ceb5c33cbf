"""Floating-point operations of the transformer per block of video, and the peak rates of GPUs. Measures no time."""

from __future__ import annotations

from longlive.models.wan import WanTransformer

# Dense bfloat16 and float16 tensor cores with float32 sums, TFLOP/s, from the manufacturers' data sheets, by torch's name of the GPU.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}


def flops_of_pass(
    model: WanTransformer, *, frames: int, visible: int, tokens_per_frame: int, timesteps: int | None = None, writes_only: bool = False
) -> int:
    """Floating-point operations (two per multiply-add) of one pass over `frames` frames that attend to `visible`, for one video.

    Matrix products and attention only, as `torch.utils.flop_counter` counts, without the prompt's keys and values.

    Args:
        timesteps: how many different ones the frames have; None: one for each frame.
        writes_only: the pass ends with the keys and values of the last layer.
    """
    sizes, layers = model.config, model.config.num_layers - writes_only
    queries, keys = frames * tokens_per_frame, visible * tokens_per_frame
    product = 2 * queries * sizes.dim * sizes.dim
    linears = 6 * product + 4 * queries * sizes.dim * sizes.ffn_dim  # self q k v o, cross q o, feed-forward
    attended = 4 * queries * (keys + sizes.text_len) * sizes.dim
    patch = 2 * queries * sizes.dim * sizes.patch_size[1] * sizes.patch_size[2]
    times = 2 * (frames if timesteps is None else timesteps) * sizes.dim * (sizes.freq_dim + sizes.dim + 6 * sizes.dim)
    last = 2 * product if writes_only else patch * sizes.out_dim
    return layers * (linears + attended) + patch * sizes.in_dim + last + times


def flops_of_block(model: WanTransformer, *, height: int, width: int, block: int, window: int, steps: int) -> int:
    """Operations per block of `height` x `width` latents with a full window: `steps` denoising passes and the one that writes the cache."""
    _, rows, columns = model.config.patch_size
    sizes = {"frames": block, "visible": window, "tokens_per_frame": height // rows * (width // columns), "timesteps": 1}
    return steps * flops_of_pass(model, **sizes) + flops_of_pass(model, **sizes, writes_only=True)
