"""The same video on a GPU as on a CPU, in memory that does not grow."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from longlive import Cue, LongLivePipeline, PromptSchedule
from longlive.cache.window import Window
from longlive.engine.steady import cuda_graph, default_compiler
from longlive.generation.caches import ring_cache
from longlive.generation.transition import Transition
from longlive.models.text import TextEncoder
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import check_golden  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")
PROMPT = "a red circle moving right on a black background"
OTHER = "a blue square moving up on a white background"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def full_precision():
    """float32 means float32: convolutions would else round to TensorFloat-32, which torch allows them by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture()
def on_cpu(tiny):
    return LongLivePipeline.from_pretrained(tiny)


@pytest.fixture()
def on_gpu(tiny):
    return LongLivePipeline.from_pretrained(tiny).to(DEVICE)


def test_same_video_on_both(on_cpu, on_gpu):
    """With a full window, a prompt switch that keeps the sink and one that does not."""
    cues = PromptSchedule((Cue(0, PROMPT), Cue(12, OTHER, Transition(True)), Cue(18, PROMPT, Transition(False))))
    for output_type in ("latent", "pt"):
        first, second = (
            pipe(cues, num_latent_frames=24, generator=generator(), output_type=output_type).frames for pipe in (on_cpu, on_gpu)
        )
        torch.testing.assert_close(second.cpu(), first, atol=1e-3, rtol=0)


def latents(pipe, cues, num_latent_frames, seed=0):
    return pipe(cues, num_latent_frames=num_latent_frames, generator=generator(seed), output_type="latent").frames


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("cache", [None, "int8"])
def test_recorded_passes_give_the_same_latents_bit_by_bit(tiny, relative, cache):
    """Two videos, so that there are two rings, with switches before and after the window is full; also once more without recordings."""
    pipe = LongLivePipeline.from_pretrained(tiny, relative_rope=relative).to(DEVICE)
    pipe.accelerate(quantize_cache=cache)
    cues = PromptSchedule((Cue(0, PROMPT), Cue(6, OTHER), Cue(21, PROMPT, Transition(True)), Cue(30, OTHER, Transition(False))))

    expected = [latents(pipe, cues, 45, seed) for seed in (0, 1)]
    for graphs in (True, False):
        pipe.accelerate(graphs=graphs)
        assert all(torch.equal(latents(pipe, cues, 45, seed), wanted) for seed, wanted in enumerate(expected))


def test_compiled_and_recorded_passes_stay_close(tiny):
    pipe = LongLivePipeline.from_pretrained(tiny).to(DEVICE)
    cues = PromptSchedule((Cue(0, PROMPT), Cue(21, OTHER)))
    expected = latents(pipe, cues, 36)
    pipe.accelerate(compile=True, graphs=True)
    pipe.warm_up()
    found = latents(pipe, cues, 36)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_recorded_passes_of_sessions_that_run_ahead(tiny):
    """Two at once, each making its blocks in a thread of its own while the block before is decoded in this one."""
    pipe = LongLivePipeline.from_pretrained(tiny).to(DEVICE)

    def images(ahead):
        sessions = [pipe.session(prompt, seed=seed, num_latent_frames=45, ahead=ahead) for seed, prompt in enumerate((PROMPT, OTHER))]
        return [torch.cat([block.images for block in blocks], dim=1) for blocks in zip(*zip(*sessions))]

    expected = images(ahead=False)
    pipe.accelerate(graphs=True)
    for _ in range(2):  # recorded, and replayed
        assert all(map(torch.equal, images(ahead=True), expected))


def test_blocks_are_queued_without_waiting_for_the_device(on_gpu):
    """Once the window is full the host neither reads from the device nor waits for it, between blocks and at a prompt switch."""
    pipe = on_gpu
    pipe.prepare_prompt(OTHER).result()
    cues = PromptSchedule((Cue(0, PROMPT), Cue(21, OTHER)))
    blocks = pipe.stream(cues, num_latent_frames=36, generator=generator())
    for _ in range(4):
        next(blocks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            next(blocks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(list(blocks)) == 1


def test_same_images_from_a_session(on_cpu, on_gpu):
    first, second = (
        torch.cat([chunk.images for chunk in pipe.session(PROMPT, num_latent_frames=12, generator=generator())], dim=1)
        for pipe in (on_cpu, on_gpu)
    )
    assert second.device.type == "cpu" and second.dtype == torch.uint8
    assert (first.int() - second.int()).abs().max() <= 1


def test_same_seed_same_noise(on_cpu, on_gpu):
    """A network whose flow is 0 shows the noise it was given."""
    seen = []
    for pipe in (on_cpu, on_gpu):
        torch.nn.init.zeros_(pipe.transformer.head.head.weight)
        torch.nn.init.zeros_(pipe.transformer.head.head.bias)
        made = pipe.stream(
            PromptSchedule.single(PROMPT), num_latent_frames=6, generator=generator(3), on_step=lambda number, t, x0: seen.append(x0.cpu())
        )
        list(made)
    half = len(seen) // 2
    assert seen[0].std() > 0.5
    for number in range(0, half, 2):  # the first pass of each block; later ones went through arithmetic
        assert torch.equal(seen[number], seen[half + number])


def test_bfloat16_stays_close_to_float32():
    """One pass of two layers as wide as the 1.3B model, with a past in the ring."""
    torch.manual_seed(0)
    with DEVICE:
        model = WanTransformer(**{**arguments("1.3b"), "num_layers": 2, "text_len": 64}).eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.02)
    shape, text = (1, 3, 16, 16, 16), torch.randn(1, 40, 4096, generator=generator(1)).to(DEVICE)
    past, noisy = (torch.randn(shape, generator=generator(seed)).to(DEVICE) for seed in (2, 3))
    flows = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = copy.deepcopy(model).to(dtype)
        ring = ring_cache(network, 16, 16, window=Window(3, 3))
        with torch.no_grad(), ring.record(range(0, 3)) as view:
            network(past.to(dtype), torch.zeros(1, 3, device=DEVICE), text.to(dtype), view)
        with torch.no_grad():
            flows[dtype] = network(
                noisy.to(dtype), torch.full((1, 3), 937.5, device=DEVICE), text.to(dtype), ring.view(range(3, 6))
            ).float()
    wanted = flows[torch.float32]
    assert ((flows[torch.bfloat16] - wanted).norm() / wanted.norm()).item() < 3e-2


def test_memory_does_not_grow(on_gpu):
    """200 blocks, with switches; the second half needs no more than the first, after the rotation tables are all there."""
    session = on_gpu.session(PROMPT, generator=generator())
    held = []
    for number in range(200):
        if number % 20 == 10:
            session.prompt(OTHER if number % 40 == 10 else PROMPT)
        next(session)
        held.append(torch.cuda.memory_allocated(DEVICE))
    assert max(held[120:]) <= max(held[40:120])


def test_text_encoder_on_demand_leaves_nothing_on_the_device(on_cpu):
    reader = TextEncoder(on_cpu.text_encoder, on_cpu.tokenizer, text_len=32, device=DEVICE, mode="on_demand")
    reader.encode([PROMPT])  # once, for what the libraries keep
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    text = reader.encode([OTHER])
    assert text.device.type == "cuda"
    del text
    weights = sum(p.numel() * p.element_size() for p in on_cpu.text_encoder.parameters())
    assert torch.cuda.max_memory_allocated(DEVICE) - before >= weights  # it was there,
    assert torch.cuda.memory_allocated(DEVICE) == before  # and left
    assert all(tensor.device.type == "cpu" for tensor in (*on_cpu.text_encoder.parameters(), *on_cpu.text_encoder.buffers()))


@pytest.mark.parametrize("mode", ["on_demand", "cpu"])
def test_offload_makes_the_same_video(on_cpu, on_gpu, mode):
    wanted = on_gpu(PROMPT, num_latent_frames=6, generator=generator(), output_type="latent").frames
    on_cpu.to(DEVICE)
    on_cpu.place_text_encoder(mode)
    on_cpu.to(DEVICE)
    torch.testing.assert_close(
        on_cpu(PROMPT, num_latent_frames=6, generator=generator(), output_type="latent").frames, wanted, atol=1e-5, rtol=0
    )
    assert on_cpu.text_encoder.device.type == "cpu" and on_cpu.transformer.device.type == "cuda"


class FolderOnGPU(check_golden.Folder):
    def tensors(self, name):
        return {key: tensor.to(DEVICE) for key, tensor in super().tensors(name).items()}


class CaseOnGPU(check_golden.Case):
    def ring(self, *args):
        ring = super().ring(*args)
        ring.keys, ring.values = ring.keys.to(DEVICE), ring.values.to(DEVICE)
        ring._sink_keys = None if ring._sink_keys is None else ring._sink_keys.to(DEVICE)
        return ring


GOLDEN = FolderOnGPU(ROOT / "tests" / "golden")
COMPUTED = ("rollout", "teacher", "lora", "vae", "text_encoder", "dmd")


@pytest.mark.parametrize("name", [name for name, settings in GOLDEN.entries.items() if settings["kind"] in COMPUTED])
@torch.no_grad()
def test_recorded_vectors(name):
    case = CaseOnGPU(GOLDEN, name)
    with DEVICE:  # where the case makes its networks
        assert max(check_golden.KINDS[case.settings["kind"]](case)) <= check_golden.TOLERANCE


@pytest.mark.parametrize("name", [name for name, settings in GOLDEN.entries.items() if settings["kind"] == "rollout"])
@pytest.mark.parametrize("compiled", [False, True], ids=["recorded", "compiled and recorded"])
@torch.no_grad()
def test_recorded_vectors_through_the_engine(name, compiled):
    engine = check_golden.Engine(default_compiler(DEVICE) if compiled else None, cuda_graph)
    case = CaseOnGPU(GOLDEN, name, engine)
    with DEVICE:
        assert max(case.rollout()) <= check_golden.TOLERANCE
    assert case.num_passes
