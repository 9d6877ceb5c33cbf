"""Our transformer equals diffusers' on the same random weights, their names converted: bidirectional, one noise level a video."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel

from longlive.checkpoints import configs, convert, store
from longlive.models.wan import WanTransformer

SIZES = {
    "square patch": {"dim": 96, "ffn_dim": 160, "num_heads": 4, "num_layers": 2, "freq_dim": 32, "text_dim": 24, "text_len": 16},
    "other patch": {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 3, "freq_dim": 64, "text_dim": 40, "text_len": 8}
    | {"patch_size": (1, 4, 2), "in_dim": 6, "out_dim": 6, "eps": 0.01},
}  # fmt: skip


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def ours(request) -> WanTransformer:
    """Random weights, none of them zero or one, so that a norm or a bias in the wrong place shows."""
    generator = torch.Generator().manual_seed(3)
    model = WanTransformer(**request.param)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def diffusers_of(model: WanTransformer) -> WanTransformer3DModel:
    other = WanTransformer3DModel(**configs.config_to_diffusers(model.config))
    store.fill(other, convert.transformer_to_diffusers(model.state_dict()), what="diffusers' model")
    return other.eval()


@torch.no_grad()
def test_velocity_equals_diffusers(ours):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 5, ours.config.in_dim, 8, 12, generator=generator)
    text = torch.randn(2, ours.config.text_len, ours.config.text_dim, generator=generator)
    t = torch.tensor([937.5, 625.0])
    theirs = diffusers_of(ours)(latents.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
    velocity = ours(latents, t[:, None].expand(2, 5), text)
    assert velocity.abs().mean() > 0.1
    assert (velocity - theirs).abs().max() < 2e-5


def test_names_and_config_come_back(ours):
    theirs = diffusers_of(ours)
    state = convert.transformer_to_wan(theirs.state_dict())
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())
    config = configs.config_to_wan(theirs.config) | {"text_len": ours.config.text_len}
    store.fill(WanTransformer(**config), state, what="the model")


def test_names_agree_with_diffusers_own_converter(ours):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    assert (
        convert.transformer_to_diffusers(ours.state_dict()).keys() == convert_wan_transformer_to_diffusers(dict(ours.state_dict())).keys()
    )


def test_folders_of_diffusers_and_of_our_own_load(ours, tmp_path):
    diffusers_of(ours).save_pretrained(tmp_path / "theirs" / "transformer")
    ours.save_pretrained(tmp_path / "ours", max_shard_size="200KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "transformer", tmp_path / "ours"):
        state, config = store.load_transformer(folder)
        model = WanTransformer(**config | {"text_len": ours.config.text_len})
        store.fill(model, state, what="the model")
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


def test_weights_tell_the_config_of_the_model(ours):
    found = configs.transformer_config(ours.state_dict(), num_heads=ours.config.num_heads, text_len=ours.config.text_len)
    expected = {key: ours.config[key] for key in found} | {"eps": 1e-6}  # which they do not tell: that of every released model
    assert found | {"patch_size": tuple(found["patch_size"])} == expected


def test_another_rotary_base_cannot_go_to_diffusers():
    with pytest.raises(ValueError, match="base 10000"):
        configs.config_to_diffusers({"rope_theta": 100.0})


def test_image_to_video_is_refused(tmp_path):
    config = dict(WanTransformer3DModel(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8, image_dim=4).config)
    with pytest.raises(ValueError, match="image_dim is 4"):
        configs.config_to_wan(json.loads(json.dumps(config)))
