"""A LongLive-1.3B of full size, random weights in the files as they are released, loads, merges its LoRA and makes a block in 16 GB.

Only the text encoder is cut short (2 of 24 blocks, a vocabulary of 64). Writing and making run in processes of their own, so that the peak
of memory is that of a program a person starts. Needs 8 GB of disk.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GIGABYTES_OF_DISK = 9
GIGABYTES_OF_MEMORY = 16
RANK = 256


@pytest.mark.slow
def test_released_files_of_full_size_make_a_block_within_16_gb(tmp_path):
    if shutil.disk_usage(tmp_path).free < GIGABYTES_OF_DISK * 1e9:
        pytest.skip(f"needs {GIGABYTES_OF_DISK} GB of disk in {tmp_path}")
    try:
        run("write", tmp_path)
        report = run("make", tmp_path)
    finally:
        shutil.rmtree(tmp_path)
    print(report)
    assert report["images"] == [1, 9, 64, 64, 3]
    assert report["finite"] and report["tones"] > 1
    assert report["dtypes"] == ["torch.bfloat16"]
    assert report["merged"] > 0
    assert report["peak_gigabytes"] < GIGABYTES_OF_MEMORY


def run(step: str, folder: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, __file__, step, folder], env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def write(folder: Path) -> dict:
    """`Wan2.1-T2V-1.3B/` without the transformer that LongLive replaces, and `LongLive-1.3B/models/`."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from longlive.checkpoints import convert, store
    from longlive.models.lora import adapted_linears
    from longlive.models.wan import WanTransformer

    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, deviation: float = 0.02) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(deviation)

    with torch.device("meta"):
        model = WanTransformer()
    state = {name: normal(*tensor.shape) for name, tensor in model.state_dict().items()}
    for name in state:
        if ".norm" in name and name.endswith(".weight"):
            state[name] += 1
    models_folder = folder / "LongLive-1.3B" / "models"
    store.write_pt({"generator": convert.transformer_to_longlive(state)}, models_folder / "longlive_base.pt")
    del state
    lora = {}
    for name in adapted_linears(model):
        linear = model.get_submodule(name)
        lora[f"base_model.model.{name}.lora_A.weight"] = normal(RANK, linear.in_features)
        lora[f"base_model.model.{name}.lora_B.weight"] = normal(linear.out_features, RANK)
    store.write_pt({"generator_lora": lora}, models_folder / "lora.pt")
    del lora

    wan = folder / "Wan2.1-T2V-1.3B"
    tokenizer_folder = wan / "google" / "umt5-xxl"
    tokenizer_folder.mkdir(parents=True)
    released = {"dim": 1536, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12}
    released |= {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "num_layers": 30, "out_dim": 16, "text_len": 512}
    (wan / "config.json").write_text(json.dumps(released))
    torch.manual_seed(2)
    store.write_pt(convert.vae_to_wan(AutoencoderKLWan().state_dict()), wan / "Wan2.1_VAE.pth")
    text = {"token_embedding.weight": normal(64, 4096, deviation=1), "norm.weight": torch.ones(4096)}
    for layer in range(2):
        text |= {f"blocks.{layer}.attn.{part}.weight": normal(4096, 4096) for part in "qkvo"}
        text |= {f"blocks.{layer}.norm{index}.weight": torch.ones(4096) for index in (1, 2)}
        text |= {f"blocks.{layer}.ffn.{part}.weight": normal(10240, 4096) for part in ("gate.0", "fc1")}
        text[f"blocks.{layer}.ffn.fc2.weight"] = normal(4096, 10240)
        text[f"blocks.{layer}.pos_embedding.embedding.weight"] = normal(32, 64)
    store.write_pt({name: tensor.bfloat16() for name, tensor in text.items()}, wan / "models_t5_umt5-xxl-enc-bf16.pth")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "in", "snow"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tokenizer_folder / "tokenizer.json"))
    (tokenizer_folder / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}')
    return {"gigabytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9}


def make(folder: Path) -> dict:
    """Load as a user does, one block of video, and what it took."""
    from longlive.checkpoints import store
    from longlive.generation.pipeline import LongLivePipeline

    start = time.perf_counter()
    weights = folder / "LongLive-1.3B" / "models"
    pipeline = LongLivePipeline.from_original(
        folder / "Wan2.1-T2V-1.3B", weights / "longlive_base.pt", weights / "lora.pt", torch_dtype=torch.bfloat16
    )
    loaded = time.perf_counter()
    output = pipeline(
        "a red fox in snow", num_latent_frames=3, height=64, width=64, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    made = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert not isinstance(output, tuple)
    images = torch.as_tensor(output.frames)
    name = "blocks.7.ffn.0.weight"
    base = store.load_transformer(weights / "longlive_base.pt").state[name]
    return {
        "images": list(images.shape),
        "finite": bool(images.float().isfinite().all()),
        "tones": len(images.unique()),
        "dtypes": sorted({str(parameter.dtype) for parameter in pipeline.transformer.parameters()}),
        "merged": (pipeline.transformer.get_parameter(name).float() - base).abs().max().item(),
        "seconds_to_load": round(loaded - start, 1),
        "seconds_to_make": round(made - loaded, 1),
        "peak_gigabytes": round(peak, 2),
    }


if __name__ == "__main__":
    print(json.dumps({"write": write, "make": make}[sys.argv[1]](Path(sys.argv[2]))))
