"""A pipeline of random weights, small enough to be made and run in a second, in the layout of real ones."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan

from longlive.generation.pipeline import LongLivePipeline
from longlive.miniature.language import build_text_encoder, build_tokenizer
from longlive.models.wan import WanTransformer

torch.set_num_threads(1)  # small tensors: more threads only wait for one another, for ever so long beside another program


@pytest.fixture
def model() -> WanTransformer:
    """A transformer of random weights large enough to matter: 2 layers, 4 tokens a frame of 4 x 4 latents with 4 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = WanTransformer(in_dim=4, out_dim=4, dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=5, num_heads=2, num_layers=2)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer(
            dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=64, text_len=32, freq_dim=16, in_dim=8, out_dim=8
        )
        vae = AutoencoderKLWan(base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    encoder = build_text_encoder(len(tokenizer), seed=0)
    settings = {"window": 9, "denoising_steps": (1000, 500), "height": 32, "width": 32}
    LongLivePipeline(transformer.eval(), vae.eval(), encoder, tokenizer, **settings).save_pretrained(folder)
    return folder
