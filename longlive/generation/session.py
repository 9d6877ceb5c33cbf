"""A running video: prompts, pause, restart and stop from any thread.

`SteppedSession` makes a block when its owner calls `advance`; a server that shares one model among sessions uses it. `Session`, what
`LongLivePipeline.session` returns, is an iterator on top of one, which can run a block ahead. A long file: what both of them, a video and
its prompts owe to each other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from longlive.generation.cues import Cues
from longlive.generation.session_prompts import SessionPrompts, SessionStopped, check_given
from longlive.generation.stream import BlockSeconds, LatentBlock
from longlive.generation.timeline import Timeline
from longlive.generation.transition import Transition
from longlive.types import Decoder
from longlive.video import to_uint8


@dataclass(frozen=True)
class DecodedBlock:
    """The images of one block.

    `images`: uint8 `[B, T, Y, X, 3]` on the CPU; `latent_frames`: its latent frames; `prompt`: the active one; `switched`: whether that
    prompt began with this block; `seconds`: what the block cost, by part; `video_index`: how often the session had been restarted.
    """

    images: UInt8[Tensor, "B T Y X 3"]
    latent_frames: range
    prompt: str
    switched: bool
    seconds: BlockSeconds
    video_index: int = 0


class SessionFailed(RuntimeError):
    """A session that an error or Ctrl-C ended within a block; every use of it says so. Begin another one."""


def check_seed(seed: int) -> None:
    """Raises ValueError for what is no seed: a whole number from 0 to 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed!r}: choose a whole number from 0 to 2^63 - 1")


class SessionVideo:
    """One video of a session, from its first block to its end or to a restart.

    Images beyond `num_images` are left out, and those of latents that it begins with, unless `shows_given`.
    """

    def __init__(
        self,
        index: int,
        blocks: Iterable[LatentBlock],
        decoder: Decoder,
        timeline: Timeline,
        *,
        num_images: int | None = None,
        shows_given: bool = True,
    ) -> None:
        self._shows_given = shows_given
        self.index, self.timeline = index, timeline
        self._remaining = num_images  # images that are still to be shown; None: all
        self._blocks, self._decoder = iter(blocks), decoder

    def next_block(self) -> LatentBlock | None:
        """Make the next block; None at the video's end."""
        block = next(self._blocks, None)
        if block is not None and block.given and not self._shows_given:
            self._count(block)
            self._decoder.decode(block.latents)  # what comes after them depends on them
            block = next(self._blocks, None)
        if block is not None:
            self._count(block)
        return block

    def _count(self, block: LatentBlock) -> None:
        if block.switched:
            self.timeline.cues.append(replace(block.cue, latent_frame=block.latent_frames.start))
        self.timeline.num_latent_frames = block.latent_frames.stop

    def close(self) -> None:
        """Make no more blocks and free the cache; blocks already made can still be decoded."""
        self._blocks = iter(())

    @torch.no_grad()
    def decode(self, block: LatentBlock) -> DecodedBlock:
        """The images of a block; blocks must come in their order."""
        start = time.perf_counter()
        with _decoding_stream(block):
            images = to_uint8(self._decoder.decode(block.latents)[:, :, : self._remaining]).cpu()  # waits for the device
        if self._remaining is not None:
            self._remaining -= images.shape[1]
        block.seconds.decode = time.perf_counter() - start
        return DecodedBlock(images, block.latent_frames, block.cue.prompt, block.switched, block.seconds, self.index)


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


def _decoding_stream(block: LatentBlock) -> AbstractContextManager[object]:
    """On a GPU, a stream of its own: on the default one an image would wait until the block that another thread has queued is made.

    It waits for the event that says that the latents are there.
    """
    if block.ready is None:
        return nullcontext()
    stream = _stream_of(block.latents.device)
    stream.wait_event(block.ready)
    block.latents.record_stream(stream)
    return torch.cuda.stream(stream)


class SteppedSession:
    """Makes a block when its owner calls `advance`, in one thread while another one may decode; the other methods are for any thread.

    Args:
        begin: makes the video with this index, these prompts and this seed.
        encode: begins to encode a prompt in another thread.

    Once an error or Ctrl-C has ended a block, the methods raise `SessionFailed`, since neither the cache nor the decoder is whole then;
    only `stop`, and what has been made (`timeline`), can be used.
    """

    def __init__(
        self,
        begin: Callable[[int, SessionPrompts, int], SessionVideo],
        plan: Cues,
        *,
        seed: int,
        encode: Callable[[str], Future[Any]],
    ) -> None:
        self._begin, self._encode = begin, encode
        self._prompts = SessionPrompts(plan)
        self._video = begin(0, self._prompts, seed)
        self._lock = threading.Lock()
        self._restart_seed: int | None = None  # of the video that the next block begins, if any
        self._failure: BaseException | None = None
        self._request: Future[bool] | None = None  # the newest of `prompt_when_encoded` that is not settled
        self.paused = False

    @property
    def timeline(self) -> Timeline:
        """The timeline of the current video."""
        return self._video.timeline

    @property
    def video_index(self) -> int:
        """How often the session has been restarted."""
        return self._video.index

    @property
    def stopped(self) -> bool:
        return self._prompts.stopped

    @property
    def newest_prompt(self) -> str | None:
        """The prompt of the next block, as far as it is known: None when a `PromptQueue` has the first one."""
        return self._prompts.newest

    def prompt(self, text: str, *, transition: Transition | None = None) -> None:
        """Switch to `text` at the next block, which waits until it is encoded; the newest prompt wins.

        `transition`: what the switch does with the past; None: as the model does by default. Raises ValueError when `text` is empty.
        """
        self.check_usable()
        with self._lock:
            self._prompts.put(text, transition)
            self._request = None
        self._encode(text)

    def prompt_when_encoded(self, text: str, *, transition: Transition | None = None) -> Future[bool]:
        """As `prompt`, but blocks continue with the active prompt until `text` is encoded.

        Returns a future: True once the next block will switch to `text`, False when a newer prompt has replaced it before that; it has
        the encoder's exception when `text` cannot be encoded.
        """
        self.check_usable()
        check_given(text, transition)
        queued: Future[bool] = Future()
        with self._lock:
            self._request = queued

        def encoded(encoding: Future[Any]) -> None:
            with self._lock:
                replaced = encoding.cancelled() or self._request is not queued
                error = None if replaced else encoding.exception()
                if not replaced and error is None:
                    self._prompts.put(text, transition)
            if error is not None:
                queued.set_exception(error)
            else:
                queued.set_result(not replaced)

        self._encode(text).add_done_callback(encoded)
        return queued

    def encode_first_prompt(self) -> Future[Any]:
        """Begin to encode the prompt of the first block; `advance` waits for it otherwise."""
        assert self.newest_prompt is not None
        return self._encode(self.newest_prompt)

    def pause(self) -> None:
        """Ask the owner for no more blocks until `resume`; `advance` itself still makes one."""
        self.check_usable()
        self.paused = True

    def resume(self) -> None:
        self.check_usable()
        self.paused = False

    def restart(self, seed: int | None = None) -> None:
        """Begin another video at the next block, with the newest prompt, from `seed` or from the same noise again.

        Raises ValueError for what is no seed.
        """
        self.check_usable()
        if seed is not None:
            check_seed(seed)
        with self._lock:
            self._restart_seed = self._video.timeline.seed if seed is None else seed

    def stop(self) -> None:
        """Make no more blocks, and abandon the one that is being made. A second call does nothing."""
        self._prompts.stopped = True

    def check_usable(self) -> None:
        """Raises SessionFailed, with what ended it, once the session has failed."""
        if self._failure is not None:
            what = str(self._failure) or type(self._failure).__name__
            raise SessionFailed(f"this session ended within a block ({what}); begin another one") from self._failure

    @contextmanager
    def within_a_block(self) -> Iterator[None]:
        """While a block is made or decoded: whatever interrupts it ends the session."""
        self.check_usable()
        try:
            yield
        except BaseException as interruption:
            self._failure = interruption
            raise

    def advance(self) -> tuple[SessionVideo, LatentBlock] | None:
        """Make the next block; returns it with its video, whose `decode` gives the images. None at the end, or once stopped."""
        if self.stopped:
            self.check_usable()
            return None
        with self.within_a_block():
            return self._make_block()

    def _make_block(self) -> tuple[SessionVideo, LatentBlock] | None:
        with self._lock:
            if self._restart_seed is not None:
                self._prompts.restart()
                self._video.close()
                self._video = self._begin(self._video.index + 1, self._prompts, self._restart_seed)
                self._restart_seed = None
            video = self._video
        try:
            block = video.next_block()
        except SessionStopped:
            return None
        return None if block is None else (video, block)


class Session:
    """Iterate over a session: yields a `DecodedBlock` per block. As a context manager it stops when the `with` block ends.

    Once an error or Ctrl-C has ended a block, every use but `stop` and `timeline` raises `SessionFailed`.

    Without `ahead` a block is made in the thread that iterates, when it asks for one. With `ahead` another thread makes it, one block
    ahead, while the block before is decoded and used; a new prompt is then shown one block later. Either way a slow consumer slows
    generation down. All other methods may be called from any thread.
    """

    def __init__(self, steps: SteppedSession, *, ahead: bool = False) -> None:
        self._steps = steps
        self._changed = threading.Condition()  # notified when iteration may go on, or has to end
        threads = torch.set_num_threads, (torch.get_num_threads(),)  # counted per thread
        self._worker = ThreadPoolExecutor(1, "blocks", *threads) if ahead else None
        self._next: Future[tuple[SessionVideo, LatentBlock] | None] | None = None  # the block that the worker makes

    @property
    def timeline(self) -> Timeline:
        """The timeline of the current video."""
        return self._steps.timeline

    @property
    def paused(self) -> bool:
        return self._steps.paused

    @property
    def stopped(self) -> bool:
        return self._steps.stopped

    def prompt(self, text: str, *, transition: Transition | None = None) -> None:
        """Switch to `text` at the next block; the newest prompt wins.

        `transition`: what the switch does with the past; None: as the model does by default. Raises ValueError when `text` is empty.
        """
        self._steps.prompt(text, transition=transition)

    def pause(self) -> None:
        """Begin no more blocks until `resume`; iteration waits."""
        self._steps.pause()

    def resume(self) -> None:
        with self._changed:
            self._steps.resume()
            self._changed.notify_all()

    def restart(self, seed: int | None = None) -> None:
        """Begin another video at the next block, with the newest prompt, from `seed` or from the same noise again.

        Raises ValueError for what is no seed.
        """
        self._steps.restart(seed)

    def stop(self) -> None:
        """End the iteration; a block that is being made is abandoned after its pass. A second call does nothing."""
        with self._changed:
            self._steps.stop()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __iter__(self) -> Iterator[DecodedBlock]:
        return self

    def __next__(self) -> DecodedBlock:
        step = self._advance() if self._worker is None else self._advance_ahead(self._worker)
        if step is None:
            self.stop()
            raise StopIteration
        video, block = step
        with self._steps.within_a_block():
            return video.decode(block)

    def _advance(self) -> tuple[SessionVideo, LatentBlock] | None:
        with self._changed:
            self._changed.wait_for(lambda: not self.paused or self.stopped)
        return self._steps.advance()

    def _advance_ahead(self, worker: ThreadPoolExecutor) -> tuple[SessionVideo, LatentBlock] | None:
        """The block that the worker makes; the worker begins the next one. Ctrl-C while this waits loses nothing: the worker goes on."""
        try:
            self._next = self._next or self._submit(worker)
            wait((self._next,))
            made, self._next = self._next, None
            step = made.result()
            self._next = self._submit(worker) if step is not None else None
        except CancelledError:
            self._steps.check_usable()
            return None
        return step

    def _submit(self, worker: ThreadPoolExecutor) -> Future[tuple[SessionVideo, LatentBlock] | None]:
        with self._changed:
            if self.stopped:
                raise CancelledError
            return worker.submit(self._advance)
