"""configs/train_long.yaml starts: the whole recipe on 2 layers of LongLive-1.3B with random weights, at 64 x 64 pixels."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from longlive.checkpoints.lora import load_lora
from longlive.miniature.language import build_tokenizer
from longlive.models.lora import merge_lora
from longlive.models.wan import WanTransformer
from longlive.training import __main__ as train
from longlive.training.networks import load_network


@pytest.mark.slow
def test_the_long_recipe_starts_at_240_frames(tmp_path):
    """A step that trains generator and critic, and one of the critic alone; everything but depth and picture size as for 1.3B."""
    torch.manual_seed(0)
    network = WanTransformer(num_layers=2)
    torch.nn.init.normal_(network.head.head.weight, std=0.02)
    network.save_pretrained(tmp_path / "model" / "transformer")
    del network
    components, tokenizer = tmp_path / "components", build_tokenizer()
    size = {"d_model": 4096, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": len(tokenizer)}
    UMT5EncoderModel(UMT5Config(**size)).save_pretrained(components / "text_encoder")
    tokenizer.save_pretrained(components / "tokenizer")
    AutoencoderKLWan().save_pretrained(components / "vae")
    prompts = [tmp_path / name for name in ("prompts.txt", "switch.txt")]
    prompts[0].write_text("a red circle\na blue square\na green ring\n")
    prompts[1].write_text("a green circle\na red square\na blue ring\n")

    given = {"generator": tmp_path / "model", "teacher": tmp_path / "model", "critic": tmp_path / "model", "components": components}
    given |= {"prompts": prompts[0], "switch_prompts": prompts[1], "embeddings": tmp_path / "embeddings", "height": 64, "width": 64}
    given |= {"validation_frames": 24, "validation_videos": 1}
    words = [f"long.{name}={value}" for name, value in given.items()]
    run = tmp_path / "run"
    assert train.main(["--config", "configs/train_long.yaml", f"run={run}", "steps=2", "device=cpu", *words]) == 0

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    both, critic = lines[0], next(line for line in lines if line["step"] == 2)
    assert {"generator/loss", "critic/loss"} <= both.keys() and "generator/loss" not in critic
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert both["video/frames"] == 39 and critic["video/frames"] == 57  # clips of 21, 18, 18 frames of one video
    lora = load_lora(run / "export" / "lora.pt")
    assert len(lora) == 2 * 2 * 10 and {tensor.shape[0] for name, tensor in lora.items() if "lora_A" in name} == {256}
    assert max(tensor.abs().max() for name, tensor in lora.items() if "lora_B" in name) > 0
    merge_lora(load_network(tmp_path / "model"), lora)
    assert list(run.glob("step_000002_0.mp4")) and list(run.glob("step_000002.png"))
