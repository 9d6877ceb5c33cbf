"""Where the real `vbench` lives: an environment of its own, since it pins other versions than ours, and the weights it wants.

The border between it and us is a folder of videos and JSON files. `scripts/setup_vbench.sh` makes the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from longlive.provenance import ROOT

VERSION = "0.1.5"
SET_UP = "bash scripts/setup_vbench.sh"
ASK = """
import importlib.metadata, importlib.util, json, platform
names = ("vbench", "torch", "torchvision", "transformers", "numpy", "opencv-python", "decord", "timm", "pyiqa", "detectron2", "dreamsim")
found = {"python": platform.python_version()}
for name in names:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
import torch
gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print(json.dumps({"versions": found, "gpus": gpus}))
"""


class Weight(NamedTuple):
    """A file that a dimension reads, where it has to lie (below the cache folder), and where it comes from."""

    path: str
    source: str


CLIP_B = Weight(
    "clip_model/ViT-B-32.pt",
    "https://openaipublic.azureedge.net/clip/models/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
)
CLIP_L = Weight(
    "clip_model/ViT-L-14.pt",
    "https://openaipublic.azureedge.net/clip/models/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
)
RAFT = Weight(
    "raft_model/models/raft-things.pth", "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip (unpack it in {cache}/raft_model)"
)
GRIT = Weight(
    "grit_model/grit_b_densecap_objectdet.pth", "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth"
)
BERT = Weight(
    "huggingface/hub/models--bert-base-uncased",
    "HF_HOME={cache}/huggingface hf download bert-base-uncased config.json tokenizer_config.json vocab.txt model.safetensors",
)
VICLIP = Weight(
    "ViCLIP/ViClip-InternVid-10M-FLT.pth",
    "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth",
)
DINO_CODE = Weight(
    "dino_model/facebookresearch_dino_main/hubconf.py",
    "git clone https://github.com/facebookresearch/dino {cache}/dino_model/facebookresearch_dino_main",
)
DINO = Weight(
    "dino_model/dino_vitbase16_pretrain.pth", "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
)
DREAMSIM = (
    "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_ensemble_checkpoint.zip "
    "(unpack it in {cache}/dreamsim)"
)
DETECTED = (GRIT, BERT)
WEIGHTS: dict[str, tuple[Weight, ...]] = {
    "subject_consistency": (DINO_CODE, DINO),
    "background_consistency": (CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": (Weight("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth"),),
    "dynamic_degree": (RAFT,),
    "aesthetic_quality": (
        CLIP_L,
        Weight(
            "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
            "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
        ),
    ),
    "imaging_quality": (
        Weight(
            "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
            "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        ),
    ),
    "object_class": DETECTED,
    "multiple_objects": DETECTED,
    "color": DETECTED,
    "spatial_relationship": DETECTED,
    "human_action": (
        Weight(
            "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",
            "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main/l16_ptk710_ftk710_ftk400_f16_res224.pth",
        ),
    ),
    "scene": (
        Weight(
            "caption_model/tag2text_swin_14m.pth",
            "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
        ),
        BERT,
    ),
    "appearance_style": (CLIP_B,),
    "temporal_style": (VICLIP,),
    "overall_consistency": (VICLIP,),
}
SLOW_FAST_WEIGHTS: dict[str, tuple[Weight, ...]] = {  # of VBench-Long's comparison across clips, where it is asked for
    "subject_consistency": (
        Weight("torch/hub/facebookresearch_dinov2_main/hubconf.py", "git clone https://github.com/facebookresearch/dinov2 to that folder"),
        Weight(
            "torch/hub/checkpoints/dinov2_vitb14_pretrain.pth",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        ),
    ),
    "background_consistency": (
        DINO_CODE,
        DINO,
        Weight("dreamsim/dino_vitb16_pretrain.pth", DREAMSIM),
        Weight("dreamsim/clip_vitb16_pretrain.pth.tar", DREAMSIM),
        Weight("dreamsim/open_clip_vitb16_pretrain.pth.tar", DREAMSIM),
        Weight("dreamsim/ensemble_lora/adapter_config.json", DREAMSIM),
    ),
}
PACKAGES = {dimension: "detectron2" for dimension in ("object_class", "multiple_objects", "color", "spatial_relationship")}
DETECTRON2 = "git+https://github.com/facebookresearch/detectron2.git"


def cache_folder() -> Path:
    """Where weights lie: $VBENCH_CACHE_DIR, else ~/.cache/vbench, as vbench itself has it."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


class VBenchEnvironment(NamedTuple):
    """A virtual environment with vbench in it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def full_info(self) -> Path:
        """VBench's list of prompts. Raises ValueError when the environment is not there."""
        found = sorted(self.folder.glob("lib/python3*/site-packages/vbench/VBench_full_info.json"))
        if not found:
            raise ValueError(f"there is no vbench in {self.folder}; set it up with: {SET_UP}")
        return found[0]

    def describe(self) -> dict[str, Any]:
        """Versions of what is in it, and the GPUs it sees. Raises ValueError when it does not work."""
        if not self.python.exists():
            raise ValueError(f"there is no environment for vbench at {self.folder}; set it up with: {SET_UP}")
        done = subprocess.run([str(self.python), "-c", ASK], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"the environment {self.folder} does not work; set it up anew with: {SET_UP}\n{done.stderr.strip()[-600:]}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if (version := found["versions"].get("vbench")) != VERSION:
            raise ValueError(f"{self.folder} has vbench {version}; {VERSION} is wanted: {SET_UP}")
        return found


def default_environment() -> VBenchEnvironment:
    """$LONGLIVE_VBENCH, else `.venv-vbench` beside the package."""
    return VBenchEnvironment(Path(os.environ.get("LONGLIVE_VBENCH") or ROOT / ".venv-vbench"))


def lacking(dimension: str, versions: dict[str, str], *, slow_fast: bool = False, static_filter: bool = False) -> list[str]:
    """What a dimension needs that is not there, a line each: packages, and files with where they come from and belong."""
    cache = cache_folder()
    lines = []
    if (package := PACKAGES.get(dimension)) and package not in versions:
        lines.append(f"the package {package}: {{python}} -m pip install --no-build-isolation {DETECTRON2} (it is compiled; CUDA toolkit)")
    wanted = WEIGHTS[dimension] + (SLOW_FAST_WEIGHTS.get(dimension, ()) if slow_fast else ()) + ((RAFT,) if static_filter else ())
    for weight in wanted:
        if not (cache / weight.path).exists():
            lines.append(f"{cache / weight.path}  from  {weight.source.format(cache=cache)}")
    return lines
