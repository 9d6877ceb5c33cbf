"""The recorded vectors, and a checker that can fail."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "scripts"))
import check_golden  # noqa: E402


def test_every_vector_agrees(capsys):
    assert check_golden.check(GOLDEN)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(json.loads((GOLDEN / "manifest.json").read_text()))


def test_recorded_passes_agree(monkeypatch):
    """The shortest of `test_every_vector_agrees_with_the_engine`."""
    folder, engine = check_golden.Folder(GOLDEN), check_golden.ENGINES["recorded"]()
    case = check_golden.Case(folder, "single_full_attention", engine)
    with torch.no_grad():
        assert max(case.rollout()) <= check_golden.TOLERANCE
    assert case.num_passes == 4  # of the only block that sees a full window
    monkeypatch.setattr(check_golden.SteadyPasses, "_is_steady", lambda *_: False)
    with pytest.raises(ValueError, match="no pass was compiled or recorded"), torch.no_grad():
        list(check_golden.Case(folder, "single_full_attention", engine).rollout())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["recorded", "compiled"])
def test_every_vector_agrees_with_the_engine(engine, capsys, caplog):
    try:
        made = check_golden.ENGINES[engine]()
    except ValueError as reason:
        pytest.skip(str(reason))
    assert check_golden.check(GOLDEN, made)
    rollouts = [line for line in capsys.readouterr().out.splitlines() if " rollout " in line]
    assert len(rollouts) == 5 and all("passes through the engine" in line for line in rollouts)
    assert "not compiled" not in caplog.text


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
