"""Where the configurations are that come with the package: in the repository, or inside the installed package."""

from __future__ import annotations

from pathlib import Path

INSTALLED = Path(__file__).parents[1] / "configs"
CONFIGS = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[2] / "configs"


def find_config(path: str) -> str:
    """The path of a configuration: `path` itself if that exists, else the one of that name that comes with the package, if there is one:
    `configs/inference.yaml` and `inference.yaml` work in every folder.
    """
    if Path(path).exists():
        return path
    ours = CONFIGS / Path(path).as_posix().removeprefix("configs/")
    return str(ours) if ours.is_file() else path
