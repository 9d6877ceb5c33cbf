"""What a video needs of a device's memory is counted, and fitting settings are chosen."""

import dataclasses
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from longlive import doctor
from longlive.cache.window import Window
from longlive.config import InferenceConfig
from longlive.engine.linears import quantise_linears
from longlive.generation import caches
from longlive.generation.decoders import PartwiseDecoder
from longlive.generation.pipeline import LongLivePipeline
from longlive.models.tiny_vae import TinyDecoder, TinyVAE
from longlive.models.vae import StreamDecoder
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments
from longlive.programs import loading
from longlive.programs.memory import RESERVED, MemorySettings, Model, choose, count, ladder

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from step_parts import LiveMemory

META = torch.device("meta")
SIZE = {"height": 480, "width": 832}


@pytest.fixture(scope="module")
def released():
    return Model.released()


def test_parts_of_the_real_size_by_hand(released):
    """Sizes of Wan2.1-T2V-1.3B, UMT5-XXL and the window, multiplied out."""
    layer = 8 * (1536 * 1536 + 1536) + 4 * 1536 + 2 * 1536 + 2 * 1536 * 8960 + 8960 + 1536 + 6 * 1536
    around = (64 * 1536 + 1536) + (4096 + 1536) * 1536 + 2 * 1536 + (256 + 1536) * 1536 + 2 * 1536  # patch, text, time
    around += 1537 * 6 * 1536 + 1536 * 64 + 64 + 2 * 1536  # what modulation is made of, head
    plain = count(released, MemorySettings(), **SIZE)
    assert plain.transformer == 2 * (30 * layer + around) == 2_837_993_600
    assert plain.cache == 2 * 12 * 30 * 1560 * 1536 * 2 == 3_450_470_400
    assert plain.text_encoder == 2 * (256384 * 4096 + 24 * (4 * 4096**2 + 3 * 4096 * 10240 + 32 * 64 + 2 * 4096) + 4096)
    assert plain.total == sum(plain)
    small = count(released, MemorySettings(text_encoder="cpu", quantize="int8-weights", quantize_cache="int8", decoder="tiny"), **SIZE)
    linears, rows = 8 * 1536**2 + 2 * 1536 * 8960, 9 * 1536 + 8960
    assert small.transformer == 30 * (linears + 8 * rows + 2 * (layer - linears - rows)) + 2 * around
    assert small.cache == 12 * 30 * (2 * 1560 * 1536 + 4 * (2 * 12 + 1536))
    assert small.text_encoder == 0
    assert count(released, MemorySettings(text_encoder="cpu"), **SIZE, on_gpu=False).text_encoder == plain.text_encoder
    assert small.decoder - plain.decoder == 2 * sum(p.numel() for p in released.tiny.parameters())  # held beside the VAE


@pytest.mark.parametrize("kind", ["full", "tiny"])
@pytest.mark.parametrize("latent_frames", [1, 3])
@torch.no_grad()
def test_decoders_need_what_is_estimated(released, kind, latent_frames):
    """Counted operation by operation at the real size."""
    network = released.vae if kind == "full" else released.tiny
    decoder = StreamDecoder(network) if kind == "full" else TinyDecoder(network)
    decode = PartwiseDecoder(decoder, latent_frames).decode
    with LiveMemory(META) as live:
        for _ in range(2):
            decode(torch.empty(1, 3, 16, 60, 104, device=META, dtype=torch.bfloat16))
        held, live.peak = live.bytes, 0
        decoder.decode(torch.empty(1, latent_frames, 16, 60, 104, device=META, dtype=torch.bfloat16))
    assert held <= caches.decoder_memory_bytes(network, **SIZE) <= 1.15 * held
    working = live.peak - held
    assert working <= caches.decoder_activation_bytes(network, **SIZE, latent_frames=latent_frames) <= 1.15 * working


@pytest.mark.parametrize(
    ("kind", "cache", "frames"), [(None, None, 3), (None, "int8", 3), (None, None, 12), ("int8-weights", "int8", 12), ("int8", None, 12)]
)
@torch.no_grad()
def test_passes_need_what_is_estimated(kind, cache, frames):
    """A denoising pass over a block, or a recache of all visible frames, counted operation by operation at the real width."""
    sizes = {**arguments("1.3b"), "num_layers": 2}
    with META:
        network = WanTransformer(**sizes).eval().requires_grad_(False)
    torch.nn.Module.to(network, torch.bfloat16)
    if kind is not None:
        quantise_linears(network, kind)
    network._chosen = (META, torch.bfloat16, lambda q, k, v, mask=None: torch.empty_like(q))  # as a fused kernel
    ring = caches.ring_cache(network, 60, 104, window=Window(3, 9), quantize=cache)
    with ring.record(range(12)):
        pass
    span = range(12, 15) if frames == 3 else ring.forget(keep_sink=False)
    text = network.project_text(torch.empty(1, 512, 4096, device=META, dtype=torch.bfloat16))
    run = network if frames == 3 else network.write_kv
    with LiveMemory(META) as live:
        view, x = ring.view(span), torch.empty(1, frames, 16, 60, 104, device=META, dtype=torch.bfloat16)
        held, live.peak = live.bytes, 0
        run(x, torch.full((1, 1), 500.0, device=META), text, view)
    working = live.peak - held
    counted = {"frames": frames, "quantize": kind, "quantised_frames": 12 if cache else 0}
    assert working <= caches.transformer_activation_bytes(network, 60, 104, **counted) + 2**20 <= 1.15 * working  # beside modulation


def test_a_recache_is_counted(tiny):
    """With the models' own settings, all visible frames may pass at once."""
    joint, causal = (LongLivePipeline.from_pretrained(tiny, recache=recache) for recache in ("joint", "causal"))
    assert joint.memory_needed(24) - causal.memory_needed(24) == (joint.config.window - joint.config.block) * (
        caches.transformer_activation_bytes(joint.transformer, 4, 4, frames=1)
    ) * (joint.info.height // joint._spatial_stride // 4) * (joint.info.width // joint._spatial_stride // 4)


def test_quantised_weights_are_counted_before_there_are_any(model):
    expected = caches.quantised_weight_bytes(model)
    network = deepcopy(model)
    quantise_linears(network, "int8-weights")
    assert caches.weight_bytes(network) == expected < caches.weight_bytes(model)


def test_the_ladder_needs_less_and_less_of_what_it_saves(released):
    rungs = list(ladder(tiny=True))
    assert rungs[0] == MemorySettings() and len(set(rungs)) == len(rungs) == 8
    needs = [count(released, settings, **SIZE).total for settings in rungs]
    assert needs[:5] == sorted(needs[:5], reverse=True) and needs[5:] == sorted(needs[5:], reverse=True) and needs[5] < needs[4]
    assert [settings.decoder for settings in ladder(tiny=False)] == ["full"] * 5


def test_the_first_settings_that_fit_are_chosen(released):
    for settings in ladder(tiny=True):
        needed = count(released, settings, **SIZE).total
        assert choose(released, needed, **SIZE)[0] == settings
    with pytest.raises(ValueError, match="choose a smaller height and width"):
        choose(released, needed - 1, **SIZE)
    assert choose(released, needed - 1, height=240, width=416)[0].decoder == "full"


def test_cards(released):
    """What the documentation says of the 1.3B model at 480 x 832."""
    words = {card: doctor.for_card(released, card)[0] for card in doctor.CARDS}
    assert words[24] == "text_encoder=cpu"
    assert words[16] == words[12] == "text_encoder=cpu decode_latent_frames=1"
    assert words[8] == "text_encoder=cpu decode_latent_frames=1 quantize=int8-weights decoder=tiny"
    assert words[6] == "text_encoder=cpu decode_latent_frames=1 quantize=int8-weights quantize_cache=int8 decoder=tiny"
    assert doctor.for_card(released, 4)[0] == "too small"
    without = released._replace(tiny=None)
    assert doctor.for_card(without, 8)[0] == "too small"


MACHINE = doctor.Machine(torch=(2, 10), cudnn=91500, cuda=True, bfloat16_cpu=True, encoder=True)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cudnn": 91002}, "cuDNN 9.10.2 runs"),
        ({"torch": (2, 9)}, "slow at Conv3d"),
        ({"cuda": False, "cudnn": None}, "no GPU"),
        ({"cuda": False, "bfloat16_cpu": False}, "no bfloat16 instructions"),
        ({"torch": (2, 7)}, "too old"),
        ({"encoder": False}, "pip install av"),
    ],
)
def test_traps_are_warned_of(change, word):
    assert not doctor.warnings_for(MACHINE)
    assert any(word in text for text in doctor.warnings_for(MACHINE._replace(**change)))


def test_the_doctor_prints_a_table(capsys):
    assert doctor.main(["--height", "256", "--width", "256"]) == 0
    printed = capsys.readouterr().out
    assert "LongLive-1.3B at 256 x 256" in printed and "attention sdpa: yes" in printed and "| 6 | " in printed
    assert doctor.main(["--height", "250"]) == 2


@torch.no_grad()
def test_decoding_in_parts_gives_the_same_images(tiny):
    pipe = LongLivePipeline.from_pretrained(tiny)
    latents = torch.randn(1, 9, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    whole, needed = pipe.decoder().decode(latents), pipe.memory_needed(9)
    pipe.accelerate(decode_latent_frames=1)
    parts, calls = pipe.decoder(), []
    inner = parts.decoder.decode
    parts.decoder.decode = lambda part: (calls.append(part.shape[1]), inner(part))[1]
    torch.testing.assert_close(parts.decode(latents), whole, atol=1e-5, rtol=0)
    assert calls == [1] * 9 and pipe.memory_needed(9) < needed
    parts.reset()
    torch.testing.assert_close(parts.decode(latents), whole, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least one"):
        pipe.accelerate(decode_latent_frames=0)


@torch.no_grad()
def test_a_tiny_decoder_remembers_one_frame_of_each_block():
    decoder = TinyDecoder(TinyVAE(latent_channels=4, widths=(8, 8), growth=(2, 2), num_blocks=1).eval())
    decoder.decode(torch.randn(1, 3, 4, 4, 4))
    assert [last.untyped_storage().nbytes() for last in decoder.memory] == [last.numel() * 4 for last in decoder.memory]


def test_low_memory_chooses_what_fits(tiny, monkeypatch):
    """On a CPU, where the weights that are loaded count as available."""
    config = InferenceConfig(model=str(tiny), low_memory=True)

    def chosen(free):
        pipe = loading.load_pipeline(config, torch.device("cpu"))
        monkeypatch.setattr(loading, "free_memory", lambda _: free - caches.weight_bytes(*pipe.counted_parts))
        return pipe, loading.fit_into_memory(config, pipe, torch.device("cpu"))

    pipe, fitted = chosen(10**12)
    assert fitted == dataclasses.replace(config, low_memory=False)
    model = Model.of(pipe, None, visible=pipe.info.window)
    rungs = list(ladder(tiny=False))
    needs = [count(model, settings, height=32, width=32, on_gpu=False).total for settings in rungs]
    pipe, fitted = chosen(needs[2])
    assert (fitted.text_encoder, fitted.decode_latent_frames, fitted.quantize) == ("cpu", 1, None)
    assert isinstance(pipe.decoder(), PartwiseDecoder)
    with pytest.raises(ValueError, match="are available"):
        chosen(min(needs) - 1)
    assert loading.fit_into_memory(InferenceConfig(), pipe, torch.device("cpu")) == InferenceConfig()


def test_low_memory_and_what_it_chooses_are_not_both_given():
    with pytest.raises(ValueError, match="quantize is given, which low_memory chooses"):
        InferenceConfig(low_memory=True, quantize="int8")
    assert RESERVED > 0
