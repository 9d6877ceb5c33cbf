"""The recorded vectors, and a checker that can fail."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "scripts"))
import check_golden  # noqa: E402


def test_every_vector_agrees(capsys):
    assert check_golden.check(GOLDEN)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(json.loads((GOLDEN / "manifest.json").read_text()))


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("single_window6_sink3", "latents"),
        ("teacher_forward", "x0"),
        ("vae", "decoded"),
        ("text_encoder", "prompt_embeds"),
        ("dmd", "clip_grad"),
        ("schedule", "sigmas"),
    ],
)
def test_a_changed_vector_is_found(case, tensor, tmp_path, capsys):
    entries = json.loads((GOLDEN / "manifest.json").read_text())
    needed = {case} | {entries[case].get(key) for key in ("weights", "teacher", "critic")} - {None}
    (tmp_path / "manifest.json").write_text(json.dumps({name: entries[name] for name in needed}))
    for name in needed:
        shutil.copy(GOLDEN / f"{name}.safetensors", tmp_path)
    tensors = load_file(tmp_path / f"{case}.safetensors")
    changed = tensors[tensor].flatten()
    changed[len(changed) // 2] += 1e-3 * max(1e-3, min(1.0, changed.abs().max().item()))
    tensors[tensor] = changed.view(tensors[tensor].shape)
    save_file(tensors, tmp_path / f"{case}.safetensors")
    assert not check_golden.check(tmp_path)
    assert "ABOVE" in capsys.readouterr().out


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give a folder of golden vectors"):
        check_golden.check(tmp_path)
    (tmp_path / "manifest.json").write_text('{"a": {"kind": "mystery"}}')
    assert not check_golden.check(tmp_path)
