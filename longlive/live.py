"""The command `longlive live`, and interactive_inference.py: prompts are typed, into a terminal or into the page in a browser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from longlive.config import InferenceConfig, ServeConfig
from longlive.programs import inference
from longlive.programs.configs import CONFIGS
from longlive.programs.status import exit_status

DESCRIPTION = "Makes a video whose prompt changes on the way: as a file of prompts says, or as you type."
DEFAULT_CONFIG = CONFIGS / "miniature" / "interactive_inference.yaml"


def page_settings(config: InferenceConfig) -> ServeConfig:
    """The settings of a server for one person, who watches the page. Raises ValueError for settings that the page has itself."""
    usual = InferenceConfig()
    files = {"output": config.output, "scale": config.scale}
    video = dataclasses.replace(config, show=None, output=usual.output, scale=None, switch_frame_indices=None)
    lengths = ("seconds", "num_latent_frames", "num_frames")
    if any(getattr(video, name) is not None for name in lengths):  # of the configuration of a video: a session ends when it is told to
        video = dataclasses.replace(video, **dict.fromkeys(lengths))
    return ServeConfig(video=video, port=0, open_page=True, **files)


def main(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    def command() -> int:
        config = inference.parse(words, prog=prog, description=DESCRIPTION, default_config=DEFAULT_CONFIG)
        if config.show == "page":
            from longlive.serving.__main__ import serve  # needs what `pip install 'longlive[serve]'` brings

            return serve(page_settings(config))
        inference.run(config, interactive=True)
        return 0

    return exit_status(command, interrupted="interrupted; what was made so far is in its folder")
