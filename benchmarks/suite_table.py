"""The table of a run of the GPU suite (benchmarks/gpu_suite.py), made from its lines; from those that are there, when the run was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPEED = (
    ("engine", "engine"),
    ("8 bits: linears / cache", None),
    ("decoder", "decoder"),
    ("attention", "attention"),
    ("FPS, transformer only", "network_fps"),
    ("FPS, end to end", "end_to_end_fps"),
    ("ms per block", "block_ms"),
    ("denoise", "denoise_ms"),
    ("clean pass", "remember_ms"),
    ("decode", "decode_ms"),
    ("first images, ms", "first_images_ms"),
    ("cold", "first_images_cold_ms"),
    ("warm-up, s", "warm_up_s"),
    ("recache, ms", "switch_recache_ms"),
    ("block after a switch, ms (worst)", None),
    ("blocks", "blocks"),
    ("last over first blocks", "flat_ratio"),
    ("peak GiB", None),
    ("share of the measured product rate", None),
)


def number(value: Any) -> str:
    if isinstance(value, dict):
        return f"{number(value['median'])} ({number(value['p10'])}, {number(value['p90'])})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "–" if value is None else str(value)


def speed_row(step: str, result: dict[str, Any], ceiling: float | None) -> list[str]:
    """The cells of a step that was measured by throughput.py."""
    own = {
        "8 bits: linears / cache": f"{number(result['quantize'])} / {number(result['quantize_cache'])}",
        "block after a switch, ms (worst)": f"{number(result['switch_block_ms'])} ({number(result['switch_block_worst_ms'])})",
        "peak GiB": number(result["peak_memory_bytes"] / 2**30),
        "share of the measured product rate": "–" if ceiling is None else f"{result['network_tflops'] / ceiling:.0%}",
    }
    return [step, *(own[title] if key is None else number(result[key]) for title, key in SPEED)]


def markdown(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def table(lines: list[dict[str, Any]]) -> str:
    """In markdown. Raises ValueError without lines."""
    if not lines:
        raise ValueError("there is no line to make a table of")
    lines = [line for line in lines if line["run"] == lines[-1]["run"]]  # of the newest run
    first = lines[0]
    versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "torch", "diffusers"))
    text = [
        f"# {first['gpu'] or first['hardware']['processor']}",
        "",
        f"{first['run']}, commit {first['commit']}, {versions}, CUDA {first['cuda']}, cuDNN {first['cudnn']}.",
        "",
        *markdown(
            [
                ["step", "status", "seconds", "error"],
                *([line["step"], line["status"], number(line["seconds"]), _error(line)] for line in lines),
            ]
        ),
    ]
    done = {line["step"]: line["result"] for line in lines if line["status"] == "done"}
    limits = next((result for result in done.values() if "matmul_tflops" in result), None)
    if limits is not None:
        text += [
            "",
            f"Copy {number(limits['copy_gb_per_s'])} GB/s, matrix product {number(limits['matmul_tflops'])} TFLOP/s ({limits['dtype']}).",
        ]
    attention = next((result for result in done.values() if "attention_tflops" in result), None)
    if attention is not None:
        shape = " × ".join(str(size) for size in attention["attention_shape"].values())
        rates = {
            **{name: f"{number(rate)} TFLOP/s" for name, rate in attention["attention_tflops"].items()},
            **attention["attention_missing"],
        }
        text += ["", f"Attention at {shape}:", "", *markdown([["back-end", "rate"], *([name, rate] for name, rate in rates.items())])]
    measured = {step: result for step, result in done.items() if "network_fps" in result}
    if measured:
        ceiling = None if limits is None else limits["matmul_tflops"]
        titles = ["step", *(title for title, _ in SPEED)]
        text += ["", *markdown([titles, *(speed_row(step, result, ceiling) for step, result in measured.items())])]
    tests = next((result["summary"] for result in done.values() if "summary" in result), None)
    if tests is not None:
        text += ["", f"GPU tests: {tests}"]
    return "\n".join(text) + "\n"


def _error(line: dict[str, Any]) -> str:
    return line["error"].splitlines()[-1].replace("|", "\\|") if "error" in line else ""


def table_of_file(path: Path) -> str:
    """The table of a results.jsonl; a last line that was cut off while it was written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return table(lines)
