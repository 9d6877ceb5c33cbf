"""What a live session leaves on the disk: an mp4 that can be played at any time, and a timeline from which it can be made again.

A restarted session begins another pair of files, its next *take*. Knows nothing about models or clients.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np

from longlive import video
from longlive.generation.timeline import Timeline
from longlive.serving.fragments import jpegs, move_fragment

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """The video of one block: the message that announces it, its mp4 fragment, its images, and the seed of its video."""

    message: dict[str, Any]
    fragment: bytes
    images: np.ndarray
    seed: int

    @property
    def index(self) -> int:
        return self.message["index"]

    @property
    def video(self) -> dict[str, int]:
        """Which video it belongs to, as messages say it."""
        return {"video_index": self.message["video_index"], "seed": self.seed}

    @cached_property
    def jpegs(self) -> list[bytes]:
        """The images as files, for clients that want them; made when the first one asks."""
        return jpegs(self.images)


class NotRecorded(Exception):
    """Something is not in a session's files. `code`: as in the protocol's errors."""

    def __init__(self, what: str, error: OSError) -> None:
        full = error.errno in DISK_FULL
        super().__init__(f"{what}: {'the disk is full' if full else error.strerror or error}")
        self.code = "disk_full" if full else "not_recorded"


def stem_of(folder: Path, session: str, take: int) -> Path:
    """Path of the files of a session's take, without their endings. Take 0 is the first."""
    return folder / (f"{session}-video{take}" if take else session)


def recording_of(folder: Path, session: str, take: int) -> Path:
    return stem_of(folder, session, take).with_suffix(".mp4")


def timeline_of(folder: Path, session: str, take: int) -> Path:
    return stem_of(folder, session, take).with_suffix(".timeline.json")


def takes_of(folder: Path, session: str) -> list[int]:
    """The takes of a session of which there is a recording or a timeline, in order."""
    names = [file.name.removeprefix(session).split(".")[0] for file in folder.glob(f"{session}*")]
    return sorted({int(name.removeprefix("-video") or 0) for name in names if name.removeprefix("-video").isdecimal() or not name})


class Recorder:
    """Appends segments as they come. Closing a file moves its index to the front. No file is created before the first segment.

    When a file cannot be written, it is cut back to its last whole fragment and ends there; the next take begins another one.
    """

    def __init__(self, folder: Path, session: str) -> None:
        self._folder, self._session, self.take = folder, session, 0
        self._file: io.FileIO | None = None
        self._failed = self._timeline_failed = False
        self._num_fragments, self._seconds = 0, 0.0
        self._whole = 0  # bytes of the file up to its last whole fragment

    @property
    def path(self) -> Path:
        """The recording of the newest video."""
        return recording_of(self._folder, self._session, self.take)

    @property
    def timeline_path(self) -> Path:
        return timeline_of(self._folder, self._session, self.take)

    def write(self, segment: Segment, header: bytes) -> None:
        """Append a segment, unless that has failed before in this take. Raises NotRecorded when it fails."""
        if segment.message["video_index"] != self.take:
            self.close()
            self.take, self._failed, self._timeline_failed = segment.message["video_index"], False, False
            self._num_fragments, self._seconds, self._whole = 0, 0.0, 0
        if self._failed:
            return
        try:
            if self._file is None:
                self._file = io.FileIO(self.path, "w")
                self._write(header)
            self._write(move_fragment(segment.fragment, self._num_fragments + 1, self._seconds))
        except OSError as error:
            self._cut_back()
            what = "the recording ends here" if self._whole else "the video is not recorded"
            raise NotRecorded(what, error) from error
        self._whole = self._file.tell()
        self._num_fragments += 1
        self._seconds += segment.message["seconds"]

    def save_timeline(self, timeline: Timeline) -> None:
        """Replace the timeline of the current take. Waits for the disk. Raises NotRecorded when it fails, once per take."""
        try:
            timeline.save(self.timeline_path)
        except OSError as error:
            if not self._timeline_failed and not self._failed:  # the first error is the one that is told
                self._timeline_failed = True
                raise NotRecorded("the timeline is not saved", error) from error

    def _write(self, data: bytes) -> None:
        """Write all of it without a buffer: what was shown is in the file even when the process is killed."""
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def _cut_back(self) -> None:
        self._failed = True
        with contextlib.suppress(OSError):  # the error that came first is the one to tell; a reader passes over half a fragment
            if self._file is not None:
                self._file.truncate(self._whole)
                self._file.close()
            if not self._whole:
                self.path.unlink(missing_ok=True)
        self._file = None

    def close(self) -> None:
        """Complete the current file, if there is one: rewrite it as a plain mp4, if the disk has room for that. A second call does
        nothing.
        """
        if self._file is None:
            return
        self._file.close()
        self._file = None
        try:
            video.index_in_front(self.path)
        except (OSError, av.FFmpegError) as error:
            log.warning("%s stays a fragmented mp4, which can be played: %s", self.path, error)
