"""Every layout of weights loads, converts and comes back bit for bit; what does not fit is refused in words; no file runs code."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors

from longlive import convert as command
from longlive.checkpoints import configs, convert, store
from longlive.checkpoints.lora import load_lora, lora_ranks, lora_to_diffusers, lora_to_longlive
from longlive.checkpoints.store import WeightsKind
from longlive.models.lora import merge_lora
from longlive.models.wan import WanTransformer

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = json.loads((GOLDEN / "manifest.json").read_text())["dit_weights"]["config"]


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def weights():
    return golden("dit_weights")


@pytest.fixture
def wan_folder(tmp_path, weights):
    """A folder like `Wan-AI/Wan2.1-T2V-1.3B`, small."""
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    released = {key: value for key, value in CONFIG.items() if key != "patch_size"} | {"eps": 1e-6}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "_diffusers_version": "0.30.0"} | released))
    torch.save(golden("vae_weights"), folder / "Wan2.1_VAE.pth")
    torch.save(golden("text_encoder_weights"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    (folder / "google" / "umt5-xxl" / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    return folder


def program(*arguments) -> int:
    return command.main([str(argument) for argument in arguments])


# -- transformers ------------------------------------------------------------------------------------------------------------------


def wrapped(state, prefix="model.", infix=""):
    """Names as they are saved from a wrapper that holds the network, each block wrapped once more."""
    return {prefix + name.replace("blocks.0.", f"blocks.0.{infix}"): tensor for name, tensor in state.items()}


LAYOUTS = {
    "longlive_base": lambda state: {"generator": wrapped(state)},
    "ode_init": lambda state: {"model": wrapped(state)},
    "fsdp ema": lambda state: {"generator_ema": wrapped(state, "model._fsdp_wrapped_module.", "_fsdp_wrapped_module.")},
    "checkpointed": lambda state: {"generator": wrapped(state, "model.", "_checkpoint_wrapped_module."), "critic": {}, "step": 700},
    "compiled": lambda state: {"generator": wrapped(state, "_orig_mod.model.")},
    "adapter": lambda state: wrapped(state, "base_model.model."),
    "adapter's base layers": lambda state: {
        "base_model.model." + name.replace(".q.weight", ".q.base_layer.weight"): tensor for name, tensor in state.items()
    },
    "bare": lambda state: state,
    "bare, diffusers' names": convert.transformer_to_diffusers,
    "prefix of other tools": lambda state: wrapped(state, "model.diffusion_model."),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_transformer_file_gives_the_original_names(layout, weights, tmp_path):
    torch.save(layout(weights), tmp_path / "file.pt")
    state, config = store.load_transformer(tmp_path / "file.pt")
    assert_equal(state, weights)
    assert config is None


def test_the_part_asked_for_is_taken(weights, tmp_path):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"generator": wrapped(weights), "generator_ema": wrapped(other), "critic": wrapped(other)}, tmp_path / "model.pt")
    assert_equal(store.load_transformer(tmp_path / "model.pt").state, weights)
    assert_equal(store.load_transformer(tmp_path / "model.pt", which="generator_ema").state, other)
    assert_equal(store.load_transformer(tmp_path / "model.pt", which="critic").state, other)
    with pytest.raises(ValueError, match=r"no 'generator_lora'; it has generator, generator_ema, critic"):
        store.load_transformer(tmp_path / "model.pt", which="generator_lora")
    torch.save(weights, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no part 'generator_ema'"):
        store.load_transformer(tmp_path / "bare.pt", which="generator_ema")


def test_a_released_folder_is_found_by_its_file(weights, tmp_path):
    store.write_pt({"generator": wrapped(weights)}, tmp_path / "LongLive-1.3B" / "models" / "longlive_base.pt")
    assert_equal(store.load_transformer(tmp_path / "LongLive-1.3B").state, weights)


def test_original_folder_gives_weights_and_config(wan_folder, weights):
    state, config = store.load_transformer(wan_folder)
    assert_equal(state, weights)
    model = WanTransformer(**(config or {}))
    store.fill(model, state, what="the model")


@pytest.mark.parametrize("middle", ["wan", "diffusers", "longlive", "self-forcing"])
def test_the_program_goes_there_and_back(middle, wan_folder, weights, tmp_path, capsys):
    assert (
        program(
            "--from", wan_folder / "diffusion_pytorch_model.safetensors", "--num-heads", 4, "--to", middle, "--output", tmp_path / "middle"
        )
        == 0
    )
    assert program("--from", tmp_path / "middle", "--num-heads", 4, "--to", "wan", "--output", tmp_path / "back") == 0
    assert "found a Wan transformer (original names): 96 tensors" in capsys.readouterr().out
    assert_equal(store.load_transformer(tmp_path / "back").state, weights)


def test_the_program_converts_whole_folders_both_ways(wan_folder, weights, tmp_path):
    assert program("--from", wan_folder, "--to", "diffusers", "--output", tmp_path / "diffusers") == 0
    pipeline = WanPipeline.from_pretrained(tmp_path / "diffusers")
    assert_equal(convert.transformer_to_wan(pipeline.transformer.state_dict()), weights)
    assert program("--from", tmp_path / "diffusers", "--to", "wan", "--output", tmp_path / "back") == 0
    assert sorted(file.name for file in (tmp_path / "back").rglob("*")) == sorted(file.name for file in wan_folder.rglob("*"))
    assert_equal(store.read(tmp_path / "back" / "Wan2.1_VAE.pth"), golden("vae_weights"))
    assert_equal(store.read(tmp_path / "back" / "models_t5_umt5-xxl-enc-bf16.pth"), golden("text_encoder_weights"))
    assert_equal(store.load_transformer(tmp_path / "back").state, weights)


def test_shards_and_their_index_come_back(weights, tmp_path):
    store.write_safetensors(weights, tmp_path / "out", config={"dim": 96}, max_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_equal(store.read(tmp_path / "out"), weights)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {(tmp_path / "out").stat().st_mode & 0o666}
    (tmp_path / "out" / "diffusion_pytorch_model-00002-of-00006.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00006"):
        store.read(tmp_path / "out")


# -- LoRA --------------------------------------------------------------------------------------------------------------------------

LORA_LAYOUTS = {
    "lora.pt": lambda lora: {"generator_lora": lora, "critic_lora": {}, "step": 3},
    "bare": lambda lora: lora,
    "named adapter": lambda lora: {name.replace(".weight", ".default.weight"): tensor for name, tensor in lora.items()},
    "fsdp": lambda lora: {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): tensor for name, tensor in lora.items()},
    "no prefix": lambda lora: {name.removeprefix("base_model.model."): tensor for name, tensor in lora.items()},
    "diffusers": lora_to_diffusers,
}


@pytest.mark.parametrize("layout", LORA_LAYOUTS.values(), ids=LORA_LAYOUTS.keys())
def test_every_lora_gives_the_released_names(layout, tmp_path):
    lora = golden("lora_weights")
    torch.save(layout(lora), tmp_path / "lora.pt")
    assert_equal(load_lora(tmp_path / "lora.pt"), lora)
    assert lora_ranks(lora) == [4]


def test_diffusers_reads_the_lora_we_write_and_we_read_it_back(tmp_path):
    lora = golden("lora_weights")
    assert program("--from", GOLDEN / "lora_weights.safetensors", "--to", "diffusers", "--output", tmp_path / "out") == 0
    theirs = WanTransformer3DModel(**configs.config_to_diffusers(CONFIG | {"eps": 1e-6}))
    store.fill(theirs, convert.transformer_to_diffusers(golden("dit_weights")), what="diffusers' model")
    theirs.load_lora_adapter(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), prefix="transformer")
    theirs.fuse_lora()
    theirs.unload_lora()
    fused = convert.transformer_to_wan(theirs.state_dict())
    plain = WanTransformer(**CONFIG)
    store.fill(plain, golden("dit_weights"), what="the model")
    ours = merge_lora(plain, lora).state_dict()
    assert all(torch.allclose(fused[name], ours[name], atol=1e-6) for name in ours)
    assert not torch.equal(fused["blocks.0.ffn.2.weight"], golden("dit_weights")["blocks.0.ffn.2.weight"])
    assert program("--from", tmp_path / "out" / "pytorch_lora_weights.safetensors", "--to", "longlive", "--output", tmp_path / "back") == 0
    assert_equal(load_lora(tmp_path / "back" / "models" / "lora.pt"), lora)


def test_a_peft_folder_brings_its_alpha(tmp_path):
    lora = golden("lora_weights")
    save_file(lora, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    read = load_lora(tmp_path)
    assert all(torch.equal(read[name], tensor * (2 if ".lora_B." in name else 1)) for name, tensor in lora.items())


@pytest.mark.parametrize("alpha", [None, 8])
def test_the_program_merges(alpha, weights, tmp_path):
    lora = golden("lora_weights")
    store.write_pt({"generator": wrapped(weights)}, tmp_path / "longlive_base.pt")
    store.write_pt({"generator_lora": lora}, tmp_path / "lora.pt")
    strength = ("--alpha", alpha) if alpha else ()
    arguments = ("--from", tmp_path / "longlive_base.pt", "--lora", tmp_path / "lora.pt", *strength, "--num-heads", 4)
    assert program(*arguments, "--to", "wan", "--output", tmp_path / "out") == 0
    merged = store.load_transformer(tmp_path / "out").state
    assert merged.keys() == weights.keys()
    for name, tensor in weights.items():
        a = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        change = (alpha or 4) / 4 * lora[a.replace("lora_A", "lora_B")] @ lora[a] if name.endswith(".weight") and a in lora else 0
        assert torch.allclose(merged[name], tensor + change, atol=1e-6), name


def test_broken_loras_are_refused(tmp_path):
    lora = golden("lora_weights")
    name = next(iter(lora))
    with pytest.raises(ValueError, match=r"but not .*; the file is incomplete"):
        lora_to_longlive({other: tensor for other, tensor in lora.items() if other != name})
    wider = {key: tensor.repeat(2, 1) if key == name else tensor for key, tensor in lora.items()}
    with pytest.raises(ValueError, match=r"do not go together: A is \[8, 96\], B is \[96, 4\]"):
        lora_to_longlive(wider)


# -- what does not fit -------------------------------------------------------------------------------------------------------------

FILES = {
    WeightsKind.WAN: lambda: golden("dit_weights"),
    WeightsKind.WAN_DIFFUSERS: lambda: convert.transformer_to_diffusers(golden("dit_weights")),
    WeightsKind.LORA: lambda: golden("lora_weights"),
    WeightsKind.VAE: lambda: golden("vae_weights"),
    WeightsKind.VAE_DIFFUSERS: lambda: convert.vae_to_diffusers(golden("vae_weights")),
    WeightsKind.TEXT: lambda: golden("text_encoder_weights"),
    WeightsKind.TEXT_TRANSFORMERS: lambda: convert.text_to_transformers(golden("text_encoder_weights")),
    WeightsKind.CHECKPOINT: lambda: {"critic": wrapped(golden("dit_weights")), "step": 7},
    WeightsKind.UNKNOWN: lambda: {"conv.weight": torch.zeros(2)},
}


@pytest.mark.parametrize("kind", WeightsKind)
def test_each_kind_is_told_and_taken_for_nothing_else(kind, tmp_path):
    state = FILES[kind]()
    torch.save(state, tmp_path / "some.pt")
    assert store.identify(state) is kind
    readers = {
        store.load_transformer: (WeightsKind.WAN, WeightsKind.WAN_DIFFUSERS),
        load_lora: (WeightsKind.LORA,),
        store.load_vae: (WeightsKind.VAE, WeightsKind.VAE_DIFFUSERS),
        store.load_text_model: (WeightsKind.TEXT, WeightsKind.TEXT_TRANSFORMERS),
    }
    for reader, kinds in readers.items():
        if kind in kinds:
            reader(tmp_path / "some.pt")
            continue
        with pytest.raises(ValueError) as error:
            reader(tmp_path / "some.pt")
        assert "it has critic" in str(error.value) or kind.value in str(error.value)


def test_a_misfit_lists_what_is_wrong_and_what_it_looks_like(weights):
    expected = {name: tensor.shape for name, tensor in weights.items()}
    store.check_fit(expected, weights)
    state = {name: tensor for name, tensor in weights.items() if ".ffn." not in name} | {"extra": torch.zeros(1)}
    state["head.head.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        store.check_fit(expected, state, what="LongLive-1.3B")
    message = str(error.value)
    assert "do not fit LongLive-1.3B: 12 missing (blocks.0.ffn.0.bias, blocks.0.ffn.0.weight, blocks.0.ffn.2.bias and 9 more)" in message
    assert "1 unexpected (extra)" in message
    assert "1 of another shape (head.head.bias is [3] instead of [64])" in message
    assert "They look like a Wan transformer (original names): 85 tensors" in message


def test_weights_unknown_to_a_layout_are_named(weights):
    with pytest.raises(ValueError, match=r"1 of 97 weights are unknown to the original Wan transformer: blocks.0.cross_attn.k_img.weight"):
        convert.transformer_to_diffusers(weights | {"blocks.0.cross_attn.k_img.weight": torch.zeros(1)})


def test_two_weights_of_one_name_are_refused(weights):
    with pytest.raises(ValueError, match=r"two weights are both named 'head.head.bias'"):
        convert.clean_names(weights | {"model.head.head.bias": torch.zeros(64)})


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code was run')",))


def test_files_never_run_code(tmp_path):
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"generator": Code()}, protocol=2))
    torch.save({"generator": Code()}, tmp_path / "new.pt")
    for file in ("old.pth", "new.pt"):
        with pytest.raises(ValueError, match="refused, since reading it could run code"):
            store.load_transformer(tmp_path / file)


def test_damaged_files_are_named(weights, tmp_path):
    torch.save(weights, tmp_path / "whole.pt")
    save_file(weights, tmp_path / "whole.safetensors")
    for suffix in ("pt", "safetensors"):
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:100_000])
        with pytest.raises(ValueError, match=f"cut.{suffix}"):
            store.read(cut)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="only a Git LFS pointer"):
        store.read(tmp_path / "pointer.safetensors")


def test_missing_files_say_what_to_download_to_where(tmp_path):
    wan, longlive = tmp_path / "wan_models" / "Wan2.1-T2V-1.3B", tmp_path / "longlive_models"
    for load in (store.load_transformer, store.load_vae, store.load_text_encoder):
        with pytest.raises(FileNotFoundError, match=f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {wan}$"):
            load(wan)
    wan.mkdir(parents=True)
    for load in (store.load_transformer, store.load_vae, store.load_text_encoder):
        with pytest.raises(FileNotFoundError, match=f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {wan}$"):
            load(wan)
    for load, file in ((store.load_transformer, "longlive_base.pt"), (load_lora, "lora.pt")):
        with pytest.raises(FileNotFoundError, match=f"hf download Efficient-Large-Model/LongLive-1.3B --local-dir {longlive}$"):
            load(longlive / "models" / file)


def test_a_full_disk_is_noticed_before_anything_is_written(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: store.shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match=r"has 0\.0 GB free"):
        store.write_safetensors(weights, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_reading_maps_the_file_instead_of_copying_it(tmp_path):
    torch.save({"big": torch.zeros(50_000_000)}, tmp_path / "big.pt")
    save_file({"big": torch.zeros(50_000_000)}, tmp_path / "big.safetensors")
    for file in ("big.pt", "big.safetensors"):
        before = resident_kilobytes()
        state = store.read(tmp_path / file)
        assert state["big"].numel() == 50_000_000 and resident_kilobytes() - before < 50_000


def resident_kilobytes() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))


def test_the_program_says_in_a_line_what_is_wrong(wan_folder, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    lora, transformer = GOLDEN / "lora_weights.safetensors", GOLDEN / "dit_weights.safetensors"
    for arguments, message in {
        ("--from", tmp_path / "none.pt"): "not found",
        ("--from", lora, "--to", "wan", "--output", tmp_path / "a"): "a LoRA alone has no wan layout",
        ("--from", lora, "--lora", lora): "contains lora",
        ("--from", transformer): "give num_heads",
        ("--from", transformer, "--to", "wan", "--output", tmp_path / "full"): "is not empty",
        ("--from", wan_folder / "Wan2.1_VAE.pth", "--to", "longlive", "--output", tmp_path / "b"): "has no vae",
    }.items():
        assert program(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) <= 2
    with pytest.raises(SystemExit) as exit_status:
        program("--from", lora, "--to", "wan")
    assert exit_status.value.code == 2


def test_an_export_that_is_not_there_yet_is_not_to_be_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"export not found; a training writes it at its end") as raised:
        store.load_transformer(tmp_path / "runs" / "teacher" / "export")
    assert "download" not in str(raised.value)
