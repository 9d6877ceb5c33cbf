"""`inference.py` without arguments: the bundled miniature shows what its prompts say, as the oracle reads the mp4 files."""

import json
from pathlib import Path

import torch

from longlive import video
from longlive.config import InferenceConfig
from longlive.generation.prompt_files import read_scripts
from longlive.miniature import oracle
from longlive.miniature.captions import parse
from longlive.miniature.world import ATTRIBUTES, Captioned
from longlive.programs import inference as programs
from longlive.settings import load

CONFIGS = Path(__file__).parents[2] / "configs" / "miniature"


def test_prompts_name_everything_the_world_has():
    files = [load(InferenceConfig, CONFIGS / "inference.yaml").prompts, CONFIGS / "interactive_prompts.jsonl"]
    for prompt in (prompt for file in files for script in read_scripts(file) for prompt in script.prompts):
        assert parse(prompt).keys() == ATTRIBUTES.keys(), prompt


def test_a_person_recognises_the_prompts(tmp_path):
    argv = ["--output", str(tmp_path), "--seconds", "3", "scale=1", "device=cpu"]
    assert programs.main(argv, description="a test", default_config=CONFIGS / "inference.yaml") == 0
    right = []
    for path in sorted(tmp_path.glob("*.mp4")):
        (entry,) = json.loads(path.with_suffix(".json").read_text())["prompts"]
        images = torch.from_numpy(video.read_video(path)).permute(0, 3, 1, 2)[None]
        shown = oracle.read(images).correct([Captioned(**parse(entry["prompt"]))])
        right.append([bool(shown[name]) for name in ("color", "background")])
    assert len(right) == 3 and sum(map(all, right)) >= 2
