"""Loads the decoder that the programs' setting `decoder` names. Knows nothing of pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from longlive.checkpoints import store
from longlive.models.tiny_vae import TinyVAE
from longlive.types import Decoder, Images, Latents

TINY_FILES = ("tiny_vae", "taew2_1.safetensors", "taew2_1.pth")  # in the folder of a model, in the order in which they are looked for

GIVE = "give a file or a folder that training exported, or decoder=full"


class PartwiseDecoder:
    """A decoder that is given a few latent frames at a time: the same images, with less memory at work."""

    def __init__(self, decoder: Decoder, latent_frames: int) -> None:
        self.decoder, self.latent_frames = decoder, latent_frames

    def decode(self, latents: Latents) -> Images:
        """See `Decoder`."""
        return torch.cat([self.decoder.decode(part) for part in latents.split(self.latent_frames, dim=1)], dim=2)

    def reset(self) -> None:
        """Start a new video."""
        self.decoder.reset()


def load_tiny_vae(path: str | Path, *, dtype: torch.dtype | None = None) -> TinyVAE:
    """A tiny decoder from a folder that training exported, or from a `.pth` or `.safetensors` file in TAEHV's layout for Wan 2.1.

    Of such a file the encoder is ignored. `dtype` None keeps the file's.

    Raises:
        ValueError, FileNotFoundError: with what differs, when the layout or a size is another one; when there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"the tiny decoder {path} does not exist; {GIVE}")
    if path.is_dir() and not ((path / "config.json").is_file() and any(path.glob("*.safetensors"))):
        raise FileNotFoundError(f"{path} holds no tiny decoder (config.json and a .safetensors file); {GIVE}")
    state, config = store.read(path), {}
    if path.is_dir():
        config = {name: value for name, value in json.loads((path / "config.json").read_text()).items() if not name.startswith("_")}
    else:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
        grow = state.get("decoder.7.conv.weight")
        if grow is not None and len(grow) == 512:  # two frames of one, of which only the second is shown
            state["decoder.7.conv.weight"] = grow[256:]
    with torch.device("meta"):
        vae = TinyVAE(**config)
    store.fill(vae, state, what=f"the tiny decoder in {path}", dtype=dtype)
    return vae.eval().requires_grad_(False)


def has_tiny_vae(folder: Path | None) -> bool:
    """Whether there is a tiny decoder in the folder of a model."""
    return folder is not None and any((folder / name).exists() for name in TINY_FILES)


def find_tiny_vae(folder: Path | None) -> Path:
    """The tiny decoder in the folder of a model. Raises ValueError when there is none."""
    found = [folder / name for name in TINY_FILES if (folder / name).exists()] if folder is not None else []
    if not found:
        where = "the pipeline was not loaded from a folder" if folder is None else f"{folder} has none of {', '.join(TINY_FILES)}"
        raise ValueError(f"this model has no tiny decoder ({where}); give its path instead of tiny, or decoder=full")
    return found[0]


def check_fits(tiny: TinyVAE, *, latent_channels: int, spatial_stride: int, images_per_latent: int) -> None:
    """Raises ValueError, with what differs, unless `tiny` decodes such latents."""
    wanted = {"latent channels": latent_channels, "pixels per latent": spatial_stride, "images per latent frame": images_per_latent}
    config = tiny.config
    has = (config["latent_channels"], tiny.spatial_stride, tiny.images_per_latent)
    differing = [f"{value} {name} instead of {wanted[name]}" for name, value in zip(wanted, has, strict=True) if value != wanted[name]]
    if differing:
        raise ValueError(f"the tiny decoder is made for other latents: {', '.join(differing)}")
