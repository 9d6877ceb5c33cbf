"""Which thread makes the blocks of a video that is written to a file."""

import threading

import pytest
import torch

from longlive import video
from longlive.config import InferenceConfig
from longlive.generation.cues import PromptQueue, PromptSchedule
from longlive.generation.pipeline import LongLivePipeline
from longlive.programs.inference import make
from longlive.programs.loading import VideoRequest


@pytest.mark.parametrize("typed", [False, True], ids=["planned", "typed"])
def test_planned_blocks_are_made_while_the_one_before_is_decoded_and_typed_ones_are_not(tiny, tmp_path, typed):
    """Either way the same video; only a prompt that is typed would be shown a block later."""
    pipe, threads = LongLivePipeline.from_pretrained(tiny), set()
    pipe.transformer.register_forward_pre_hook(lambda *_: threads.add((threading.current_thread().name, torch.get_num_threads())))
    prompts = PromptQueue("a red circle") if typed else PromptSchedule.single("a red circle")
    request = VideoRequest(3, prompts, 9, tmp_path / "a.mp4", {"relative_rope": False})
    here = threading.current_thread().name, torch.get_num_threads()
    make(InferenceConfig(model=str(tiny), crf=0), request, pipe, torch.device("cpu"), quiet=True)
    assert threads == ({here} if typed else {("blocks_0", here[1])})
    with (
        pipe.session("a red circle", num_latent_frames=9, seed=3) as session,
        video.VideoWriter(tmp_path / "b.mp4", scale=8, crf=0) as writer,
    ):
        for block in session:
            writer.write(block.images[0])
    assert (video.read_video(tmp_path / "a.mp4") == video.read_video(tmp_path / "b.mp4")).all()
