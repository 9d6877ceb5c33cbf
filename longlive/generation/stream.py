"""Follows cues and yields latents block by block, without end if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from longlive.generation.cues import Cue, Cues
from longlive.generation.dimensions import Timing
from longlive.generation.rollout import BlockAborted, Rollout
from longlive.generation.transition import Transition
from longlive.types import Latents, TextKV


@dataclass
class Seconds:
    """Wall-clock seconds of one block, by part."""

    text: float = 0.0
    switch: float = 0.0
    denoise: float = 0.0
    remember: float = 0.0
    decode: float = 0.0

    @property
    def network(self) -> float:
        """Everything the diffusion transformer did: recache, denoising, the clean pass."""
        return self.switch + self.denoise + self.remember


@dataclass(frozen=True)
class LatentBlock:
    """One block of a video.

    Attributes:
        latents: clean, `[B, F, C, H, W]`.
        latent_frames: their positions in the video.
        cue: the prompt in force.
        switched: whether it began with this block.
        seconds: what the block cost.
        ready: on a GPU, the event after which the latents may be read on another stream.
    """

    latents: Latents
    latent_frames: range
    cue: Cue
    switched: bool
    seconds: Seconds = field(default_factory=Seconds)
    ready: torch.cuda.Event | None = None


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
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[LatentBlock]:
    """Make a video of `num_latent_frames` (None: endless), `block` latent frames at a time, from `rollout.end` on.

    Args:
        project_text: text keys and values of a prompt.
        noise: the Gaussian latents of the given frames.
        transition: what a prompt switch does with the past, unless its cue says so itself.
        guided_blocks: how many blocks of each prompt, from where it begins, use the denoiser's guidance; None: all.
        should_abort: whether to abandon a block that does not begin a prompt and start it again, because there is a newer cue.
        snapshot: called before each block; the function it returns restores the state of the noise. Needed with `should_abort`.
        now: the clock; on a GPU it must synchronise for the seconds to mean anything.

    Raises:
        ValueError: when `num_latent_frames` is no multiple of `block`, or there is no prompt at the start.
        FloatingPointError: when latents are not finite; says in which block and step.
    """
    if num_latent_frames is not None:
        Timing(block=block).check_blocks(num_latent_frames)
    cue: Cue | None = None
    text: TextKV | None = None
    after, age = -1, 0  # age: blocks made under the prompt in force
    while num_latent_frames is None or rollout.end < num_latent_frames:
        start = rollout.end
        seconds, clock = Seconds(), now()
        new = cues.due(after, start)
        if new is not None:
            text = project_text(new.prompt)
            seconds.text = now() - clock
            clock = now()
            rollout.switch(text, new.transition or transition)
            seconds.switch = now() - clock
            cue, age = new, 0
        if cue is None or text is None:
            raise ValueError("there is no prompt for the first block")
        clock = now()
        frames, guided = range(start, start + block), guided_blocks is None or age < guided_blocks
        restore = snapshot() if snapshot is not None else None
        # A block that begins a prompt is never abandoned: its recache has changed the past already.
        abort = should_abort if new is None and restore is not None else None
        try:
            x0 = rollout.block(noise(frames), text, guided=guided, should_abort=abort)
        except BlockAborted:
            assert restore is not None
            restore()
            continue
        rollout.check_finite()
        seconds.denoise = now() - clock
        made = LatentBlock(x0, frames, cue, new is not None, seconds, _recorded_event(x0))
        clock = now()
        rollout.remember(x0, text)
        seconds.remember = now() - clock
        after, age = start, age + 1
        yield made


def _recorded_event(latents: Latents) -> torch.cuda.Event | None:
    if latents.device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(latents.device))
    return event
