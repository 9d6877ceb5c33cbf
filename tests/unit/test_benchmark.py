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


def test_what_cannot_be_measured_is_refused(capsys):
    sizes = ["--size", "miniature", "--dtype", "float32", "--device", "cpu"]
    assert throughput.main([*sizes, "--height", "30", "--width", "32"]) == 2
    assert "not divisible by 16" in capsys.readouterr().err
    assert throughput.main([*sizes, "--blocks", "0"]) == 2
    assert "choose at least 1" in capsys.readouterr().err
    assert throughput.main([*sizes, "--height", "32", "--width", "32", "--attention", "fa3"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
