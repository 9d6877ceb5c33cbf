"""A running video: iterate for decoded frames; prompt, pause, restart or stop it from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import UInt8
from torch import Tensor

from longlive.generation.cues import Cue, Cues, PromptQueue, PromptSchedule
from longlive.generation.stream import LatentBlock, Seconds
from longlive.generation.timeline import Timeline
from longlive.models.vae import StreamDecoder
from longlive.types import Latents


@dataclass(frozen=True)
class DecodedBlock:
    """The images of one block.

    `images`: uint8 `[B, T, Y, X, 3]` on the CPU; `frames`: its latent frames; `prompt`: in force; `switched`: it began with
    this block; `seconds`: what the block cost, by part; `take`: how often the session had been restarted.
    """

    images: UInt8[Tensor, "B T Y X 3"]
    frames: range
    prompt: str
    switched: bool
    seconds: Seconds
    take: int = 0


class LivePrompts:
    """Cues of a plan, unless somebody has typed a prompt since the last block."""

    def __init__(self, plan: Cues) -> None:
        self._plan, self._typed = plan, PromptQueue.empty()

    def put(self, prompt: str, keep_sink: bool | None) -> None:
        self._typed.put(prompt, keep_sink)

    @property
    def pending(self) -> bool:
        """Whether something was typed since the last block began."""
        return self._typed.pending

    def typed(self) -> Cue | None:
        """What was typed last and has not been in force yet; it counts as taken."""
        return self._typed.due(-1, 0)

    def due(self, after: int, until: int) -> Cue | None:
        planned, typed = self._plan.due(after, until), self._typed.due(after, until)
        return planned if typed is None else typed


class Take:
    """One video of a session, from its first block to its last or to a restart."""

    def __init__(self, number: int, cues: LivePrompts, made: Iterable[LatentBlock], decoder: StreamDecoder, timeline: Timeline) -> None:
        self.number, self.cues, self.timeline = number, cues, timeline
        self._made, self._decoder = iter(made), decoder

    def advance(self) -> LatentBlock | None:
        """The next block; None at the video's end."""
        made = next(self._made, None)
        if made is not None:
            if made.switched:
                self.timeline.cues.append(replace(made.cue, frame=made.frames.start))
            self.timeline.num_latent_frames = made.frames.stop
        return made

    @torch.no_grad()
    def decode(self, made: LatentBlock) -> DecodedBlock:
        """Its images; blocks must come in their order."""
        began = time.perf_counter()
        with _beside(made.latents):
            decoded = self._decoder.decode(made.latents)
            images = ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).cpu()  # waits for them
        made.seconds.decode = time.perf_counter() - began
        return DecodedBlock(images, made.frames, made.cue.prompt, made.switched, made.seconds, self.number)


@lru_cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _beside(latents: Latents) -> AbstractContextManager[object]:
    """On a GPU: before what another thread has queued for the next block, or an image would wait until that block is made.

    The latents are there: whoever made them has waited for the device to know how long it took.
    """
    if latents.device.type != "cuda":
        return nullcontext()
    stream = _decoding_stream(latents.device)
    latents.record_stream(stream)
    return torch.cuda.stream(stream)


class Session:
    """Yields a `DecodedBlock` a block; made by `LongLivePipeline.session`. Usable as a context, which stops it at its end.

    Generation happens in the thread that iterates, and only when it asks: a slow consumer slows generation. With `ahead` it
    happens in a thread of the session's own, one block ahead, so that a block is made while the one before is decoded and used; a
    new prompt then shows a block later. Whoever shares one model among sessions calls `advance` and `decode` himself.

    Args:
        begin: makes the take of a number, with these cues and this seed.
        prepare: begins to read a prompt that will be needed, on the side.
    """

    def __init__(
        self,
        begin: Callable[[int, LivePrompts, int], Take],
        cues: Cues,
        *,
        seed: int,
        prepare: Callable[[str], object],
        ahead: bool = False,
    ) -> None:
        self._begin, self._prepare = begin, prepare
        self._lock = threading.Condition()
        self._paused = self._stopped = False
        self._restart: int | None = None
        self._take = begin(0, LivePrompts(cues), seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blocks") if ahead else None
        self._next: Future[tuple[Take, LatentBlock] | None] | None = None  # the block that is being made

    @property
    def timeline(self) -> Timeline:
        """Of the take that is running."""
        return self._take.timeline

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def stopped(self) -> bool:
        return self._stopped

    def prompt(self, text: str, *, keep_sink: bool | None = None) -> None:
        """The prompt from the next block on; the newest wins. It is read at once, on the side. Raises ValueError when it is empty."""
        with self._lock:
            self._take.cues.put(text, keep_sink)
        self._prepare(text)

    def pause(self) -> None:
        """No more blocks after the one at hand, until `resume`; who iterates waits."""
        with self._lock:
            self._paused = True

    def resume(self) -> None:
        with self._lock:
            self._paused = False
            self._lock.notify_all()

    def restart(self, seed: int | None = None) -> None:
        """From the next block on another video, of `seed` or of the same noise again, with the prompt in force."""
        with self._lock:
            self._restart = self._take.timeline.seed if seed is None else seed
            self._lock.notify_all()

    def stop(self) -> None:
        """Who iterates gets no more chunks. A second call does nothing."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def take(self) -> int:
        """How often it has been restarted."""
        return self._take.number

    def advance(self) -> tuple[Take, LatentBlock] | None:
        """The next block, undecoded, with the take that decodes it, also of a session that is paused; None at the end."""
        with self._lock:
            if self._stopped:
                return None
            if self._restart is not None:
                self._take, self._restart = self._again(self._restart), None
            take = self._take
        made = take.advance()
        return None if made is None else (take, made)

    def decode(self, take: Take, made: LatentBlock) -> DecodedBlock:
        """The images of a block that `advance` gave, in the order it gave them."""
        return take.decode(made)

    def _again(self, seed: int) -> Take:
        """A new take, which begins with what was typed last, shown or not."""
        old = self._take
        cue = old.cues.typed() or (old.timeline.cues[-1] if old.timeline.cues else old.cues.due(-1, 0))
        assert cue is not None  # a session begins with a prompt
        return self._begin(old.number + 1, LivePrompts(PromptSchedule.single(cue.prompt)), seed)

    def __iter__(self) -> Iterator[DecodedBlock]:
        return self

    def __next__(self) -> DecodedBlock:
        block = self._advance_unless_paused() if self._thread is None else self._one_ahead(self._thread)
        if block is None:
            self.stop()
            raise StopIteration
        return self.decode(*block)

    def _advance_unless_paused(self) -> tuple[Take, LatentBlock] | None:
        with self._lock:
            self._lock.wait_for(lambda: not self._paused or self._stopped)
        return self.advance()

    def _one_ahead(self, thread: ThreadPoolExecutor) -> tuple[Take, LatentBlock] | None:
        """The block that is being made; the next one is begun."""
        try:
            block = (self._next or self._begun(thread)).result()
            self._next = self._begun(thread) if block is not None else None
        except CancelledError:
            return None
        return block

    def _begun(self, thread: ThreadPoolExecutor) -> Future[tuple[Take, LatentBlock] | None]:
        with self._lock:
            if self._stopped:
                raise CancelledError
            return thread.submit(self._advance_unless_paused)
