"""The original VAE under diffusers' names reproduces the golden vectors, and comes back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from longlive.checkpoints import configs, convert, store

GOLDEN = Path(__file__).parents[1] / "golden"


def test_vae_reproduces_the_golden_vectors(tmp_path):
    torch.save(load_file(GOLDEN / "vae_weights.safetensors"), tmp_path / "Wan2.1_VAE.pth")
    golden = load_file(GOLDEN / "vae.safetensors")
    vae = store.load_vae(tmp_path)
    mean, deviation = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        latents = (vae.encode(golden["pixels"]).latent_dist.mode() - mean) / deviation
        images = vae.decode(golden["z"] * deviation + mean).sample
    assert (latents - golden["latents"]).abs().max() < 2e-4
    assert (images - golden["decoded"]).abs().max() < 2e-4


def test_config_is_read_off_the_weights():
    config = json.loads((GOLDEN / "manifest.json").read_text())["vae_weights"]["config"]
    found = configs.vae_config(load_file(GOLDEN / "vae_weights.safetensors"))
    assert found == {"temperal_downsample" if key == "temporal_downsample" else key: value for key, value in config.items()}


def test_names_agree_with_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = load_file(GOLDEN / "vae_weights.safetensors")
    ours, theirs = convert.vae_to_diffusers(weights), convert_wan_vae_to_diffusers(dict(weights))
    assert {name: tensor.data_ptr() for name, tensor in ours.items()} == {name: tensor.data_ptr() for name, tensor in theirs.items()}
