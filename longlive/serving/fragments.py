"""A growing video in parts that a browser can play one by one: H.264 in fragmented mp4, or JPEG files.

Knows nothing about sessions or connections. Images are uint8 `[T, H, W, 3]`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from longlive.video import encoder_options, set_picture, video_frame

TIMESCALE = 90_000  # ticks per second of the mp4's clock
FRAGMENTED = {"movflags": "empty_moov+default_base_moof+frag_custom", "video_track_timescale": str(TIMESCALE)}


class FragmentEncoder:
    """One H.264 stream in fragments (`moof`, `mdat`), each of which begins with a key frame.

    Every fragment is encoded by a new encoder with the same settings, so that all share one initialization segment. `header` (`ftyp`,
    `moov`; empty before the first fragment) followed by any of the fragments in order can be played, as a file or in a browser.
    """

    def __init__(self, *, fps: float, scale: int = 1, crf: int = 20) -> None:
        self.fps, self.scale, self.crf = Fraction(fps).limit_denominator(1001), scale, crf
        self.header = b""
        self.num_images = self.num_fragments = 0

    @property
    def mime(self) -> str:
        """The media type of the stream, with the profile and level of the codec."""
        start = self.header.index(b"avcC") + 5
        return f'video/mp4; codecs="avc1.{self.header[start : start + 3].hex()}"'

    def encode(self, images: np.ndarray) -> bytes:
        """The fragment of the next images, whose times follow those of the fragment before."""
        file = io.BytesIO()
        start = self.num_images
        with av.open(file, "w", format="mp4", options=FRAGMENTED) as container:
            height, width = images.shape[1] * self.scale, images.shape[2] * self.scale
            stream = container.add_stream("libx264", rate=self.fps, options=encoder_options(height, width, crf=self.crf))
            set_picture(stream.codec_context, height, width, self.fps)
            stream.codec_context.gop_size = len(images)
            for number, image in enumerate(images):
                container.mux(stream.encode(video_frame(image, number, fps=self.fps, scale=self.scale)))
            container.mux(stream.encode(None))
        boxes = dict(_boxes(file.getvalue()))
        self.header = self.header or boxes["ftyp"] + boxes["moov"]
        self.num_images += len(images)
        self.num_fragments += 1
        # The muxer is new for every fragment and gives each the number and the time of the first.
        return move_fragment(boxes["moof"] + boxes["mdat"], self.num_fragments, start / self.fps)


def _boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The outermost boxes of an mp4, each with its type."""
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8].decode("ascii"), data[start : start + size]
        start += size


def move_fragment(fragment: bytes, number: int, seconds: float | Fraction) -> bytes:
    """The fragment with another sequence number and another start time."""
    changed = bytearray(fragment)
    sequence, decode = fragment.index(b"mfhd") + 8, fragment.index(b"tfdt") + 8
    assert fragment[decode - 4] == 1  # version 1: a time of 8 bytes
    changed[sequence : sequence + 4] = number.to_bytes(4, "big")
    changed[decode : decode + 8] = round(seconds * TIMESCALE).to_bytes(8, "big")
    return bytes(changed)


def jpegs(images: np.ndarray, *, quality: int = 88) -> list[bytes]:
    """Each image as a JPEG file."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality, subsampling=0)
        files.append(file.getvalue())
    return files
