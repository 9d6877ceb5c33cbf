"""Released weights by their name on the Hugging Face hub: said what they are, downloaded once, then read from the cache.

Uses `huggingface_hub`, and with it its cache, its token and its offline mode (`HF_HUB_OFFLINE=1`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

log = logging.getLogger(__name__)

WAN = "Wan-AI/Wan2.1-T2V-1.3B"


class Release(NamedTuple):
    """A model in the layout of LongLive's release: what is needed of its repository, and the one with text encoder and VAE."""

    checkpoint: str = "models/longlive_base.pt"
    lora: str | None = "models/lora.pt"
    wan: str = WAN
    wan_files: tuple[str, ...] = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/*")

    @property
    def files(self) -> tuple[str, ...]:
        """What is needed of the model's own repository."""
        return (self.checkpoint,) if self.lora is None else (self.checkpoint, self.lora)


RELEASES = {
    "Efficient-Large-Model/LongLive-1.3B": Release(),
    "gdhe17/Self-Forcing": Release(checkpoint="checkpoints/self_forcing_dmd.pt", lora=None),
}


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form `owner/repository` and no such folder exists."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None and not Path(name).exists()


def fetch(name: str, files: Sequence[str] = ("*",), **options: Any) -> Path:
    """The folder in the hub's cache with these files of a repository, downloaded with a progress bar if they are not all there.

    Before a download the model's licence and the bytes are logged, as a warning, so that they are seen. `options`: of `snapshot_download`
    (cache_dir, revision, token, local_files_only, force_download).

    Raises:
        ValueError: when the repository does not exist or lacks a file, or cannot be reached and is not in the cache.
    """
    force, offline = options.get("force_download", False), options.get("local_files_only", False) or constants.HF_HUB_OFFLINE
    if not force:
        try:
            cached: dict[str, Any] = options | {"local_files_only": True}
            folder = Path(snapshot_download(name, allow_patterns=list(files), **cached))
            if not _missing(folder, files):
                return folder
        except LocalEntryNotFoundError:
            pass
    if offline:
        raise ValueError(f"{name} is not complete in the cache, and downloads are turned off; {_by_hand(name)}")
    try:
        info = model_info(name, revision=options.get("revision"), token=options.get("token"), files_metadata=True)
        sizes = [file.size or 0 for file in info.siblings or () if any(fnmatch(file.rfilename, pattern) for pattern in files)]
        licence = (info.card_data.get("license") if info.card_data is not None else None) or "not stated"
        log.warning("downloading %s: %.1f GB, licence %s (https://huggingface.co/%s)", name, sum(sizes) / 1e9, licence, name)
        folder = Path(snapshot_download(name, allow_patterns=list(files), **options))
    except RepositoryNotFoundError as error:
        raise ValueError(f"there is no model {name} on the hub, or it needs a token; nor is there a folder of this name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"{name} could not be downloaded: {str(error).splitlines()[0]}; {_by_hand(name)}") from error
    if missing := _missing(folder, files):
        raise ValueError(f"{name} has no {', '.join(missing)}")
    return folder


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    return [pattern for pattern in files if not any(folder.glob(pattern))]


def _by_hand(name: str) -> str:
    return f"download it where there is a network with: hf download {name}"
