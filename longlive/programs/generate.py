"""The command `longlive generate`, and inference.py."""

from __future__ import annotations

from collections.abc import Sequence

from longlive.programs import inference
from longlive.programs.configs import CONFIGS

DESCRIPTION = "Makes videos from prompts, each of any length, each prompt in a file a video of its own."


def main(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    return inference.main(words, prog=prog, description=DESCRIPTION, default_config=CONFIGS / "miniature" / "inference.yaml")
