"""What a live session leaves on the disk: an mp4 that plays at any time, and beside it the timeline that makes it again.

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

from longlive.generation.timeline import Timeline
from longlive.serving.fragments import placed
from longlive.video import index_in_front

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A chunk as it is sent: what is said of it, its mp4 fragment, its images for whoever wants JPEG."""

    about: dict[str, Any]
    fragment: bytes
    images: np.ndarray

    @property
    def number(self) -> int:
        return self.about["chunk"]


class Recorder:
    """Appends fragments as they come; closing a file puts its index in front. Nothing is created before the first.

    Args:
        stem: path of the files without their endings; those of take 1 begin with `stem-take1`.
    """

    def __init__(self, stem: Path) -> None:
        self._stem, self._take = stem, 0
        self._file: io.FileIO | None = None
        self._failed = False
        self._fragments, self._seconds = 0, 0.0

    @property
    def path(self) -> Path:
        """The newest recording."""
        return self._named(".mp4")

    @property
    def timeline_path(self) -> Path:
        return self._named(".timeline.json")

    def _named(self, ending: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}{f'-take{self._take}' if self._take else ''}{ending}")

    def write(self, piece: Piece, header: bytes, timeline: Timeline) -> None:
        """Raises OSError when the disk refuses it; after that nothing more is written."""
        if self._failed:
            return
        try:
            if piece.about["take"] != self._take:
                self.close()
                self._take, self._fragments, self._seconds = piece.about["take"], 0, 0.0
            if self._file is None:
                self._file = io.FileIO(self.path, "w")
                self._write(header)
            self._fragments += 1
            self._write(placed(piece.fragment, self._fragments, self._seconds))
            self._seconds += piece.about["seconds"]
            timeline.save(self.timeline_path)
        except OSError:
            self._failed = True
            raise

    def _write(self, data: bytes) -> None:
        """All of it, to the system at once: what a killed server has shown is there."""
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        """Finishes the file there is. A second call does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        if not self._failed:
            try:
                index_in_front(self.path)
            except (OSError, av.FFmpegError) as error:
                log.warning("%s stays in fragments, which play: %s", self.path, error)
