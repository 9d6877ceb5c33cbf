"""Which files a model's weights come from, and their digests, which are computed once for a file as it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive.checkpoints.lora import ADAPTER_CONFIG, lora_files
from longlive.checkpoints.store import WEIGHTS
from longlive.config import InferenceConfig
from longlive.files import digest_of, file_digest, read_json_if_whole, write_json
from longlive.generation.decoders import find_tiny_vae
from longlive.generation.pipeline import BUNDLED

log = logging.getLogger(__name__)

REMEMBERED = 16 * 2**20  # bytes from which on the digest of a file is remembered; smaller ones are read in no time


def model_folder(config: InferenceConfig) -> Path:
    """The folder that the settings name."""
    if config.wan_dir is not None:
        return Path(config.wan_dir)
    return BUNDLED.get(config.model or "miniature") or Path(str(config.model))


def weight_files(config: InferenceConfig) -> list[Path]:
    """The files that the model's weights come from."""
    place = model_folder(config)
    files = [file for file in sorted(place.rglob("*")) if file.suffix in WEIGHTS and file.is_file()]
    if config.wan_dir is not None:  # its transformer is replaced by the checkpoint
        files = [file for file in files if not file.name.startswith("diffusion_pytorch_model")]
    elif (config.model or "miniature") in BUNDLED:
        files = [file for file in files if "teacher" not in file.parts]
    decoder = None if config.decoder == "full" else find_tiny_vae(place) if config.decoder == "tiny" else config.decoder
    loras = [Path(lora.path) for lora in lora_files(config.lora)]
    beside = [path.parent / ADAPTER_CONFIG for path in loras if path.stem == "adapter_model"]  # it says how strong the LoRA is
    loras += [path for path in beside if path.is_file()]
    for path in (*map(Path, filter(None, (config.checkpoint, decoder))), *loras):
        files += [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    return list(dict.fromkeys(files))


def describe_weights(files: Sequence[Path], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name, bytes, time of change and digest of every file; one that is `known` by the first three is not read again."""
    descriptions = []
    for file in files:
        status = file.stat()
        facts = {"file": str(file), "bytes": status.st_size, "changed": int(status.st_mtime)}
        before = next((description for description in known if facts.items() <= description.items()), None)
        descriptions.append(before or facts | {"sha256": file_digest(file)})
    return descriptions


def weights_digest(config: InferenceConfig) -> str:
    """A short digest of all weights, wherever they lie. That of a large file is remembered until its size or time changes."""
    files, store = weight_files(config), cache_folder() / "weights.json"
    remembered = read_json_if_whole(store)
    known: dict[str, list[Any]] = remembered if isinstance(remembered, dict) else {}
    digests, added = [], {}
    for file in files:
        status = file.stat()
        name, facts = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        if known.get(name, [])[:2] == facts:
            digests.append(known[name][2])
            continue
        if status.st_size >= REMEMBERED:
            log.info("reading %s once, to know it again (%.1f GB)", file, status.st_size / 1e9)
        digests.append(file_digest(file))
        if status.st_size >= REMEMBERED:
            added[name] = [*facts, digests[-1]]
    if added:
        try:
            write_json(store, known | added)
        except OSError as error:
            log.warning("the digests of the weights are not remembered: %s", error)
    return digest_of(digests)


def cache_folder() -> Path:
    """Where this program keeps what it can compute again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longlive"
