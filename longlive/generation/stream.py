"""Follows cues and yields latents block by block, without end if asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from longlive.generation.active_text import ActiveText, Embeddings
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
        given: whether these latents were not made but given, to begin with.
        marks: when the block began, and when its text, switch, clean pass of the block before, and denoising were done.
    """

    latents: Latents
    latent_frames: range
    cue: Cue
    switched: bool
    marks: Sequence[Mark]
    given: bool = False

    @cached_property
    def seconds(self) -> BlockSeconds:
        """What the block cost; waits, on a GPU, until its latents are there."""
        return BlockSeconds(*(later.seconds_since(earlier) for earlier, later in pairwise(self.marks)))

    @property
    def ready(self) -> torch.cuda.Event | None:
        """On a GPU, the event after which the latents may be read on another stream."""
        return self.marks[-1].event


def _follow(active: ActiveText, new: Cue | None, rollout: Rollout, mark: Callable[[], Mark], marks: list[Mark]) -> tuple[Cue, TextKV, bool]:
    """Switch where the text changes, and make the clean pass that is due, with a mark after each of text, switch and pass.

    Returns the active cue and text, and whether the text has changed.
    """
    change = active.advance(new)
    if active.cue is None or active.text is None:
        raise ValueError("there is no prompt for the first block")
    if change is not None:
        marks.append(mark())
        rollout.switch(active.text, change)
        marks.append(mark())
    else:
        marks *= 3
    rollout.catch_up()
    marks.append(mark())
    return active.cue, active.text, change is not None


def stream(
    rollout: Rollout,
    cues: Cues,
    *,
    project_text: Callable[[str], TextKV],
    noise: Callable[[range], Latents],
    block: int,
    num_latent_frames: int | None = None,
    transition: Transition = Transition(),  # noqa: B008  # frozen
    embeddings: Embeddings | None = None,
    start: Latents | None = None,
    guided_blocks: int | None = None,
    should_abort: Callable[[], bool] | None = None,
    snapshot: Callable[[], Callable[[], None]] | None = None,
) -> Iterator[LatentBlock]:
    """Make a video of `num_latent_frames` (None: endless), `block` latent frames at a time, from `rollout.end` on.

    Args:
        project_text: text keys and values of a prompt.
        noise: the Gaussian latents of the given frames.
        transition: what a prompt switch does with the past, unless its cue says so itself.
        embeddings: for transitions that blend; None: there are none.
        start: clean latents that the video begins with; blocks follow them, and they are yielded first.
        guided_blocks: how many blocks of each prompt, from where it begins, use the denoiser's guidance; None: all.
        should_abort: whether to abandon a block with which the text does not change and start it again, because there is a newer cue.
        snapshot: called before each block; the function it returns restores the state of the noise. Needed with `should_abort`.

    Raises:
        ValueError: when `num_latent_frames` is, beyond `start`, no multiple of `block`, there is no prompt at first, or no `snapshot`.
        FloatingPointError: when latents are not finite; says in which block and step. On a GPU a block later: the host does not wait.
    """
    Timing(block=block).check_blocks(num_latent_frames, after=0 if start is None else start.shape[1])
    if should_abort is not None and snapshot is None:
        raise ValueError("should_abort needs snapshot: an abandoned block is made again from the same noise")
    active, after, age = ActiveText(project_text, embeddings, transition), -1, 0  # the newest block's first frame; blocks under the prompt
    check_finite, mark = rollout.finite_check(), clock(rollout.denoiser.network.device)
    while num_latent_frames is None or rollout.end < num_latent_frames:
        frames, marks = range(rollout.end, rollout.end + block), [mark()]
        if (new := cues.due(after, frames.start)) is not None:
            age = 0
        cue, text, changed = _follow(active, new, rollout, mark, marks)
        if start is not None and frames.start == 0:
            rollout.defer(start, text)
            after = 0
            yield LatentBlock(start, range(start.shape[1]), cue, True, [*marks, marks[-1]], given=True)
            continue
        restore = snapshot() if snapshot is not None else lambda: None
        try:  # a block with which the text changes is never abandoned: its recache has changed the past already
            guided = guided_blocks is None or age < guided_blocks
            x0 = rollout.block(noise(frames), text, guided=guided, should_abort=None if changed else should_abort)
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
