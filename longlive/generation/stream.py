"""Follows cues and yields latents block by block, without end if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from longlive.generation.clock import Mark, clock
from longlive.generation.cues import Cue, Cues
from longlive.generation.dimensions import Timing
from longlive.generation.rollout import BlockAborted, Rollout
from longlive.generation.transition import Transition
from longlive.types import Latents, TextKV


@dataclass
class BlockSeconds:
    """Seconds of one block, by part; `remember` is the clean pass of the block before, unless a switch has made it needless."""

    text: float = 0.0
    switch: float = 0.0
    remember: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0

    @property
    def network(self) -> float:
        """Everything the diffusion transformer did: recache, denoising, the clean pass."""
        return self.switch + self.remember + self.denoise


@dataclass(frozen=True)
class LatentBlock:
    """One block of a video.

    Attributes:
        latents: clean, `[B, F, C, H, W]`.
        latent_frames: their positions in the video.
        cue: the active prompt.
        switched: whether it began with this block.
        marks: when the block began, and when its text, switch, clean pass of the block before, and denoising were done.
    """

    latents: Latents
    latent_frames: range
    cue: Cue
    switched: bool
    marks: Sequence[Mark]

    @cached_property
    def seconds(self) -> BlockSeconds:
        """What the block cost; waits, on a GPU, until its latents are there."""
        return BlockSeconds(*(later.seconds_since(earlier) for earlier, later in pairwise(self.marks)))

    @property
    def ready(self) -> torch.cuda.Event | None:
        """On a GPU, the event after which the latents may be read on another stream."""
        return self.marks[-1].event


def stream(
    rollout: Rollout,
    cues: Cues,
    *,
    project_text: Callable[[str], TextKV],
    noise: Callable[[range], Latents],
    block: int,
    num_latent_frames: int | None = None,
    transition: Transition = Transition(),  # noqa: B008  # frozen
    guided_blocks: int | None = None,
    should_abort: Callable[[], bool] | None = None,
    snapshot: Callable[[], Callable[[], None]] | None = None,
) -> Iterator[LatentBlock]:
    """Make a video of `num_latent_frames` (None: endless), `block` latent frames at a time, from `rollout.end` on.

    Args:
        project_text: text keys and values of a prompt.
        noise: the Gaussian latents of the given frames.
        transition: what a prompt switch does with the past, unless its cue says so itself.
        guided_blocks: how many blocks of each prompt, from where it begins, use the denoiser's guidance; None: all.
        should_abort: whether to abandon a block that does not begin a prompt and start it again, because there is a newer cue.
        snapshot: called before each block; the function it returns restores the state of the noise. Needed with `should_abort`.

    Raises:
        ValueError: when `num_latent_frames` is no multiple of `block`, there is no prompt at the start, or `snapshot` is missing.
        FloatingPointError: when latents are not finite; says in which block and step. On a GPU a block later: the host does not wait.
    """
    if num_latent_frames is not None:
        Timing(block=block).check_blocks(num_latent_frames)
    if should_abort is not None and snapshot is None:
        raise ValueError("should_abort needs snapshot: an abandoned block is made again from the same noise")
    prompt, after, age = None, -1, 0  # the active prompt with its cue; the newest block's first frame; blocks made under the prompt
    check_finite, mark = rollout.finite_check(), clock(rollout.denoiser.network.device)
    while num_latent_frames is None or rollout.end < num_latent_frames:
        frames = range(rollout.end, rollout.end + block)
        marks = [mark()]
        if (new := cues.due(after, frames.start)) is not None:
            prompt, age = (new, project_text(new.prompt)), 0
            marks.append(mark())
            rollout.switch(prompt[1], new.transition or transition)
            marks.append(mark())
        if prompt is None:
            raise ValueError("there is no prompt for the first block")
        (cue, text), marks = prompt, marks if new is not None else marks * 3
        rollout.catch_up()
        marks.append(mark())
        restore = snapshot() if snapshot is not None else lambda: None
        try:  # a block that begins a prompt is never abandoned: its recache has changed the past already
            guided, abort = guided_blocks is None or age < guided_blocks, should_abort if new is None else None
            x0 = rollout.block(noise(frames), text, guided=guided, should_abort=abort)
        except BlockAborted:
            restore()
            continue
        marks.append(mark())
        check_before, check_finite = check_finite, rollout.finite_check()
        (check_finite if marks[-1].event is None else check_before)()
        rollout.defer(x0, text)  # the images need not wait for it, and the last block of a video needs no clean pass
        after, age = frames.start, age + 1
        yield LatentBlock(x0, frames, cue, new is not None, marks)
    check_finite()
