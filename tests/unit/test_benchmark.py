"""The benchmark counts what is computed, and its command line runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longlive.cache.window import Window
from longlive.generation.caches import ring_cache
from longlive.models.wan import WanTransformer
from longlive.models.zoo import arguments

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import throughput
from flops import flops_of_block, flops_of_pass
from random_model import build


def test_flops_of_the_full_size():
    with torch.device("meta"):
        model = WanTransformer(**arguments("1.3b"))
    flops = flops_of_block(model, height=60, width=104, block=3, window=12, steps=4)
    assert flops / 1e12 == pytest.approx(141.5, rel=1e-2)


@torch.no_grad()
def test_flops_are_those_torch_counts():
    model = WanTransformer(dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=20, text_len=7, freq_dim=16, in_dim=8, out_dim=6).eval()
    latents = torch.randn(1, 2, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    text = model.project_text(torch.randn(1, 5, 20))
    ring = ring_cache(model, 4, 6, window=Window(sink=1, recent=4))
    for visible in (2, 4, 5, 5):
        with ring.record(range(ring.end, ring.end + 2)) as view, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(latents, torch.full((1, 2), 500.0), text, view)
        sizes = {"frames": 2, "visible": visible, "tokens_per_frame": 6}
        assert counter.get_total_flops() == flops_of_pass(model, **sizes)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.write_kv(latents, torch.full((1, 1), 500.0), text, view)
        assert counter.get_total_flops() == flops_of_pass(model, **sizes, timesteps=1, writes_only=True)


def test_command_line_writes_what_it_prints(tmp_path, capsys):
    output = tmp_path / "new" / "result.json"
    sizes = ["--size", "miniature", "--height", "32", "--width", "32", "--window", "6", "--steps", "1000,500"]
    machine = ["--device", "cpu", "--dtype", "float32", "--blocks", "2", "--switches", "1", "--output", str(output)]
    assert throughput.main([*sizes, *machine]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert "transformer, TFLOP per block" in printed
    assert (result["size"], result["attention"], result["device"], result["blocks"]) == ("miniature", "sdpa", "cpu", 2)
    parts = ("denoise_ms", "remember_ms", "decode_ms")
    assert all(result[part]["median"] > 0 for part in parts)
    assert sum(result[part]["p10"] for part in parts) <= result["block_ms"]["p90"]
    assert result["network_fps"] >= result["end_to_end_fps"] > 0
    assert result["switch_recache_ms"] > 0
    assert result["peak_memory_bytes"] > 0
    assert result["utilisation"] is None


SMALL = "--size miniature --height 32 --width 32 --window 6 --steps 1000,500 --device cpu --dtype float32 --blocks 1 --switches 1"


@pytest.mark.parametrize(
    "words", ["--engine reference", "--quantize int8 --quantize-cache int8 --decoder tiny", "--blocks 500 --max-seconds 0"]
)
def test_every_engine_is_measured_in_the_same_way(words, capsys):
    assert throughput.main([*SMALL.split(), *words.split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["network_fps"] > 0 and result["warm_up_s"] > 0 and result["flat_ratio"] > 0 and result["blocks"] == 1
    given = dict(zip(words.split()[::2], words.split()[1::2]))
    assert result["engine"] == given.get("--engine", "eager") and result["decoder"] == given.get("--decoder", "full")
    assert result["quantize"] == given.get("--quantize")


def test_the_plain_way_does_more(capsys):
    """Adapters beside the layers, text layers in every pass: more operations of the same size."""
    pipes = [build("miniature", device=torch.device("cpu"), dtype=torch.float32, reference=reference) for reference in (False, True)]
    counts = []
    for pipe in pipes:
        with FlopCounterMode(display=False) as counter:
            for _ in pipe.session("a red circle", num_latent_frames=3, height=32, width=32, seed=0):
                pass
        counts.append(counter.get_total_flops())
    assert counts[1] > 1.2 * counts[0]


def test_flatness():
    assert throughput.flatness([1.0] * 50 + [2.0] * 50) == 2.0
    assert throughput.flatness([3.0]) == 1.0


def test_what_cannot_be_measured_is_refused(capsys):
    sizes = ["--size", "miniature", "--dtype", "float32", "--device", "cpu"]
    assert throughput.main([*sizes, "--height", "30", "--width", "32"]) == 2
    assert "not divisible by 16" in capsys.readouterr().err
    assert throughput.main([*sizes, "--blocks", "0"]) == 2
    assert "choose at least 1" in capsys.readouterr().err
    assert throughput.main([*sizes, "--height", "32", "--width", "32", "--attention", "fa3"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert throughput.main([*SMALL.split(), "--engine", "reference", "--quantize", "int8"]) == 2
    assert "the plain way knows no 8 bits" in capsys.readouterr().err
    assert throughput.main([*SMALL.split(), "--engine", "graphs"]) == 2
    assert "graphs are CUDA graphs" in capsys.readouterr().err
