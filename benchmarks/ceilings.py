"""What a device reaches at most: copying memory, multiplying matrices, and every attention backend at the model's real shape.

    python benchmarks/ceilings.py --device cuda --output result.json

Prints a table, then one JSON line. Shares of a peak that a data sheet promises say little; shares of what is measured here do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import report

from longlive.ops import attention

QUERIES, KEYS, HEADS, WIDTH = 4680, 18720, 12, 128  # a block and a full window of the 1.3B model at 480 x 832


def seconds_of(work: Callable[[], object], device: torch.device, *, times: int, warm_up: int = 3) -> float:
    """Median seconds of `work` on the device."""
    for _ in range(warm_up):
        work()
    measured = []
    for _ in range(times):
        if device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            work()
            after.record()
            after.synchronize()
            measured.append(before.elapsed_time(after) / 1000)
        else:
            began = time.perf_counter()
            work()
            measured.append(time.perf_counter() - began)
    return statistics.median(measured)


def copy_rate(device: torch.device, *, megabytes: int, times: int) -> float:
    """Bytes read and written per second."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device, times=times)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, side: int, times: int) -> float:
    """Operations per second of a product of two square matrices of random numbers: with zeros a GPU draws less power and runs faster."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, times=times)


def attention_rates(
    device: torch.device, dtype: torch.dtype, *, queries: int, keys: int, heads: int, width: int, times: int
) -> dict[str, float | str]:
    """Operations per second of each backend; the reason why, of one that does not run here."""
    q, k, v = (torch.randn(1, length, heads, width, device=device, dtype=dtype) for length in (queries, keys, keys))
    found: dict[str, float | str] = {}
    for name in attention.BACKENDS:
        try:
            backend = attention.choose(name, device, dtype)
            seconds = seconds_of(lambda backend=backend: backend(q, k, v), device, times=times)
        except (ValueError, RuntimeError) as error:  # it is not there, or its kernels refuse this device
            found[name] = str(error).splitlines()[0].split("cannot be used: ")[-1].removesuffix("; choose auto")
        else:
            found[name] = 4 * queries * keys * heads * width / seconds
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure as the command line says; prints the table and returns the content of the JSON line."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no CUDA device; choose --device cpu")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "dtype": options.dtype}
    if options.only in (None, "limits"):
        found["copy_gb_per_s"] = copy_rate(device, megabytes=options.megabytes, times=options.times) / 1e9
        found["matmul_tflops"] = matmul_rate(device, dtype, side=options.side, times=options.times) / 1e12
        print(f"{'copy, GB/s read and written':32} {found['copy_gb_per_s']:10.4g}")
        print(f"{f'product of {options.side} x {options.side}, TFLOP/s':32} {found['matmul_tflops']:10.4g}")
    if options.only in (None, "attention"):
        shape = {"queries": options.queries, "keys": options.keys, "heads": HEADS, "width": WIDTH}
        rates = attention_rates(device, dtype, **shape, times=options.times)
        found["attention_shape"] = shape
        found["attention_tflops"] = {name: rate / 1e12 for name, rate in rates.items() if not isinstance(rate, str)}
        found["attention_missing"] = {name: reason for name, reason in rates.items() if isinstance(reason, str)}
        for name, rate in rates.items():
            print(f"{f'attention {name}, TFLOP/s':32} {rate if isinstance(rate, str) else f'{rate / 1e12:10.4g}'}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", choices=("limits", "attention"), help="measure only this part")
    parser.add_argument("--megabytes", type=int, default=1024, help="that are copied")
    parser.add_argument("--side", type=int, default=8192, help="of the matrices")
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--times", type=int, default=20, help="of which the median is reported")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    options = parser.parse_args(arguments)
    return report(lambda: run(options), options.output)


if __name__ == "__main__":
    sys.exit(main())
