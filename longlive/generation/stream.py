"""Follows cues and yields latents block by block, for ever if asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from longlive.generation.cues import Cue, Cues
from longlive.generation.dimensions import check_whole_blocks
from longlive.generation.rollout import BlockAborted, Rollout
from longlive.types import Latents, TextKV


@dataclass
class Seconds:
    """Wall seconds that one block took, by part."""

    text: float = 0.0
    switch: float = 0.0
    denoise: float = 0.0
    remember: float = 0.0
    decode: float = 0.0

    @property
    def network(self) -> float:
        """All that the diffusion transformer did: recache, denoising, the clean pass."""
        return self.switch + self.denoise + self.remember


@dataclass(frozen=True)
class LatentBlock:
    """One block of a video: clean latents `[B, K, C, H, W]`, their frames, the cue in force and whether it began here."""

    latents: Latents
    frames: range
    cue: Cue
    switched: bool
    seconds: Seconds = field(default_factory=Seconds)


def stream(
    rollout: Rollout,
    cues: Cues,
    *,
    read: Callable[[str], TextKV],
    noise: Callable[[range], Latents],
    block: int,
    num_latent_frames: int | None = None,
    keep_sink: bool = True,
    guided_blocks: int | None = None,
    should_abort: Callable[[], bool] | None = None,
    mark: Callable[[], Callable[[], None]] | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[LatentBlock]:
    """Make a video of `num_latent_frames` (None: endless), `block` frames at a time, from `rollout.end` on.

    Args:
        read: text keys and values of a prompt.
        noise: the Gaussian latents of the given frames.
        keep_sink: what a cue that does not say does with the sink.
        guided_blocks: how many blocks of each prompt, from where it begins, use the denoiser's guidance; None: all.
        give_up: whether a block that does not begin a prompt should be dropped and begun anew, since there is a newer cue.
        mark: called before each block; what it returns takes the noise back to where it was. Needed with `should_abort`.
        now: the clock, which on a GPU must wait for the device.

    Raises:
        ValueError: when `num_latent_frames` is no multiple of `block`, or no prompt is there at the start.
        FloatingPointError: when latents are not finite; says in which block and step.
    """
    if num_latent_frames is not None:
        check_whole_blocks(num_latent_frames, block)
    cue: Cue | None = None
    text: TextKV | None = None
    after, age = -1, 0  # age: blocks made under the prompt in force
    while num_latent_frames is None or rollout.end < num_latent_frames:
        start = rollout.end
        seconds, clock = Seconds(), now()
        new = cues.due(after, start)
        if new is not None:
            text = read(new.prompt)
            seconds.text = now() - clock
            clock = now()
            rollout.switch(text, keep_sink=keep_sink if new.keep_sink is None else new.keep_sink)
            seconds.switch = now() - clock
            cue, age = new, 0
        if cue is None or text is None:
            raise ValueError("there is no prompt for the first block")
        clock = now()
        frames, guided = range(start, start + block), guided_blocks is None or age < guided_blocks
        back = mark() if mark is not None else None
        try:
            # A block that begins a prompt is never given up: its recache has changed what lies behind.
            x0 = rollout.block(noise(frames), text, guided=guided, should_abort=should_abort if new is None and back is not None else None)
        except BlockAborted:
            assert back is not None
            back()
            continue
        rollout.check_finite()
        seconds.denoise = now() - clock
        made = LatentBlock(x0, frames, cue, new is not None, seconds)
        clock = now()
        rollout.remember(x0, text)
        seconds.remember = now() - clock
        after, age = start, age + 1
        yield made
