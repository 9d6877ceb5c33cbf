"""Text embeddings computed once and stored on disk, so that the text encoder need not be in memory during training.

`<folder>/<name>/3f/3fa9….safetensors`: one file per prompt, named after the SHA-256 of the normalised prompt, in 256 folders. With one
file per prompt there is no index to maintain, ranks that write at the same time need no lock, a killed run continues with the next prompt,
and a batch reads only its own rows. For Wan2.1 a file has about a megabyte, so their number is no problem. Knows nothing about which
prompts belong together or when they are drawn.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from longlive.files import replacing
from longlive.models.text import TextEncoder, normalize_prompt
from longlive.types import Text

ARCHITECTURE = (
    "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
PROBE = "Two cats’ café, n°5: “a slow pan”   over naïve 猫 🔴"  # its tokens depend on normalisation and unknown characters


class _Stored(NamedTuple):
    tokens: Float[Tensor, "N E"]  # without padding
    length: int  # L, with padding


def fingerprint(encoder: TextEncoder) -> str:
    """16 hexadecimal digits that identify an encoder: architecture, some values of every weight, vocabulary, text length, number types.

    Independent of the encoder's folder and device. Cheap: about twenty values of each weight are read.
    """
    config = encoder.encoder.config.to_dict()
    digest = hashlib.sha256(json.dumps({name: config[name] for name in ARCHITECTURE}).encode())
    vocabulary = sorted(encoder.tokenizer.get_vocab().items())
    digest.update(json.dumps([vocabulary, encoder.tokenizer(PROBE).input_ids, encoder.text_len, str(encoder.dtype)]).encode())
    for name, parameter in encoder.encoder.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        some = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // 16)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def address(prompt: str) -> str:
    """The name under which a prompt's embedding is stored: SHA-256 of the normalised prompt."""
    return hashlib.sha256(normalize_prompt(prompt).encode()).hexdigest()


class TextEmbeddings:
    """Prompts to embeddings, on the CPU, in the dtype of `encode`; a stored prompt is not encoded again.

    Args:
        folder: where they are stored, for any number of encoders and runs; None: in memory.
        encode: normalised prompts to `[B, L, E]`, zero after the end of each prompt: `TextEncoder.encode`. It may be set to None after
            `prepare` was given all prompts, and be None from the start when all are stored.
        name: of the encoder's sub-folder: `fingerprint(encoder)`.
    """

    def __init__(self, folder: str | Path | None, encode: Callable[[Sequence[str]], Text] | None, *, name: str) -> None:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} is not a valid folder name; give fingerprint(encoder), or letters, digits, . _ -")
        self.encode = encode
        self._folder = None if folder is None else Path(folder) / name
        self._memory: dict[str, _Stored] = {}

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Embeddings of `prompts`, padded with zeros; missing ones are encoded and stored.

        Raises ValueError when one is missing and there is no encoder, and for a file that is damaged or of another encoder.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise ValueError("no prompt to look up; give at least one")
        missing = self._missing(prompts)
        if missing:
            self._encode(missing)
        stored = [self._read(address(prompt)) for prompt in prompts]
        kinds = {(one.length, one.tokens.shape[1], one.tokens.dtype) for one in stored}
        if len(kinds) > 1:
            raise ValueError(f"the embeddings in {self._folder} are not all of one encoder (length, width, dtype: {kinds}); delete it")
        (length, width, dtype) = kinds.pop()
        text = torch.zeros(len(stored), length, width, dtype=dtype)
        for row, one in zip(text, stored):
            row[: len(one.tokens)] = one.tokens
        return text

    def prepare(self, prompts: Sequence[str], *, batch: int) -> int:
        """Encode the missing ones of `prompts`, `batch` at a time; returns how many. Each of several ranks may be given its own share.

        Raises ValueError when one is missing and there is no encoder.
        """
        if batch < 1:
            raise ValueError(f"batch {batch}: at least one prompt at a time")
        missing = list(self._missing(prompts).items())
        with tqdm(total=len(missing), desc="text embeddings", unit=" prompts", mininterval=5, disable=not missing) as progress:
            for start in range(0, len(missing), batch):
                self._encode(dict(missing[start : start + batch]))
                progress.update(len(missing[start : start + batch]))
        return len(missing)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.safetensors"

    def _missing(self, prompts: Sequence[str]) -> dict[str, str]:
        """Address and prompt of those that are not stored, without duplicates."""
        wanted = {address(prompt): prompt for prompt in dict.fromkeys(prompts)}
        return {
            key: prompt for key, prompt in wanted.items() if not (key in self._memory if self._folder is None else self._path(key).exists())
        }

    def _encode(self, missing: dict[str, str]) -> None:
        prompts = list(missing.values())
        if self.encode is None:
            raise ValueError(
                f"{len(prompts)} prompts have no embedding in {self._folder or 'memory'} and there is no encoder, the first: "
                f'"{prompts[0][:80]}"; call prepare() with all prompts before the encoder is released'
            )
        text = self.encode(prompts).detach()
        if text.ndim != 3 or len(text) != len(prompts):
            raise ValueError(f"the encoder returned {tuple(text.shape)} for {len(prompts)} prompts, not [{len(prompts)}, L, E]")
        for (key, prompt), row in zip(missing.items(), text.cpu()):
            if not row.isfinite().all():
                raise ValueError(f'the embedding of "{prompt[:80]}" has values that are not finite; is the encoder in float16?')
            said = row.ne(0).any(dim=-1).nonzero()
            end = int(said[-1]) + 1 if len(said) else 0
            self._store(key, _Stored(row[:end].clone(), len(row)))

    def _store(self, key: str, stored: _Stored) -> None:
        if self._folder is None:
            self._memory[key] = stored
            return
        with replacing(self._path(key)) as partial:  # several ranks may write the same prompt
            partial.write_bytes(save({"text": stored.tokens}, {"length": str(stored.length)}))

    def _read(self, key: str) -> _Stored:
        if self._folder is None:
            return self._memory[key]
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                return _Stored(file.get_tensor("text"), int(file.metadata()["length"]))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and it is encoded again") from error
