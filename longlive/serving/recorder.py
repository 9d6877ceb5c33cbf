"""What a live session leaves on the disk: an mp4 that can be played at any time, and a timeline from which it can be made again.

A restarted session begins another pair of files. Knows nothing about models or clients.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from longlive import video
from longlive.generation.timeline import Timeline
from longlive.serving.fragments import move_fragment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """The video of one block: the message that announces it, its mp4 fragment, and its images for clients that want JPEG."""

    message: dict[str, Any]
    fragment: bytes
    images: np.ndarray

    @property
    def index(self) -> int:
        return self.message["index"]


class Recorder:
    """Appends segments as they come. Closing a file moves its index to the front. No file is created before the first segment.

    Args:
        stem: path of the files without their endings; those of video 1, after the first restart, begin with `stem-video1`.
    """

    def __init__(self, stem: Path) -> None:
        self._stem, self._video_index = stem, 0
        self._file: io.FileIO | None = None
        self._num_fragments, self._seconds = 0, 0.0

    @property
    def path(self) -> Path:
        """The recording of the newest video."""
        return self._with_ending(".mp4")

    @property
    def timeline_path(self) -> Path:
        return self._with_ending(".timeline.json")

    def _with_ending(self, ending: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}{f'-video{self._video_index}' if self._video_index else ''}{ending}")

    def write(self, segment: Segment, header: bytes) -> None:
        """Append a segment. Raises OSError when that fails."""
        if segment.message["video_index"] != self._video_index:
            self.close()
            self._video_index, self._num_fragments, self._seconds = segment.message["video_index"], 0, 0.0
        if self._file is None:
            self._file = io.FileIO(self.path, "w")
            self._write(header)
        self._num_fragments += 1
        self._write(move_fragment(segment.fragment, self._num_fragments, self._seconds))
        self._seconds += segment.message["seconds"]

    def save_timeline(self, timeline: Timeline) -> None:
        """Replace the timeline of the current recording. Raises OSError when that fails. Waits for the disk."""
        timeline.save(self.timeline_path)

    def _write(self, data: bytes) -> None:
        """Write all of it without a buffer: what was shown is in the file even when the process is killed."""
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def close(self, *, index_in_front: bool = True) -> None:
        """Complete the current file, if there is one. A second call does nothing.

        `index_in_front`: rewrite it as a plain mp4, for which the disk must have room for a second file.
        """
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if not index_in_front:
            return
        try:
            video.index_in_front(self.path)
        except (OSError, av.FFmpegError) as error:
            log.warning("%s stays a fragmented mp4, which can be played: %s", self.path, error)
