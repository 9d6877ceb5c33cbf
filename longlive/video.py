"""Video files: written while the video is made, read, looked at. Knows nothing about models or prompts.

A video grows as a *fragmented* mp4 under its final name, so it can be played from the first block on and stays valid
whatever happens; closing it rewrites it as a plain mp4 (index in front), which replaces the fragmented one in one step.
Images are uint8 `[T, H, W, 3]`, red first.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from longlive.files import replacing

log = logging.getLogger(__name__)

SMALL_PICTURE = 300_000  # pixels
BT709 = 1  # the number of ITU-R BT.709 in the colour fields of H.264


def to_uint8(images: Tensor) -> Tensor:
    """Images `[B, 3, T, Y, X]` in [-1, 1], as a VAE decodes them, to uint8 `[B, T, Y, X, 3]`, as files and screens hold them."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


class VideoInfo(NamedTuple):
    """What a video file holds: number of pixel frames, their size, pixel frames a second."""

    images: int
    height: int
    width: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.images / self.fps


class VideoWriter:
    """Writes chunks of images to an H.264 mp4 that is playable while it grows and valid however the `with` block ends.

    `scale` repeats every pixel (nearest neighbour), so that small videos can be looked at. Nothing is created before the
    first chunk. Raises ValueError for images of another type or shape than the first, or of an odd size; OSError when the file cannot
    be written, a full disk for example: it is then cut back to its last whole fragment, and plays.
    """

    def __init__(self, path: str | Path, *, fps: float = 16, scale: int = 1, crf: int = 18) -> None:
        if scale < 1:
            raise ValueError(f"scale {scale}: a video is enlarged by a whole number, at least 1")
        self.path = Path(path)
        self.fps = Fraction(fps).limit_denominator(1001)
        self.scale = scale
        self.crf = crf
        self.num_images = 0
        self._output: tuple[OutputContainer, av.VideoStream] | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except (OSError, av.FFmpegError) as later:  # what ended the video first is what its user is told
            log.warning("%s could not be completed: %s", self.path, later)

    def write(self, images: np.ndarray | Tensor) -> None:
        """Appends images `[T, H, W, 3]`; when it returns all but the last can be read from the file."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images are uint8 [T, H, W, 3]; these are {images.dtype} {list(images.shape)}")
        height, width = images.shape[1] * self.scale, images.shape[2] * self.scale
        container, stream = self._output = self._output or self._open(height, width)
        if (stream.height, stream.width) != (height, width):
            raise ValueError(f"images of {height}x{width} in a video of {stream.height}x{stream.width}")
        try:
            for image in images:
                container.mux(stream.encode(video_frame(image, self.num_images, fps=self.fps, scale=self.scale)))
                self.num_images += 1
        except OSError as error:
            raise self._cut_back(error) from error

    def _open(self, height: int, width: int) -> tuple[OutputContainer, av.VideoStream]:
        if height % 2 or width % 2:
            raise ValueError(f"{height}x{width} pixels: H.264 wants even sizes; choose scale 2 or another size")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a fragment an image and an encoder that keeps none back: what was written is on the disk
        fragmented = {"movflags": "empty_moov+default_base_moof+frag_every_frame", "flush_packets": "1"}
        container = av.open(str(self.path), "w", format="mp4", options=fragmented)
        stream = container.add_stream("libx264", rate=self.fps, options=encoder_options(height, width, crf=self.crf))
        stream.codec_context.gop_size = max(1, round(self.fps))
        set_picture(stream.codec_context, height, width, self.fps)
        return container, stream

    def close(self) -> None:
        """Finishes the file; a second call does nothing. An interrupted rewrite leaves the fragmented file, which plays.

        So does one for which the disk has no room. Raises OSError as `write` does.
        """
        if self._output is None:
            return
        container, stream = self._output
        try:
            container.mux(stream.encode(None))
            container.close()
        except OSError as error:
            raise self._cut_back(error) from error
        self._output = None
        try:
            index_in_front(self.path)
        except OSError as error:
            log.warning("%s stays a fragmented mp4, which plays: there was no room to move its index to the front (%s)", self.path, error)

    def _cut_back(self, error: OSError) -> OSError:
        """Close the file at its last whole fragment, where `error` stopped it; returns the error to raise."""
        assert self._output is not None
        (container, _), self._output = self._output, None
        with suppress(av.FFmpegError):  # the same error again
            container.close()
        cut_to_whole_fragments(self.path)
        self.num_images = probe(self.path).images if self.path.stat().st_size else 0
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        return OSError(error.errno, what, str(self.path))


def encoder_options(height: int, width: int, *, crf: int) -> dict[str, str]:
    """x264's: no image is kept back. Small images are encoded by one thread, because more cost more than they save."""
    threads = {"threads": "1"} if height * width < SMALL_PICTURE else {}
    return {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency"} | threads


def set_picture(context: av.VideoCodecContext, height: int, width: int, fps: Fraction) -> None:
    """Size, rate and colours of what `video_frame` makes. Raises ValueError for an odd size."""
    if height % 2 or width % 2:
        raise ValueError(f"{height}x{width} pixels: H.264 wants even sizes; choose scale 2 or another size")
    context.height, context.width, context.pix_fmt = height, width, "yuv420p"
    context.time_base = 1 / fps
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = ColorRange.MPEG


def video_frame(image: np.ndarray, number: int, *, fps: Fraction, scale: int) -> av.VideoFrame:
    """Image `[H, W, 3]`, number `number` of its video, every pixel `scale` times, as H.264 wants it.

    The image is converted first and enlarged then: less to convert, and for an even `scale` no colour is averaged with a neighbour's.
    """
    colours = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    if scale % 2:  # colours of 2 x 2 pixels are one, which must be of the enlarged image
        enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
        frame = av.VideoFrame.from_ndarray(enlarged, format="rgb24") if scale > 1 else rgb
        frame = frame.reformat(format="yuv420p", **colours)
    else:
        frame = av.VideoFrame(image.shape[1] * scale, image.shape[0] * scale, "yuv420p")
        converted = rgb.reformat(format="yuv444p", **colours).to_ndarray()
        for plane, values, times in zip(frame.planes, converted, (scale, scale // 2, scale // 2)):
            rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)  # the frame's own memory
            rows[:, : plane.width] = values.repeat(times, axis=0).repeat(times, axis=1)
        frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    frame.pts, frame.time_base = number, 1 / fps
    return frame


def whole_fragments(path: str | Path) -> int:
    """Bytes of a growing fragmented mp4 up to the end of its last whole fragment; 0 when not even its header is whole."""
    end, whole, size = 0, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if length < 8 or end + length > size:
                break
            end += length
            whole = end if kind in (b"moov", b"mdat") else whole  # a fragment is a moof and the mdat after it
            file.seek(end)
    return whole


def cut_to_whole_fragments(path: str | Path) -> None:
    """Remove from a fragmented mp4 what follows its last whole fragment, so that it plays; needs no room on the disk."""
    os.truncate(path, whole_fragments(path))


def index_in_front(path: Path) -> None:
    """Replace a fragmented mp4 by a plain one, atomically and without encoding it again."""
    with (
        replacing(path) as plain,
        av.open(str(path)) as source,
        av.open(str(plain), "w", format="mp4", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)


def images_of(path: str | Path, *, as_opencv: bool = False) -> Iterator[np.ndarray]:
    """The images of a video file one after the other, uint8 `[H, W, 3]`.

    `as_opencv`: colours as OpenCV reads them, and so everybody who measures with it: by ITU-R BT.601 whatever the file says.
    """
    colours = {"src_colorspace": Colorspace.ITU601, "dst_colorspace": Colorspace.ITU601} if as_opencv else {}
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.reformat(format="rgb24", **colours).to_ndarray()


def read_video(path: str | Path) -> np.ndarray:
    """All images of a video file, uint8 `[T, H, W, 3]`."""
    return np.stack(list(images_of(path)))


def read_images(path: str | Path, indices: Iterable[int]) -> list[np.ndarray]:
    """Some images of a video file, each uint8 `[H, W, 3]`, in the order of the file; memory does not grow with its length."""
    wanted = set(indices)
    return [image for index, image in enumerate(images_of(path)) if index in wanted]


def probe(path: str | Path) -> VideoInfo:
    """Length, size and rate of a video file, also of one that is still growing."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        images = sum(packet.size > 0 for packet in container.demux(stream))
        return VideoInfo(images, stream.height, stream.width, float(stream.average_rate or 0))


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Raises ValueError, with the path, for everything that PyAV raises within the block when the file is not a whole video."""
    try:
        yield
    except (av.FFmpegError, FileNotFoundError, IndexError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def read_through(path: str | Path) -> VideoInfo:
    """Decode a video file to its end. Raises ValueError when that fails, or when it has no frames."""
    with readable(path):
        info = probe(path)._replace(images=sum(1 for _ in images_of(path)))
        if not info.images:
            raise ValueError("it has no frames")
    return info


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most `count` indices below `total`, the first and the last among them."""
    return sorted({round(index) for index in np.linspace(0, total - 1, min(count, total))})


def contact_sheet(
    images: Sequence[np.ndarray],
    path: str | Path,
    *,
    columns: int = 6,
    captions: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draws images `[H, W, 3]` side by side into a PNG, each above its caption, the title on top.

    Tiles are 240 to 480 pixels wide: smaller images are enlarged by whole pixels, larger ones reduced.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    columns = min(columns, len(images))
    height, width = images[0].shape[:2]
    if width < 240:
        enlarge = -(-240 // width)
        tile, resample = (width * enlarge, height * enlarge), Image.Resampling.NEAREST
    else:
        reduce = min(1.0, 480 / width)
        tile, resample = (round(width * reduce), round(height * reduce)), Image.Resampling.LANCZOS

    font, margin, line = ImageFont.load_default(14), 8, 19
    texts = [_wrap(caption, font, tile[0]) for caption in captions] or [[] for _ in images]
    caption_height = line * max(map(len, texts))
    sheet_width = columns * (tile[0] + margin) + margin
    heading = _wrap(title, font, sheet_width - 2 * margin) if title else []
    top = margin + line * len(heading) + (margin if heading else 0)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (sheet_width, top + rows * (tile[1] + caption_height + margin)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, text in enumerate(heading):
        draw.text((margin, margin + number * line), text, font=font, fill="black")
    for index, (image, lines) in enumerate(zip(images, texts)):
        row, column = divmod(index, columns)
        x, y = margin + column * (tile[0] + margin), top + row * (tile[1] + caption_height + margin)
        sheet.paste(Image.fromarray(image).resize(tile, resample), (x, y))
        for number, text in enumerate(lines):
            draw.text((x, y + tile[1] + 2 + number * line), text, font=font, fill="black")
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 5) -> list[str]:
    """Lines of at most `width` pixels; what does not fit into `most` of them ends in an ellipsis."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    for index, content in enumerate(lines):
        while font.getlength(content) > width and len(content) > 2:  # one long word, or Chinese
            content = content[:-2] + "…"
        lines[index] = content
    return lines


def video_bytes(num_images: int, height: int, width: int) -> int:
    """A generous guess of the disk a video needs while it is made and rewritten (0.2 bytes a pixel, 1 kB an image)."""
    return int(num_images * (height * width * 0.2 + 1024))
