"""What parity with diffusers does not show: sizes of the released model, dtypes, padded texts, the attention backend, refusals."""

import logging
import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from longlive.models.wan import WanTransformer, add_gated, modulate, sinusoid
from longlive.ops.attention import SequenceView


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_defaults_are_wan_1_3b():
    with torch.device("meta"):
        model = WanTransformer()
    parameters = list(model.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (825, 1_418_996_800)
    assert sum(p.numel() for p in model.blocks[0].parameters()) == 46_440_704
    config = model.config
    assert (config.num_heads, config.text_len, config.freq_dim, config.rope_theta, config.eps) == (12, 512, 256, 10000, 1e-6)
    assert model.rope(60, 104).tokens_per_frame == 1560 and config.patch_size == (1, 2, 2)


def test_modulation_begins_with_the_variance_of_wan():
    """Normal numbers / sqrt(dim)."""
    model = WanTransformer(dim=768, ffn_dim=1, num_layers=1, text_dim=1)
    weights = dict(model.named_parameters())
    for modulation in (weights["blocks.0.modulation"], weights["head.modulation"]):
        assert modulation.std().item() == pytest.approx(1 / math.sqrt(768), rel=0.1)
        assert modulation.mean().abs() < 0.01


def test_time_is_embedded_in_float64_cosines_first():
    t = torch.tensor([[833.3333, 0.0, 20.5]])
    angles = t.double().numpy()[..., None] / 10000.0 ** (np.arange(8) / 8)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    np.testing.assert_allclose(sinusoid(t, 16).numpy(), expected, rtol=0, atol=1e-12)
    assert sinusoid(t.to("meta"), 16).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulation_and_gates_are_applied_in_float32_to_each_frame(dtype):
    x, y = gaussian(2, 6, 8).to(dtype), gaussian(2, 6, 8, seed=1).to(dtype)  # 3 frames of 2 tokens
    shift, scale = gaussian(2, 2, 3, 8, seed=2)
    each = [one.repeat_interleave(2, dim=1) for one in (shift, scale)]
    normed = torch.nn.functional.layer_norm(x.float(), (8,), eps=0.1)
    for found, expected in (
        (modulate(x, shift, scale, 0.1), torch.addcmul(each[0], normed, 1 + each[1])),
        (add_gated(x, y, scale), torch.addcmul(x.float(), y.float(), each[1])),
    ):
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_latents_keep_their_dtype_whatever_that_of_the_weights(model):
    latents, text, t = gaussian(1, 2, 4, 4, 4), gaussian(1, 5, 8, seed=1), torch.full((1, 2), 937.5)
    expected = model(latents, t, text)
    for dtype in (torch.bfloat16, torch.float64):
        other = deepcopy(model).to(dtype)
        found = other(latents, t, text)
        assert found.dtype == torch.float32 and other.project_text(text).keys[0].dtype == dtype
        assert 0 < (found - expected).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()


def test_time_reaches_every_layer_in_float32(model):
    """As what the layers' modulations are made from, and what their gradients are summed in."""
    model, dtypes = model.bfloat16(), []
    for part in (*model.blocks, model.head):
        part.register_forward_pre_hook(lambda part, inputs: dtypes.append(inputs[1].dtype))
    model(gaussian(1, 2, 4, 4, 4), torch.full((1, 2), 937.5), gaussian(1, 5, 8))
    assert dtypes == [torch.float32] * 3


def test_a_text_is_padded_with_zeros_and_read_once(model):
    text = gaussian(2, 3, 8)
    padded = torch.cat([text, torch.zeros(2, 2, 8)], 1)
    short, whole = model.project_text(text), model.project_text(padded)
    for found, expected in zip((*short.keys, *short.values), (*whole.keys, *whole.values), strict=True):
        assert found.shape == (2, 5, 2, 12) and torch.equal(found, expected)
    latents, t = gaussian(2, 2, 4, 4, 4, seed=1), torch.full((2, 2), 937.5)
    assert torch.equal(model(latents, t, short), model(latents, t, padded))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "i2v"}, "model_type 'i2v' is not supported"),
        ({"patch_size": (2, 2, 2)}, r"patch_size \(2, 2, 2\) spans 2 frames; only 1 is possible"),
        ({"dim": 26, "num_heads": 4}, "dim 26 cannot be cut into 4 heads of even width; choose a multiple of 8"),
        ({"dim": 12, "num_heads": 4}, "dim 12 cannot be cut into 4 heads of even width; choose a multiple of 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WanTransformer(**settings)


def test_inputs_that_do_not_fit_are_refused(model):
    latents, text, t = gaussian(1, 2, 4, 4, 4), gaussian(1, 5, 8), torch.full((1, 2), 500.0)
    for size in ((5, 4), (4, 5)):
        with pytest.raises(ValueError, match=f"latents of {size[0]} x {size[1]} cannot be cut into patches of 2 x 2"):
            model(gaussian(1, 2, 4, *size), t, text)
    for length, width in ((6, 8), (5, 7)):
        with pytest.raises(ValueError, match=f"text embeddings are {length} x {width}; this model reads at most 5 x 8"):
            model(latents, t, gaussian(1, length, width))
    with pytest.raises(ValueError, match="8 tokens of 2 frames of 4 x 4 do not fit a view of 12"):
        model(latents, t, text, SequenceView(model.rope(4, 4).at(range(3))))


def test_the_attention_backend_is_chosen_once_for_each_dtype_and_name(model, caplog):
    caplog.set_level(logging.INFO)
    latents, text, t = gaussian(1, 2, 4, 4, 4), gaussian(1, 5, 8), torch.full((1, 2), 500.0)
    for chosen in (1, 1):
        model(latents, t, text)
        assert caplog.text.count("attention backend: sdpa") == chosen
    model.double()(latents, t, text)
    assert caplog.text.count("attention backend: sdpa") == 2
    for name in ("auto", "sdpa"):
        model.use_attention(name)
        model(latents, t, text)
    assert caplog.text.count("attention backend: sdpa") == 4
    with pytest.raises(ValueError, match="attention backend 'flash' is unknown; choose auto, sdpa, cudnn, fa2, fa3"):
        model.use_attention("flash")
    model.use_attention("fa3")
    with pytest.raises(ValueError, match="'fa3' cannot be used: it needs a CUDA device"):
        model(latents, t, text)
