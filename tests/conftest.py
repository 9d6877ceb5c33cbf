"""A pipeline of random weights, small enough to be made and run in a second, in the layout of real ones."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

from tests import annotations  # noqa: F401  named below

CORE = ("ops", "models.wan", "cache", "generation.rollout", "generation.denoiser", "training.clips", "training.dmd")
if os.environ.get("LONGLIVE_CHECK_ANNOTATIONS"):  # before anything of the package is imported; not always: torch.compile sees the checks
    install_import_hook([f"longlive.{name}" for name in CORE], "tests.annotations.check_tensors")

# ruff: noqa: E402
from diffusers import AutoencoderKLWan
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast, LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="session")
def writer(tmp_path_factory) -> Path:
    """A folder with a causal model that says words at random, a full stop one time in nine and the end one time in nine."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "writer", build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data[:, 0] = 10  # after the norm a constant of about 4: the head's first column is a bias
    model.lm_head.weight.data[:, 0] = 0
    model.lm_head.weight.data[[1, tokenizer.convert_tokens_to_ids(".")], 0] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP of one layer and random weights, in transformers' layout."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {token: number for number, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[], **ends)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8}
    text = small | {"vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder
