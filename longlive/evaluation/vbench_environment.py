"""The separate environment of the real `vbench`, which pins other versions than ours, and the weights that it needs.

The interface between it and us is a folder of videos and JSON files. `scripts/setup_vbench.sh` creates the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection
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
    """A file that some dimensions read: its path below the cache folder, and its source. `slow_fast`: dimensions that read it only for
    VBench-Long's comparison across clips."""

    path: str
    source: str
    dimensions: Collection[str] = ()
    slow_fast: Collection[str] = ()


WEIGHTS = [Weight(**json.loads(line)) for line in Path(__file__).with_name("vbench_weights.jsonl").read_text(encoding="utf-8").splitlines()]
NEEDS_DETECTRON2 = ("object_class", "multiple_objects", "color", "spatial_relationship")
DETECTRON2 = "--no-build-isolation git+https://github.com/facebookresearch/detectron2.git"


def cache_folder() -> Path:
    """The folder of the weights: $VBENCH_CACHE_DIR, else ~/.cache/vbench, as in vbench itself."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


class VBenchEnvironment(NamedTuple):
    """A virtual environment that contains vbench."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def full_info(self) -> Path:
        """VBench's list of prompts. Raises ValueError when the environment does not exist."""
        paths = sorted(self.folder.glob("lib/python3*/site-packages/vbench/VBench_full_info.json"))
        if not paths:
            raise ValueError(f"there is no vbench in {self.folder}; set it up with: {SET_UP}")
        return paths[0]

    def describe(self) -> dict[str, Any]:
        """`{"versions": {package: version}, "gpus": [name]}`. Raises ValueError when the environment is missing or broken."""
        if not self.python.exists():
            raise ValueError(f"there is no environment for vbench at {self.folder}; set it up with: {SET_UP}")
        done = subprocess.run([str(self.python), "-c", ASK], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"the environment {self.folder} does not work; set it up again with: {SET_UP}\n{done.stderr.strip()[-600:]}")
        described = json.loads(done.stdout.strip().splitlines()[-1])
        if (version := described["versions"].get("vbench")) != VERSION:
            raise ValueError(f"{self.folder} has vbench {version} instead of {VERSION}: {SET_UP}")
        return described

    def lacking(self, dimension: str, packages: Collection[str], *, slow_fast: bool, static_filter: bool) -> list[str]:
        """Missing requirements of a dimension, one line each: packages with their command, and files with their place and source."""
        lines = []
        if dimension in NEEDS_DETECTRON2 and "detectron2" not in packages:
            lines.append(f"the package detectron2: {self.python} -m pip install {DETECTRON2} (it is compiled, with the CUDA toolkit)")
        readers = {dimension} | ({"dynamic_degree"} if static_filter else set())  # the filter is by RAFT, as dynamic degree is
        for weight in WEIGHTS:
            wanted = not readers.isdisjoint(weight.dimensions) or (slow_fast and dimension in weight.slow_fast)
            if wanted and not (file := cache_folder() / weight.path).exists():
                lines.append(f"{file}  from  {weight.source.format(cache=cache_folder())}")
        return lines


def default_environment(folder: Path | None = None) -> VBenchEnvironment:
    """The one in `folder`, else in $LONGLIVE_VBENCH, else in `.venv-vbench` beside the package."""
    return VBenchEnvironment(folder or Path(os.environ.get("LONGLIVE_VBENCH") or ROOT / ".venv-vbench"))
