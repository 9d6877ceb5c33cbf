"""Everything that has to be known of a GPU, in 8 minutes on a machine with torch 2.8 or newer: bash scripts/gpu_suite.sh OUT

Runs one program after the other, the most important ones first: ceilings, GPU tests, attention, the engines, 8 bits, the decoders, prompt
switches, a long video. As soon as a step is done, one JSON line of it is appended to OUT/results.jsonl: what it measured, when, on which
machine, with which commit, and the clocks before and after. A step that fails, or takes longer than is left, is recorded with its error
and the next one runs; a step for which too little time is left is recorded as skipped. At the end OUT/table.md is made from the lines.

Programs that are run here know nothing of the suite; each can be run alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

from suite_table import table_of_file

ROOT = Path(__file__).parents[1]
SECONDS = 480.0
FRESH_SECONDS = 5.0  # below this no step is started
SHAPE = "--size 1.3b --height 480 --width 832 --device cuda --dtype bfloat16"
SMALL_SHAPE = "--size miniature --height 32 --width 32 --window 6 --device cpu --dtype float32"
SMALL_CEILINGS = "--device cpu --dtype float32 --megabytes 16 --side 256 --queries 48 --keys 192 --times 3"
NEEDS_GPU = "needs a GPU"
ERROR_CHARS = 2000  # of the end of what a failed step printed


@dataclass(frozen=True)
class Step:
    """A program and its arguments; `seconds` is what it is expected to take on an H100."""

    name: str
    words: tuple[str, ...]
    seconds: float
    needs_gpu: bool = False
    writes: bool = True  # a JSON line to the file of its option --output


def plan(*, small: bool) -> list[Step]:
    """The steps in the order in which they run."""
    shape, ceilings = (SMALL_SHAPE, SMALL_CEILINGS) if small else (SHAPE, "")

    def speed(name: str, seconds: float, words: str, few: str = "--blocks 2 --switches 1", needs_gpu: bool = False) -> Step:
        """Later options win, so that `few` replaces numbers of blocks."""
        return Step(name, ("benchmarks/throughput.py", *f"{shape} {words} {few if small else ''}".split()), seconds, needs_gpu)

    return [
        Step("ceilings", ("benchmarks/ceilings.py", "--only", "limits", *ceilings.split()), 15),
        Step("GPU tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"), 70, needs_gpu=True, writes=False),
        Step("attention", ("benchmarks/ceilings.py", "--only", "attention", *ceilings.split()), 15),
        speed("eager", 30, "--engine eager --blocks 20 --switches 2"),
        speed("graphs, 30 switches", 130, "--engine graphs --blocks 30 --switches 30", needs_gpu=True),
        speed(
            "tiny decoder, 500 blocks",
            95,
            "--engine graphs --decoder tiny --blocks 500 --max-seconds 75 --switches 1",
            "--engine eager --blocks 20 --max-seconds 5",
        ),
        speed("reference", 40, "--engine reference --blocks 15 --switches 2"),
        speed("int8", 50, "--engine graphs --quantize int8 --quantize-cache int8 --blocks 20 --switches 1", "--engine eager --blocks 2"),
        speed("fp8", 50, "--engine graphs --quantize fp8 --quantize-cache fp8 --blocks 20 --switches 1", "--engine eager --blocks 2"),
        speed("compiled", 35, "--engine compiled --blocks 20 --switches 2"),
    ]


def in_a_process(step: Step, timeout: float) -> tuple[int, str]:
    """Run a step's program in a process of its own, which a crash does not outlive; returns its status and what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, *step.words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        return 124, f"{printed if isinstance(printed, str) else printed.decode(errors='replace')}\nstopped after {timeout:.0f} s"
    return done.returncode, done.stdout


def in_this_process(step: Step, timeout: float) -> tuple[int, str]:
    """Run a step's program in this process: where starting one takes longer than the step. `timeout` is not kept."""
    printed, script = io.StringIO(), ROOT / step.words[0]
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        mock.patch.object(sys, "argv", [str(script), *step.words[1:]]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), printed.getvalue()
        except BaseException as error:
            traceback.print_exc(file=printed)
            if isinstance(error, KeyboardInterrupt):
                raise
            return 1, printed.getvalue()
    return 0, printed.getvalue()


def clocks() -> list[dict[str, str]] | None:
    """Clocks, power and temperature of each GPU; None without nvidia-smi."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"]
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    rows = [[value.strip() for value in line.split(",")] for line in asked.stdout.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)] or None


def machine() -> dict[str, Any]:
    """Versions, commit and hardware, asked in a process of its own: this one does not touch the GPU."""
    code = (
        "import json, torch; from longlive.provenance import made_with; gpu = torch.cuda.is_available();"
        "print(json.dumps({'gpu': torch.cuda.get_device_name() if gpu else None, 'cuda': torch.version.cuda,"
        " 'cudnn': torch.backends.cudnn.version() if gpu else None,"
        " 'gpu_bytes': torch.cuda.get_device_properties(0).total_memory if gpu else None, **made_with()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"torch or the package cannot be imported with {sys.executable}:\n{done.stderr.strip()[-ERROR_CHARS:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: Step, *, left: float, has_gpu: bool, same_process: bool) -> dict[str, Any]:
    """Run one step, or say why it does not run; what its line holds besides the machine."""
    line: dict[str, Any] = {"step": step.name, "command": " ".join(step.words), "seconds": 0.0}
    if step.needs_gpu and not has_gpu:
        return {**line, "status": NEEDS_GPU}
    if left < max(FRESH_SECONDS, step.seconds):
        return {**line, "status": "skipped", "error": f"about {step.seconds:.0f} s are needed and {max(0.0, left):.0f} s were left"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        whole = Step(step.name, (*step.words, "--output", str(output)), step.seconds) if step.writes else step
        before, began = clocks(), time.perf_counter()
        status, printed = (in_this_process if same_process else in_a_process)(whole, left)
        line |= {"seconds": round(time.perf_counter() - began, 2), "clocks_before": before, "clocks_after": clocks()}
        if status:
            return {**line, "status": "failed", "error": printed.strip()[-ERROR_CHARS:]}
        last = printed.strip().splitlines()[-1] if printed.strip() else ""
        return {**line, "status": "done", "result": json.loads(output.read_text()) if step.writes else {"summary": last}}


def run(out: Path, steps: Sequence[Step], *, seconds: float, same_process: bool, has_gpu: bool, made: dict[str, Any]) -> None:
    """Run the steps and append their lines to OUT/results.jsonl, each as soon as it is known."""
    ends = time.perf_counter() + seconds
    out.mkdir(parents=True, exist_ok=True)
    run_id = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for step in steps:
        print(f"{step.name} …", flush=True)
        line = run_step(step, left=ends - time.perf_counter(), has_gpu=has_gpu, same_process=same_process)
        with (out / "results.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"run": run_id, **line, **made}) + "\n")
        print(
            f"  {line['status']} after {line['seconds']:.1f} s{': ' + line['error'].splitlines()[-1] if 'error' in line else ''}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of results.jsonl and table.md")
    parser.add_argument("--small", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--seconds", type=float, help=f"for all steps together (default {SECONDS:.0f}; with --small an hour)")
    parser.add_argument("--steps", help="only these, by name, separated by semicolons")
    parser.add_argument("--same-process", action="store_true", help="no process for each step: where starting one takes long")
    parser.add_argument("--table", action="store_true", help="measure nothing; make the table from OUT/results.jsonl")
    options = parser.parse_args(arguments)
    lines = options.out / "results.jsonl"
    try:
        if options.table and not lines.is_file():
            raise ValueError(f"{lines} does not exist; run the suite first")
        if not options.table:
            steps = plan(small=options.small)
            if options.steps is not None:
                wanted, known = options.steps.split(";"), {step.name: step for step in steps}
                if unknown := [name for name in wanted if name not in known]:
                    raise ValueError(f"there is no step {unknown[0]!r}; choose from {'; '.join(known)}")
                steps = [step for step in steps if step.name in wanted]
            made, seconds = machine(), options.seconds or (3600.0 if options.small else SECONDS)
            has_gpu = made["gpu"] is not None and not options.small
            if not has_gpu and not options.small:
                raise ValueError("this machine has no GPU that torch can use; --small runs the steps with small shapes on the CPU")
            run(options.out, steps, seconds=seconds, same_process=options.same_process, has_gpu=has_gpu, made=made)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = table_of_file(lines)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
