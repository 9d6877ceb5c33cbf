"""The pipeline: the same video however it is asked for, and clear words for what cannot be made."""

import copy
import itertools
import threading

import pytest
import torch

from longlive import Cue, LongLivePipeline, PromptQueue, PromptSchedule
from longlive.checkpoints import store
from longlive.engine.linears import is_quantised
from longlive.generation.caches import transformer_activation_bytes, weight_bytes
from longlive.models.lora import add_lora, lora_state, merge_lora
from longlive.models.vae import set_spatial_padding

PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


@pytest.fixture(scope="module")
def pipe(tiny):
    return LongLivePipeline.from_pretrained(tiny)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(pipe, prompt=PROMPT, seed=0, **settings):
    return pipe(prompt, generator=generator(seed), output_type="latent", **settings).frames


def test_same_seed_same_beginning_at_any_length_and_either_way(pipe):
    long = latents(pipe, num_latent_frames=36)
    assert torch.equal(latents(pipe, num_latent_frames=9), long[:, :9])
    session = pipe.session(PROMPT, generator=generator())  # endless
    images = torch.cat([next(session).images for _ in range(12)], dim=1)
    whole = pipe(PROMPT, num_latent_frames=36, generator=generator(), output_type="pt").frames
    assert (whole.movedim(2, -1) * 255 - images).abs().max() <= 0.51  # rounding to uint8
    assert not torch.equal(latents(pipe, num_latent_frames=9, seed=1), long[:, :9])


def test_a_video_does_not_depend_on_the_videos_beside_it(pipe):
    both = pipe(
        [PROMPT, PROMPT],
        num_latent_frames=6,
        num_videos_per_prompt=2,
        generator=[generator(seed) for seed in (0, 1, 2, 0)],
        output_type="latent",
    ).frames
    assert both.shape[0] == 4
    torch.testing.assert_close(both[:1], latents(pipe, num_latent_frames=6), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:2], latents(pipe, num_latent_frames=6, seed=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[2:3], latents(pipe, num_latent_frames=6, seed=2), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[3:], both[:1], atol=1e-5, rtol=0)


def test_given_noise_is_used(pipe):
    noise = torch.randn(1, 6, 8, 4, 4, generator=generator(5))
    one, two = (latents(pipe, num_latent_frames=6, latents=noise, seed=seed) for seed in (0, 0))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"this video needs \(1, 6, 8, 4, 4\)"):
        pipe(PROMPT, num_latent_frames=6, latents=noise[:, :3])


def test_schedule_queue_and_typing_agree(pipe):
    planned = latents(pipe, PromptSchedule((Cue(0, PROMPT), Cue(6, OTHER))), num_latent_frames=12)
    assert torch.equal(planned[:, :6], latents(pipe, num_latent_frames=6))
    decoded = pipe(PromptSchedule((Cue(0, PROMPT), Cue(6, OTHER))), num_latent_frames=12, generator=generator(), output_type="pt").frames
    for cues in (PROMPT, PromptQueue(PROMPT)):
        session = pipe.session(cues, num_latent_frames=12, generator=generator())
        chunks = [next(session), next(session)]
        typist = threading.Thread(target=session.prompt, args=(OTHER,))
        typist.start()
        typist.join()
        chunks += list(session)
        assert [chunk.prompt for chunk in chunks] == [PROMPT, PROMPT, OTHER, OTHER]
        assert [(cue.latent_frame, cue.prompt) for cue in session.timeline.cues] == [(0, PROMPT), (6, OTHER)]
        images = torch.cat([chunk.images for chunk in chunks], dim=1)
        assert (decoded.movedim(2, -1) * 255 - images).abs().max() <= 0.51


def test_what_a_switch_does_with_the_past(tiny, tmp_path):
    """All ways agree until the switch, and none after it; saved with the pipeline. A cleared past is a video that begins anew."""
    plan = PromptSchedule((Cue(0, PROMPT), Cue(9, "a blue square moving up on a white background")))
    made = {}
    for recache in ("joint", "causal", "none", "clear"):
        pipe = LongLivePipeline.from_pretrained(tiny, recache=recache)
        made[recache] = latents(pipe, plan, num_latent_frames=15)
        assert pipe.info.recache == recache
    pipe.save_pretrained(tmp_path)
    assert LongLivePipeline.from_pretrained(tmp_path).info.recache == "clear"
    for one, two in itertools.combinations(made, 2):
        assert torch.equal(made[one][:, :9], made[two][:, :9])
        assert not torch.equal(made[one][:, 9:], made[two][:, 9:]), (one, two)


def test_the_padding_of_its_vae_is_saved_with_a_pipeline(tiny, tmp_path, caplog):
    pipe, plain = (LongLivePipeline.from_pretrained(tiny) for _ in range(2))
    set_spatial_padding(pipe.vae, "circular")
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    loaded = LongLivePipeline.from_pretrained(tmp_path)
    assert "spatial_padding" not in caplog.text
    made = [one(PROMPT, num_latent_frames=3, generator=generator(), output_type="pt").frames for one in (pipe, loaded, plain)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_output_types_and_shapes(pipe):
    for kind, check in {
        "np": lambda frames: frames.shape == (1, 9, 32, 32, 3),
        "pt": lambda frames: tuple(frames.shape) == (1, 9, 3, 32, 32),
        "pil": lambda frames: len(frames[0]) == 9 and frames[0][0].size == (32, 32),
        "latent": lambda frames: tuple(frames.shape) == (1, 3, 8, 4, 4),
    }.items():
        assert check(pipe(PROMPT, num_latent_frames=3, generator=generator(), output_type=kind).frames), kind
    assert pipe(PROMPT, num_latent_frames=3, height=48, width=16, output_type="np").frames.shape == (1, 9, 48, 16, 3)
    assert isinstance(pipe(PROMPT, num_latent_frames=3, return_dict=False), tuple)


def test_callback_sees_every_step_and_may_change_it(pipe):
    seen = []
    pipe(
        PROMPT,
        num_latent_frames=6,
        callback_on_step_end=lambda p, step, t, given: seen.append((step, t, given["latents"].shape)),
        output_type="latent",
    )
    assert [step for step, _, _ in seen] == [0, 1, 0, 1]
    zeros = pipe(
        PROMPT, num_latent_frames=3, callback_on_step_end=lambda p, step, t, given: {"latents": 0 * given["latents"]}, output_type="latent"
    ).frames
    assert not zeros.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_latent_frames": 7}, "7 latent frames cannot be cut into blocks of 3"),
        ({"num_latent_frames": 6, "height": 40}, "height 40 is not divisible by 16"),
        ({"num_latent_frames": 6, "seconds": 1}, "both seconds and num_latent_frames are given; choose one"),
        ({"num_frames": 33, "seconds": 1}, "both seconds and num_frames"),
        ({"num_frames": -5}, "num_frames -5: choose a whole number of at least 1"),
        ({"num_frames": 9.0}, "num_frames 9.0: choose a whole number"),
        ({"num_latent_frames": "3"}, "num_latent_frames '3' is no whole number"),
        ({"seconds": "3"}, "seconds '3' is no number"),
        ({"height": "64"}, "height '64': choose a whole number"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt 0: choose a whole number of at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "a callback cannot be given 'noise'; there is latents"),
        ({"prompt_embeds": torch.zeros(1, 4, 64)}, "both prompt and prompt_embeds are given"),
        ({"negative_prompt_embeds": torch.zeros(1, 4, 64)}, "there is no guidance: guidance_scale is 1"),
        ({"num_latent_frames": 6, "output_type": "gif"}, "output_type 'gif' is unknown"),
        ({"seconds": 0}, "above 0"),
        ({"prompt": "  ", "num_latent_frames": 6}, "empty"),
        ({"prompt": [], "num_latent_frames": 6}, "no prompt"),
        ({"prompt": PromptSchedule((Cue(0, PROMPT), Cue(9, OTHER))), "num_latent_frames": 9}, "beyond the video's end"),
        (
            {"num_latent_frames": 6, "generator": [torch.Generator()] * 3},
            "3 generators for 1 videos; give one, or one for each",
        ),
    ],
)
def test_what_cannot_be_made_is_said(pipe, settings, words):
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": PROMPT} | settings)


def test_a_length_in_pixel_frames(pipe):
    """As in diffusers: exactly as many, made of whole blocks; a session ends with a shorter block."""
    assert latents(pipe, num_frames=33).shape[1] == 9 and latents(pipe, num_frames=22).shape[1] == 9
    whole = pipe(PROMPT, num_latent_frames=9, generator=generator(), output_type="pt").frames
    assert torch.equal(pipe(PROMPT, num_frames=22, generator=generator(), output_type="pt").frames, whole[:, :22])
    for asked, latent_frames in ((21, 6), (22, 9)):
        session = pipe.session(PROMPT, num_frames=asked, seed=0)
        assert sum(block.images.shape[1] for block in session) == asked and session.timeline.num_latent_frames == latent_frames


def test_settings_override_the_folder_and_full_attention_needs_a_length(tiny):
    pipe = LongLivePipeline.from_pretrained(tiny, window=-1, denoising_steps=(1000,))
    assert pipe.info.window == -1 and pipe.info.denoising_steps == (1000,)
    assert latents(pipe, num_latent_frames=15).shape[1] == 15
    with pytest.raises(ValueError, match="endless video needs a window"):
        next(pipe.session(PROMPT))
    with pytest.raises(ValueError, match="no room for a block of 3"):
        LongLivePipeline.from_pretrained(tiny, window=4, sink=3)
    with pytest.raises(ValueError, match="steps must be decreasing"):
        LongLivePipeline.from_pretrained(tiny, denoising_steps=(500, 1000))
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        LongLivePipeline.from_pretrained("nowhere")


def test_saved_and_loaded_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert torch.equal(latents(LongLivePipeline.from_pretrained(tmp_path), num_latent_frames=6), latents(pipe, num_latent_frames=6))


def test_lora_merged_equals_lora_beside_and_misfits_are_refused(tiny, tmp_path):
    pipe = LongLivePipeline.from_pretrained(tiny)
    wrapped = add_lora(copy.deepcopy(pipe.transformer), rank=4, alpha=8)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator(3))
    state = {name: tensor.clone() for name, tensor in lora_state(wrapped).items()}
    x, t, text = torch.randn(1, 3, 8, 4, 4), torch.full((1, 3), 500.0), torch.randn(1, 32, 64)
    with torch.no_grad():
        plain, beside = pipe.transformer(x, t, text), wrapped(x, t, text)
    store.write_pt({"generator_lora": state}, tmp_path / "lora.pt")
    pipe.load_lora_weights(tmp_path / "lora.pt", alpha=8)
    with torch.no_grad():
        merged = pipe.transformer(x, t, text)
    assert (merged - plain).abs().max() > 1e-2
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=0)
    assert not [name for name, _ in pipe.transformer.named_parameters() if "lora" in name]

    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    for broken, words in (
        ({name: tensor for name, tensor in state.items() if "blocks.1.ffn.2.lora_A" not in name}, "missing"),
        (state | {"base_model.model.head.none.lora_A.weight": torch.zeros(4, 24)}, "unexpected"),
        ({name: tensor[..., :5] if name.endswith("lora_A.weight") else tensor for name, tensor in state.items()}, "shape"),
        ({}, "it is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            merge_lora(pipe.transformer, broken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_text_encoder_stays_behind_with_offload(tiny):
    pipe = LongLivePipeline.from_pretrained(tiny)
    expected = latents(pipe, num_latent_frames=3)
    resident = pipe.memory_needed(3)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(latents(pipe, num_latent_frames=3), expected)
    assert pipe.memory_needed(3) == resident  # it is on the device while a prompt is encoded
    pipe.place_text_encoder("cpu")
    pipe.to("cpu")
    assert torch.equal(latents(pipe, num_latent_frames=3), expected)
    assert pipe.memory_needed(3) == resident - weight_bytes(pipe.text_encoder)
    with pytest.raises(ValueError, match="'gpu' is unknown; choose from resident, on_demand, cpu"):
        pipe.place_text_encoder("gpu")


@pytest.mark.parametrize("mode", ["resident", "on_demand", "cpu"])
def test_a_text_encoder_that_is_on_the_device_moves_back(tiny, mode, monkeypatch):
    """Where each part is sent can be seen without a GPU."""
    pipe, sent = LongLivePipeline.from_pretrained(tiny), {}

    def to(module, device, *_, **__):
        sent[module] = str(device)
        return module

    monkeypatch.setattr(torch.nn.Module, "to", to)
    pipe.place_text_encoder(mode)
    pipe.to("meta")
    assert sent[pipe.transformer] == sent[pipe.vae] == "meta"
    assert sent[pipe.text_encoder] == ("meta" if mode == "resident" else "cpu")


def test_passes_are_compiled_until_they_are_not(tiny, monkeypatch, tmp_path):
    """What changes the transformer, a LoRA or 8 bits, is in the compiled passes too; with compile=False everything is as before."""
    compiled = []
    monkeypatch.setattr(
        "longlive.generation.pipeline.default_compiler",
        lambda device: lambda forward: lambda *inputs: (compiled.append(1), forward(*inputs))[1],
    )
    pipe = LongLivePipeline.from_pretrained(tiny)
    lora = lora_state(add_lora(copy.deepcopy(pipe.transformer), rank=2))
    lora = {name: torch.ones_like(weight) for name, weight in lora.items()}
    other = copy.deepcopy(pipe.transformer)
    for weight in other.parameters():
        weight.data *= 1.1
    expected = latents(pipe, num_latent_frames=15)
    pipe.accelerate(compile=True)
    assert torch.equal(latents(pipe, num_latent_frames=15), expected) and compiled
    for change in (
        lambda p: p.load_lora_weights(tmp_path / "ones.pt"),
        lambda p: p.accelerate(quantize="int8"),
        lambda p: setattr(p, "transformer", copy.deepcopy(other)),
        lambda p: p.to(torch.float32),
    ):
        plain = LongLivePipeline.from_pretrained(tiny)
        torch.save(lora, tmp_path / "ones.pt")
        change(plain)
        compiled.clear()
        pipe = LongLivePipeline.from_pretrained(tiny)
        pipe.accelerate(compile=True)
        change(pipe)
        assert torch.equal(latents(pipe, num_latent_frames=15), latents(plain, num_latent_frames=15)) and compiled
    pipe.accelerate(compile=False)
    compiled.clear()
    assert torch.equal(latents(pipe, num_latent_frames=15), expected) and not compiled
    with pytest.raises(ValueError, match="graphs are CUDA graphs, and the pipeline is on cpu"):
        pipe.accelerate(graphs=True)
    with pytest.raises(ValueError, match="window of fixed length; window -1 has none"):
        LongLivePipeline.from_pretrained(tiny, window=-1, sink=0).accelerate(compile=True)


def test_parts_may_be_replaced_at_any_time(tiny):
    """Prompts that were encoded before are encoded anew, and 8 bits are those of the pipeline."""
    pipe, plain = LongLivePipeline.from_pretrained(tiny), LongLivePipeline.from_pretrained(tiny)
    other = copy.deepcopy(pipe.transformer)
    for weight in (*other.parameters(), *plain.text_encoder.parameters()):
        weight.data *= 1.1
    before = latents(pipe, num_latent_frames=3)
    pipe.text_encoder = copy.deepcopy(plain.text_encoder)
    assert not torch.equal(expected := latents(plain, num_latent_frames=3), before)
    assert torch.equal(latents(pipe, num_latent_frames=3), expected)
    plain = LongLivePipeline.from_pretrained(tiny, transformer=other, text_encoder=plain.text_encoder)
    pipe.transformer = copy.deepcopy(other)
    assert torch.equal(latents(pipe, num_latent_frames=3), latents(plain, num_latent_frames=3))
    pipe.accelerate(quantize="int8")
    pipe.transformer = copy.deepcopy(other)
    plain.accelerate(quantize="int8")
    assert is_quantised(pipe.transformer) and torch.equal(latents(pipe, num_latent_frames=3), latents(plain, num_latent_frames=3))


def test_warming_up_meets_every_shape_of_an_endless_video(tiny):
    """Nothing that is seen for the first time afterwards: numbers of tokens, of visible tokens, and whether keys and values are written."""
    pipe, seen = LongLivePipeline.from_pretrained(tiny), []
    attention = pipe.transformer._backend_for(torch.zeros(1))
    pipe.transformer._chosen = (
        *pipe.transformer._chosen[:2],
        lambda q, k, v, mask=None: (seen.append((q.shape, k.shape)), attention(q, k, v))[1],
    )
    pipe.warm_up()
    known = set(seen)
    seen.clear()
    session = pipe.session("a", num_latent_frames=30, seed=1)
    for number, _ in enumerate(session):
        if number in (5, 7):
            session.prompt("b")
    assert set(seen) <= known


@pytest.mark.parametrize("kind", ["int8", "int8-weights", "fp8"])
def test_in_8_bits_a_video_is_similar_and_needs_less_memory(tiny, kind):
    plain, pipe = LongLivePipeline.from_pretrained(tiny), LongLivePipeline.from_pretrained(tiny)
    expected, needed, session = latents(pipe, num_latent_frames=9), pipe.memory_needed(9), pipe.session_bytes()
    saved = weight_bytes(pipe.transformer)
    pipe.accelerate(quantize=kind)
    saved -= weight_bytes(pipe.transformer)
    shape = {"frames": pipe.config.window}  # of a recache, which takes all visible frames at once
    at_work = [transformer_activation_bytes(plain.transformer, 4, 4, **shape, quantize=one) for one in (None, kind)]
    assert saved > 0 and pipe.memory_needed(9) == needed - saved + at_work[1] - at_work[0] and pipe.session_bytes() == session
    found = latents(pipe, num_latent_frames=9)  # the text, which the pipeline had kept, is read by the new layers
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    assert torch.equal(latents(plain, num_latent_frames=9), expected)
    pipe.accelerate(quantize_cache="int8")
    assert pipe.session_bytes() < session
    both = latents(pipe, num_latent_frames=9)
    assert not torch.equal(both, found) and (both - expected).norm() < 0.2 * expected.norm()
    pipe.accelerate()  # nothing
    assert torch.equal(latents(pipe, num_latent_frames=9), both)
    pipe.accelerate(quantize_cache="off")
    assert torch.equal(latents(pipe, num_latent_frames=9), found)


def test_in_8_bits_a_pipeline_is_not_saved_adapted_or_accelerated_again(tiny, tmp_path):
    pipe = LongLivePipeline.from_pretrained(tiny)
    lora = lora_state(add_lora(copy.deepcopy(pipe.transformer), rank=2))
    for wrong in ({"quantize": "int4"}, {"quantize_cache": "int4"}, {"quantize": "int8", "quantize_cache": "int4"}):
        with pytest.raises(ValueError, match="'int4' is unknown"):
            pipe.accelerate(**wrong)
    pipe.save_pretrained(tmp_path / "before")  # nothing was changed
    pipe.accelerate(quantize="int8")
    with pytest.raises(ValueError, match="save it before it is quantised"):
        pipe.save_pretrained(tmp_path / "after")
    torch.save(lora, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="before it is quantised"):
        pipe.load_lora_weights(tmp_path / "lora.pt")
    with pytest.raises(ValueError, match="quantised already"):
        pipe.accelerate(quantize="fp8")


@pytest.mark.parametrize("relative", [False, True])
def test_memory_needed_counts_the_cache_it_will_allocate(tiny, relative):
    pipe = LongLivePipeline.from_pretrained(tiny, relative_rope=relative)
    once, twice = (
        sum(buffer.nbytes for buffer in (ring.keys, ring.values, ring._sink_keys) if buffer is not None)
        for ring in (pipe._cache(21, 32, 32, batch) for batch in (1, 2))
    )
    assert pipe._video_bytes(32, 32, visible=pipe.config.window, batch=1).cache == once
    assert pipe.memory_needed(21, 32, 32, batch=2) - pipe.memory_needed(21, 32, 32) >= twice - once > 0
    assert pipe.memory_needed(2100) == pipe.memory_needed(21)  # a window: the cost of a block is constant
