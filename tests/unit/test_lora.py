"""LoRAs as people have them: every layout and every place where a strength is said gives the weights that its own library would give."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from longlive import LongLivePipeline
from longlive.checkpoints.lora import LoraFile, load_lora, lora_files
from longlive.models.lora import MergedLoras, add_lora, merge_lora

PREFIX = "base_model.model."
LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.1.ffn.0")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(model, layers=LAYERS, rank=3):
    """Random A and B of some layers, by name."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    made = {}
    for number, layer in enumerate(layers):
        out, inner = shapes[f"{layer}.weight"]
        made[layer] = normal(rank, inner, seed=number), normal(out, rank, seed=100 + number)
    return made


def named(pairs, a="lora_A.weight", b="lora_B.weight", name=lambda layer: layer):
    return {f"{name(layer)}.{part}": tensor for layer, pair in pairs.items() for part, tensor in zip((a, b), pair)}


def changes(model, lora, **settings):
    """What merging adds to each weight."""
    merged = merge_lora(copy.deepcopy(model), lora, **settings).state_dict()
    return {name: merged[name] - tensor for name, tensor in model.state_dict().items() if not torch.equal(merged[name], tensor)}


def assert_adds(model, path, pairs, scale, **settings):
    """The file adds exactly scale B A to those layers, up to the rounding of the sum."""
    found = changes(model, load_lora(path, **settings))
    assert found.keys() == {f"{layer}.weight" for layer in pairs}
    for layer, (a, b) in pairs.items():
        times = scale(layer) if callable(scale) else scale
        torch.testing.assert_close(found[f"{layer}.weight"], times * b @ a, atol=2e-5, rtol=1e-5)


def kohya(layer):
    return "lora_unet_" + layer.replace(".", "_")


def diffusers(layer):
    table = {"self_attn.q": "attn1.to_q", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj"}
    return next(layer.replace(ours, theirs) for ours, theirs in table.items() if ours in layer)


LAYOUTS = {  # name of a layer, and of its factors
    "ours": (lambda layer: PREFIX + layer, "lora_A.weight", "lora_B.weight"),
    "comfyui": (lambda layer: "diffusion_model." + layer, "lora_A.weight", "lora_B.weight"),
    "lightx2v": (lambda layer: "diffusion_model." + layer, "lora_down.weight", "lora_up.weight"),
    "kohya": (kohya, "lora_down.weight", "lora_up.weight"),
    "kohya on diffusers": (lambda layer: kohya(diffusers(layer)), "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda layer: "transformer." + diffusers(layer), "lora_A.weight", "lora_B.weight"),
    "ddp": (lambda layer: "module." + layer, "lora_A.default.weight", "lora_B.default.weight"),
    "ddp of a wrapper": (lambda layer: "module.model." + PREFIX + layer, "lora_A.default.weight", "lora_B.default.weight"),
    "diffsynth": (lambda layer: "pipe.dit." + layer, "lora_A.default.weight", "lora_B.default.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(model, layout, tmp_path):
    """Attention and feed-forward of some layers only; ranks differ; with and without an alpha of each layer, wrapped or not."""
    name, a, b = LAYOUTS[layout]
    pairs = factors(model) | factors(model, LAYERS[:1], rank=5)
    state = named(pairs, a, b, name)
    save_file(state, tmp_path / "lora.safetensors")
    assert_adds(model, tmp_path / "lora.safetensors", pairs, 1)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lora.ckpt")
    assert_adds(model, tmp_path / "lora.ckpt", pairs, 1)
    alphas = {f"{name(layer)}.alpha": torch.tensor(2.0) for layer in pairs}
    save_file(state | alphas, tmp_path / "alpha.safetensors")
    assert_adds(model, tmp_path / "alpha.safetensors", pairs, lambda layer: 2 / len(pairs[layer][0]))
    with pytest.raises(ValueError, match=r"the file says that alpha of .* is 2, and 4 is given"):
        load_lora(tmp_path / "alpha.safetensors", alpha=4)
    assert_adds(model, tmp_path / "lora.safetensors", pairs, lambda layer: 4 / len(pairs[layer][0]), alpha=4)


def test_whole_differences_and_layers_outside_the_blocks(model, tmp_path):
    """As in LightX2V's files: `.diff` of a norm, `.diff_b` of a bias, and factors of the embeddings and of the convolution."""
    patch = model.patch_embedding.weight
    state = {
        "diffusion_model.blocks.0.norm3.diff": normal(24),
        "diffusion_model.blocks.0.self_attn.q.diff_b": normal(24, seed=1),
        "diffusion_model.time_projection.1.lora_down.weight": normal(2, 24, seed=2),
        "diffusion_model.time_projection.1.lora_up.weight": normal(144, 2, seed=3),
        "diffusion_model.patch_embedding.lora_down.weight": normal(2, *patch.shape[1:], seed=4),
        "diffusion_model.patch_embedding.lora_up.weight": normal(24, 2, 1, 1, 1, seed=5),
    }
    save_file(state, tmp_path / "lora.safetensors")
    found = changes(model, load_lora(tmp_path / "lora.safetensors"), strength=0.5)
    down, up = normal(2, *patch.shape[1:], seed=4).flatten(1), normal(24, 2, seed=5)
    expected = {
        "blocks.0.norm3.weight": normal(24),
        "blocks.0.self_attn.q.bias": normal(24, seed=1),
        "time_projection.1.weight": normal(144, 2, seed=3) @ normal(2, 24, seed=2),
        "patch_embedding.weight": (up @ down).view(patch.shape),
    }
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change / 2, atol=1e-5, rtol=1e-5)


def peft_folder(model, folder, **settings):
    """A folder as peft writes it, and what peft itself makes of the model."""
    config = LoraConfig(r=3, target_modules=["self_attn.q", "ffn.0"], init_lora_weights=False, **settings)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), config)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "alpha_pattern": {"ffn.0": 12}},
        {"lora_alpha": 6, "rank_pattern": {"blocks.1.ffn.0": 5}, "alpha_pattern": {"blocks.1.ffn.0": 20}, "use_rslora": True},
    ],
)
def test_peft_configurations(model, settings, tmp_path):
    """The folder, the file in it, and the same configuration in the header that diffusers writes give what peft gives."""
    expected = peft_folder(model, tmp_path / "peft", **settings)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    saved = {name: value for name, value in config.items() if name in ("r", *settings)}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in saved.items()})}
    save_file({name.replace(PREFIX, "transformer."): tensor for name, tensor in state.items()}, tmp_path / "d.safetensors", header)
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "d.safetensors"):
        merged = merge_lora(copy.deepcopy(model), load_lora(path)).state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(merged[name], tensor, atol=2e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"says that alpha is 6, and alpha 3 is given"):
        load_lora(tmp_path / "peft", alpha=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "no plain LoRA .use_dora is true"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"a_setting_of_next_year": 3}, "a_setting_of_next_year is 3"),
        ({"lora_alpha": None}, "has no lora_alpha; give alpha"),
        ({"r": 4}, "has rank 4, but its weights have rank 3"),
    ],
)
def test_configurations_that_are_refused(model, change, words, tmp_path):
    peft_folder(model, tmp_path, lora_alpha=6)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        load_lora(tmp_path)
    if change == {"lora_alpha": None}:
        assert load_lora(tmp_path, alpha=6)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"lora_unet_blocks_0_self_attn_nothing.lora_down.weight": (3, 24)}, "lora_unet_blocks_0_self_attn_nothing"),
        ({"lora_te_text_model.lora_down.weight": (3, 24)}, "lora_te_text_model"),
        ({"blocks.0.self_attn.k.hada_w1_a": (3, 24)}, "hada_w1_a"),
        ({"blocks.0.self_attn.q.lora_magnitude_vector": (24,)}, "lora_magnitude_vector"),
        ({"blocks.0.self_attn.q.dora_scale": (24,)}, "dora_scale"),
        ({"blocks.0.self_attn.k.lora_A.weight": (3, 24)}, "has A of blocks.0.self_attn.k but not B"),
        ({"blocks.0.self_attn.k.alpha": ()}, "has alpha of blocks.0.self_attn.k but not A"),
        ({"module.blocks.0.self_attn.q.lora_A.weight": (3, 24)}, "both A of blocks.0.self_attn.q"),
    ],
)
def test_names_that_are_refused(model, extra, words, tmp_path):
    state = named(factors(model)) | {name: torch.ones(shape) for name, shape in extra.items()}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=words):
        load_lora(tmp_path / "lora.safetensors")


def test_merging_is_what_peft_does_to_the_bit(model):
    adapted = add_lora(copy.deepcopy(model), rank=4, alpha=10)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = normal(*parameter.shape, seed=len(name))
    state = {name.replace(".default.", "."): tensor.clone() for name, tensor in adapted.state_dict().items() if "lora_" in name}
    ours, theirs = merge_lora(copy.deepcopy(model), state, alpha=10).state_dict(), adapted.merge_and_unload().state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_with_a_strength_each_and_out_again_exactly(model, dtype):
    torch.nn.Module.to(model, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = named({layer: pair for layer, pair in factors(model).items()}, name=lambda layer: PREFIX + layer)
    second = named(factors(model, LAYERS[1:], rank=2), name=lambda layer: PREFIX + layer)
    merged = MergedLoras(model)
    merged.add("a", first, strength=0.8)
    alone = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged.add("b", second, strength=-0.3)
    both = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.equal(both[f"{LAYERS[1]}.weight"], alone[f"{LAYERS[1]}.weight"])
    merged.set({"b": 2.0})
    merged.set({"a": 0.8, "b": -0.3})
    assert all(torch.equal(tensor, both[name]) for name, tensor in model.state_dict().items())
    merged.remove(["b"])
    assert all(torch.equal(tensor, alone[name]) for name, tensor in model.state_dict().items())
    for wrong, words in ((lambda: merged.add("a", second), "already"), (lambda: merged.set({"c": 1}), "there is no LoRA 'c'; there is a")):
        with pytest.raises(ValueError, match=words):
            wrong()
    with pytest.raises(ValueError, match="is a number"):
        merged.set({"a": math.nan})
    merged.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_pipeline_with_several_loras_and_without(tiny, tmp_path):
    """Merged ones change the video, strengths can be changed and named, and after `unload` the video is to the bit the one before."""
    pipe = LongLivePipeline.from_pretrained(tiny)

    def video():
        seed = torch.Generator().manual_seed(0)
        return pipe("a red circle", num_latent_frames=3, generator=seed, output_type="latent").frames

    lora = named(factors(pipe.transformer), name=lambda layer: "diffusion_model." + layer)
    save_file(lora, tmp_path / "a.safetensors")
    before = video()
    pipe.load_lora_weights(tmp_path / "a.safetensors", strength=0.5)
    pipe.load_lora_weights(lora, adapter_name="b", strength=0.25)
    both = video()
    assert not torch.equal(both, before) and pipe.lora_strengths == {"lora_0": 0.5, "b": 0.25}
    pipe.set_adapters("b")
    assert not torch.equal(video(), both) and pipe.get_active_adapters() == ["b"]
    pipe.set_adapters(["lora_0", "b"], [0.5, 0.25])
    assert torch.equal(video(), both)
    pipe.delete_adapters("b")
    with pytest.raises(ValueError, match=r"2 strengths for 1 LoRAs"):
        pipe.set_adapters("lora_0", [1.0, 2.0])
    pipe.unload_lora_weights()
    assert torch.equal(video(), before) and pipe.lora_strengths == {}
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="what is fused is part of the model"):
        pipe.set_adapters("lora_0", 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ("a.pt", [LoraFile("a.pt", 1.0, 8)]),
        ("a.pt:0.8", [LoraFile("a.pt", 0.8, 8)]),
        ("c:/a.pt", [LoraFile("c:/a.pt", 1.0, 8)]),
        (["a.pt:-1", {"path": "b", "strength": 2, "alpha": 4}], [LoraFile("a.pt", -1.0, 8), LoraFile("b", 2.0, 4.0)]),
        ({"path": "b", "which": "ema_lora"}, [LoraFile("b", 1.0, 8, "ema_lora")]),
    ],
)
def test_what_a_user_writes(given, expected):
    assert lora_files(given, alpha=8) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"file": "a"}, "a LoRA has no 'file'"),
        ({"strength": 1}, "has no path"),
        ({"path": "a", "strength": "x"}, "is no number"),
        (3, "is no LoRA"),
    ],
)
def test_what_a_user_must_not_write(given, words):
    with pytest.raises(ValueError, match=words):
        lora_files(given)
