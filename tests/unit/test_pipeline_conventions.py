"""What diffusers' own tests of pipelines and models check of any of them, and what its users take for granted."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from peft import LoraConfig

from longlive import LongLivePipeline
from longlive.checkpoints import hub, store
from longlive.engine.steady import SteadyPasses
from longlive.models.lora import add_lora, lora_state

PROMPT = "a red circle moving right on a black background"
CALL = {"num_frames": 9, "output_type": "latent"}


@pytest.fixture
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made(pipe, prompt=PROMPT, **settings):
    return pipe(**{"prompt": prompt, "generator": generator()} | CALL | settings).frames


def test_call_signature(pipe):
    """The parameters that diffusers' testers ask for, all optional but the prompt, under its names."""
    parameters = inspect.signature(pipe.__call__).parameters
    wanted = {"prompt", "height", "width", "num_frames", "num_videos_per_prompt", "generator", "latents", "prompt_embeds", "output_type"}
    wanted |= {"return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "negative_prompt_embeds"}
    assert wanted <= set(parameters) and all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())
    assert set(pipe.components) == {"transformer", "vae", "text_encoder", "tokenizer"}
    again = LongLivePipeline(**pipe.components, **{name: pipe.config[name] for name in ("window", "denoising_steps", "height", "width")})
    assert torch.equal(made(again), made(pipe))


def test_dict_and_tuple_are_equivalent(pipe):
    assert torch.equal(pipe(PROMPT, generator=generator(), return_dict=False, **CALL)[0], made(pipe))


def test_a_batch_is_consistent_with_single_calls(pipe):
    """One generator per prompt, as diffusers' testers give them."""
    prompts = [PROMPT, "a blue square", "a green ring moving up on a white background"]
    batch = made(pipe, prompts, generator=[generator(seed) for seed in range(3)])
    for index, prompt in enumerate(prompts):
        assert torch.equal(batch[index : index + 1], made(pipe, prompt, generator=generator(index)))
    assert made(pipe, prompts[:2], num_videos_per_prompt=2).shape[0] == 4
    noise = torch.randn(2, 3, 8, 4, 4, generator=generator(7))
    both = made(pipe, prompts[:2], latents=noise, generator=[generator(0), generator(0)])
    assert torch.equal(both[1:], made(pipe, prompts[1], latents=noise[1:]))


def test_encode_prompt_works_in_isolation(pipe, tiny):
    """Its embeddings give the same video in a pipeline without text encoder and tokenizer."""
    embeds, negative = pipe.encode_prompt([PROMPT, "a blue square"])
    assert embeds.shape == (2, 32, 64) and negative is None
    expected = made(pipe, [PROMPT, "a blue square"])
    alone = LongLivePipeline.from_pretrained(tiny, text_encoder=None, tokenizer=None)
    assert torch.equal(made(alone, None, prompt_embeds=embeds), expected)
    twice = pipe.encode_prompt(PROMPT, num_videos_per_prompt=2)[0]
    assert torch.equal(made(alone, None, prompt_embeds=twice, num_videos_per_prompt=2), made(pipe, num_videos_per_prompt=2))
    for call, words in (
        (lambda: made(alone), "no text encoder and tokenizer; give prompt_embeds"),
        (lambda: made(alone, None), "no prompt"),
        (lambda: made(alone, None, prompt_embeds=embeds, num_videos_per_prompt=3), r"with 3 for each prompt, not \[2, 32, 64\]"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_negative_embeddings_guide(tiny):
    pipe = LongLivePipeline.from_pretrained(tiny, guidance_scale=3.0)
    embeds, negative = pipe.encode_prompt(PROMPT)
    plain = made(pipe)
    assert torch.equal(made(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative), plain)
    away = pipe.encode_prompt("a blue square")[0]
    assert not torch.equal(made(pipe, negative_prompt_embeds=away), plain)


def test_callbacks_get_what_they_ask_for_and_change_it(pipe):
    seen = []

    def callback(given, step, t, tensors):
        assert given is pipe and set(tensors) <= set(pipe._callback_tensor_inputs)
        seen.append((step, set(tensors)))
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()} if step == pipe.num_timesteps - 1 else tensors

    frames = made(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"])
    assert frames.abs().sum() == 0 and seen == [(0, {"latents"}), (1, {"latents"})]
    made(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert seen[2:] == [(0, set()), (1, set())]


def test_save_load_and_types(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert torch.equal(made(LongLivePipeline.from_pretrained(tmp_path)), made(pipe))
    for asked in ({"torch_dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}, {"dtype": torch.bfloat16}):
        half = LongLivePipeline.from_pretrained(tmp_path, **asked)
        assert {part.dtype for part in (half.transformer, half.vae, half.text_encoder)} == {torch.bfloat16}
    assert np.isfinite(half(PROMPT, num_frames=9, generator=generator()).frames).all()
    pipe.to(torch.bfloat16)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert torch.equal(made(pipe), made(half))
    assert {str(component.device) for component in (pipe.to("cpu").transformer, pipe.vae)} == {"cpu"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"windw": 9}, "no setting 'windw'; did you mean 'window'"),
        ({"guidance": 1.0}, "guidance is guidance_scale now"),
        ({"dtype": "bfloat"}, "dtype 'bfloat': choose float32, bfloat16, float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "both torch_dtype float16 and dtype bfloat16 are given"),
        ({"block": 0}, "block 0: choose a whole number of at least 1"),
        ({"height": "64"}, "height '64'"),
        ({"fps": 0}, "fps 0: choose a number from 0.01 to 1000"),
        ({"context_timestep": -1}, "context_timestep -1"),
    ],
)
def test_arguments_that_are_refused(tiny, given, words):
    with pytest.raises(ValueError, match=words):
        LongLivePipeline.from_pretrained(tiny, **given)
    if "windw" in given:
        with pytest.raises(ValueError, match=words):
            LongLivePipeline.from_original(tiny, **given)


def test_nothing_is_printed(tiny, capfd, caplog):
    """Neither diffusers' nor transformers' bars and warnings."""
    made(LongLivePipeline.from_pretrained(tiny, torch_dtype="float32", fps=16, timestep_shift=5))
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"])
def test_copies_after_the_first_call(pipe, copied, monkeypatch):
    """Also of a pipeline whose passes are compiled, with a LoRA; the copy is another pipeline."""
    expected = made(pipe, num_frames=93)
    assert torch.equal(made(copied(pipe), num_frames=93), expected)
    monkeypatch.setattr("longlive.generation.pipeline.default_compiler", lambda device: lambda function: function)
    lora = {name: torch.ones_like(tensor) for name, tensor in lora_state(add_lora(copy.deepcopy(pipe.transformer), rank=2)).items()}
    pipe.load_lora_weights(lora, strength=0.1)
    pipe.accelerate(compile=True)
    adapted = made(pipe, num_frames=93)
    other = copied(pipe)
    assert isinstance(other._steady, SteadyPasses) and other._steady.network is other.transformer is not pipe.transformer
    assert torch.equal(made(other, num_frames=93), adapted)
    other.unload_lora_weights()
    assert torch.equal(made(other, num_frames=93), expected) and torch.equal(made(pipe, num_frames=93), adapted)


# -- the transformer's adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_beside_the_weights(pipe):
    """diffusers' PeftAdapterMixin: the names of weights stay until there is an adapter, scales count, unloading brings everything back."""
    network, plain = pipe.transformer, made(pipe)
    names = list(network.state_dict())
    adapted = add_lora(copy.deepcopy(network), rank=2)
    lora = {name: torch.full_like(tensor, 0.1) for name, tensor in lora_state(adapted).items()}
    beside = {name.replace("base_model.model.", "transformer."): tensor for name, tensor in lora.items()}
    network.load_lora_adapter(beside, adapter_name="a")
    assert network.active_adapters() == ["a"]
    full = made(pipe)
    network.set_adapters(["a"], [0.5])
    half = made(pipe)
    network.disable_lora()
    assert torch.equal(made(pipe), plain)
    network.enable_lora()
    assert torch.equal(made(pipe), half) and not torch.equal(half, full) and not torch.equal(full, plain)
    network.unload_lora()
    assert list(network.state_dict()) == names and torch.equal(made(pipe), plain)
    pipe.load_lora_weights(lora, strength=0.5)
    torch.testing.assert_close(made(pipe), half, atol=1e-4, rtol=0)


def test_new_adapters_can_be_trained(pipe):
    network = pipe.transformer
    network.add_adapter(LoraConfig(r=2, target_modules=["self_attn.q", "cross_attn.v"], init_lora_weights=False))
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad and "lora_" in name]
    network(torch.randn(1, 3, 8, 4, 4), torch.full((1, 3), 500.0), torch.randn(1, 32, 64)).sum().backward()
    assert len(trained) == 8 and all(dict(network.named_parameters())[name].grad is not None for name in trained)


# -- names on the hub -------------------------------------------------------------------------------------------------------------------


class FakeHub:
    """In place of the network: repositories are folders, and what is downloaded is linked into a cache."""

    def __init__(self, repositories, cache):
        self.repositories, self.cache, self.downloads, self.asked = repositories, cache, [], []

    def snapshot_download(self, name, *, allow_patterns, local_files_only=False, **options):
        source, target = self.repositories[name], self.cache / name.replace("/", "--")
        if local_files_only:
            if not target.exists():
                raise hub.LocalEntryNotFoundError("not there")
            return str(target)
        self.downloads.append((name, options))
        for pattern in allow_patterns:
            for file in source.glob(pattern):
                link = target / file.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(file)
        return str(target)

    def model_info(self, name, **_):
        self.asked.append(name)

        class File:
            rfilename, size = "models/longlive_base.pt", 2_500_000_000

        class Info:
            siblings, card_data = [File], {"license": "cc-by-nc-sa-4.0"}

        return Info


@pytest.fixture
def fake_hub(tiny, tmp_path, monkeypatch):
    pipe = LongLivePipeline.from_pretrained(tiny)
    lora = {name: torch.full_like(tensor, 0.1) for name, tensor in lora_state(add_lora(copy.deepcopy(pipe.transformer), rank=2)).items()}
    released = {"Efficient-Large-Model/LongLive-1.3B": tmp_path / "longlive", hub.WAN: tiny, "someone/tiny": tiny}
    store.write_pt({"generator": pipe.transformer.state_dict()}, tmp_path / "longlive" / "models" / "longlive_base.pt")
    store.write_pt({"generator_lora": lora}, tmp_path / "longlive" / "models" / "lora.pt")
    fake = FakeHub(released, tmp_path / "cache")
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(hub, "model_info", fake.model_info)
    release = hub.Release(wan_files=("vae/*", "text_encoder/*", "tokenizer/*"))  # the tiny model's parts are in diffusers' layout
    monkeypatch.setitem(hub.RELEASES, "Efficient-Large-Model/LongLive-1.3B", release)
    monkeypatch.setattr(store.configs, "transformer_config", lambda state: dict(pipe.transformer.config))
    pipe.load_lora_weights(lora)
    return fake, pipe


def test_a_name_on_the_hub(fake_hub, caplog, monkeypatch):
    """Licence and size are said before a download; from then on the cache is enough, with downloads turned off too."""
    fake, expected = fake_hub
    name, settings = "Efficient-Large-Model/LongLive-1.3B", {"window": 9, "denoising_steps": (1000, 500), "height": 32, "width": 32}
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"not complete in the cache, and downloads are turned off; .* hf download Efficient-Large"):
        LongLivePipeline.from_pretrained(name)
    assert fake.asked == [] and fake.downloads == []
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    pipe = LongLivePipeline.from_pretrained(name, dtype="float32", revision="v1", **settings)
    assert [download for download, _ in fake.downloads] == [name, hub.WAN] and fake.downloads[0][1] == {"revision": "v1"}
    assert "downloading Efficient-Large-Model/LongLive-1.3B: 2.5 GB, licence cc-by-nc-sa-4.0" in caplog.text
    assert torch.equal(made(pipe), made(expected))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert LongLivePipeline.from_pretrained(name, **settings).transformer.dtype == torch.bfloat16
    assert len(fake.downloads) == 2
    with pytest.raises(ValueError, match="vae cannot be given"):
        LongLivePipeline.from_pretrained(name, vae=expected.vae)


def test_a_pipeline_of_ours_on_the_hub(fake_hub, tiny):
    fake, _ = fake_hub
    pipe = LongLivePipeline.from_pretrained("someone/tiny")
    assert torch.equal(made(pipe), made(LongLivePipeline.from_pretrained(tiny))) and len(fake.downloads) == 1
    with pytest.raises(ValueError, match="holds no pipeline"):
        LongLivePipeline.from_pretrained("one/two/three")
