"""The GPU suite records what it did, what failed and what it left out, and makes a table of whatever there is."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import ceilings
import gpu_suite
from gpu_suite import Step
from suite_table import table, table_of_file

MADE = {
    "gpu": None, "cuda": None, "cudnn": None, "commit": "abc", "hardware": {"processor": "a CPU"},
    "versions": {"python": "3", "torch": "2", "diffusers": "1"},
}  # fmt: skip


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """One that works, one that fails and one that never ends, in the folder from which the suite runs programs."""
    (tmp_path / "works.py").write_text(
        "import pathlib, sys, json\npathlib.Path(sys.argv[sys.argv.index('--output') + 1]).write_text(json.dumps({'x': sys.argv[1]}))\n"
    )
    (tmp_path / "fails.py").write_text("print('before')\nraise RuntimeError('out of memory | at step 3')\n")
    (tmp_path / "hangs.py").write_text("import time\nprint('so far', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "counts.py").write_text("print('3 passed')\n")
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_suite, "FRESH_SECONDS", 0.0)
    return tmp_path


STEPS = (
    Step("works", ("works.py", "7"), 0.1),
    Step("fails", ("fails.py",), 0.1),
    Step("tests", ("counts.py",), 0.1, writes=False),
    Step("graphs", ("works.py", "8"), 0.1, needs_gpu=True),
    Step("long", ("works.py", "9"), 1000.0),
)


@pytest.mark.parametrize("same_process", [True, False])
def test_every_step_leaves_a_line(programs, tmp_path, same_process):
    gpu_suite.run(tmp_path / "out", STEPS, seconds=100, same_process=same_process, has_gpu=False, made=MADE)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "failed", "done", "needs a GPU", "skipped"]
    assert lines[0]["result"] == {"x": "7"} and lines[0]["commit"] == "abc" and lines[0]["seconds"] >= 0
    assert lines[1]["error"].endswith("RuntimeError: out of memory | at step 3") and "before" in lines[1]["error"]
    assert lines[2]["result"] == {"summary": "3 passed"}
    assert "1000 s are needed" in lines[4]["error"]
    text = table_of_file(tmp_path / "out" / "results.jsonl")
    assert "| graphs | needs a GPU |" in text and "out of memory \\| at step 3" in text and "GPU tests: 3 passed" in text


def test_a_step_that_takes_too_long_is_stopped_and_the_next_one_skipped(programs, tmp_path):
    steps = [Step("hangs", ("hangs.py",), 1.0, writes=False), Step("works", ("works.py", "1"), 1.0)]
    gpu_suite.run(tmp_path / "out", steps, seconds=3, same_process=False, has_gpu=False, made=MADE)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["failed", "skipped"]
    assert "stopped after" in lines[0]["error"]


def test_table_of_a_run_that_was_cut(tmp_path):
    """Of the newest run only; the last line ends in the middle."""
    speed = {name: 1.0 for name in ("network_fps", "end_to_end_fps", "first_images_ms", "first_images_cold_ms", "warm_up_s", "flat_ratio")}
    speed |= {name: {"median": 20.0, "p10": 19.0, "p90": 300.4} for name in ("block_ms", "denoise_ms", "remember_ms", "decode_ms")}
    speed |= {"engine": "eager", "decoder": "full", "attention": "fa3", "quantize": None, "quantize_cache": "int8", "blocks": 60}
    speed |= {
        "switch_recache_ms": 5.0,
        "switch_block_ms": 6.0,
        "switch_block_worst_ms": 7.0,
        "peak_memory_bytes": 2**31,
        "network_tflops": 300.0,
    }
    limits = {"copy_gb_per_s": 3000.0, "matmul_tflops": 600.0, "dtype": "bfloat16"}
    attention = {
        "attention_shape": {"queries": 4, "keys": 8},
        "attention_tflops": {"sdpa": 500.0},
        "attention_missing": {"fa3": "not installed"},
    }
    done = {"status": "done", "seconds": 1.0, **MADE}
    lines = [{"run": "1", "step": "old", **done, "result": speed}]
    lines += [
        {"run": "2", "step": name, **done, "result": result}
        for name, result in (("ceilings", limits), ("attention", attention), ("eager", speed))
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"run": "2", "step": "grap')
    text = table_of_file(file)
    assert "| old |" not in text and "| eager | done |" in text
    assert "20 (19, 300)" in text and "– / int8" in text and "| 50% |" in text and "| fa3 | not installed |" in text
    with pytest.raises(ValueError, match="no line"):
        table([])


def test_command_line(tmp_path, capsys):
    assert gpu_suite.main([str(tmp_path), "--table"]) == 2
    assert gpu_suite.main([str(tmp_path), "--small", "--steps", "ceilings;nothing"]) == 2
    assert "there is no step 'nothing'; choose from ceilings; GPU tests" in capsys.readouterr().err
    assert gpu_suite.main([str(tmp_path), "--small", "--steps", "attention;GPU tests", "--same-process"]) == 0
    assert "| sdpa |" in (tmp_path / "table.md").read_text() and "| GPU tests | needs a GPU |" in (tmp_path / "table.md").read_text()


def test_the_plan_fits_into_its_time():
    steps = gpu_suite.plan(small=False)
    assert sum(step.seconds for step in steps[:-1]) <= 500 and [step.name for step in steps] == [s.name for s in gpu_suite.plan(small=True)]


def test_ceilings(tmp_path, capsys):
    output = tmp_path / "result.json"
    words = "--device cpu --dtype float32 --megabytes 1 --side 32 --queries 8 --keys 16 --times 2"
    assert ceilings.main([*words.split(), "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["copy_gb_per_s"] > 0 and found["matmul_tflops"] > 0 and found["attention_tflops"]["sdpa"] > 0
    assert "needs a CUDA device" in found["attention_missing"]["fa3"]
    assert ceilings.main(["--device", "cuda", *words.split()[2:]]) == 2
