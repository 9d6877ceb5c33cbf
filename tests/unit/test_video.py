"""A video file can be read at every moment of its life, and holds what was put in."""

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from longlive import video
from longlive.files import check_disk, check_writable

COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 70, 220], [230, 210, 60]], np.uint8)


def clip(num_images: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square moves over a background that changes colour: order and content can both be checked."""
    images = np.empty((num_images, height, width, 3), np.uint8)
    for index, image in enumerate(images):
        image[:] = COLOURS[index % 4]
        image[8:16, index % (width - 8) : index % (width - 8) + 8] = 255
    return images


@pytest.mark.parametrize("scale", [1, 3])
def test_round_trip(tmp_path, scale):
    path, images = tmp_path / "deeper" / "a.mp4", clip(20, 32, 48)
    with video.VideoWriter(path, fps=16, scale=scale) as writer:
        writer.write(images[:1])
        writer.write(torch.from_numpy(images[1:]))
    back = video.read_video(path)
    assert back.shape == (20, 32 * scale, 48 * scale, 3) and back.dtype == np.uint8
    wanted = images.repeat(scale, 1).repeat(scale, 2)
    assert np.abs(back.astype(int) - wanted).mean() < 6
    info = video.probe(path)
    assert (info.images, info.height, info.width, info.fps) == (20, 32 * scale, 48 * scale, 16)
    assert info.seconds == 20 / 16
    assert [item.name for item in path.parent.iterdir()] == ["a.mp4"]


def test_colours_survive(tmp_path):
    for index, colour in enumerate(COLOURS):
        path = tmp_path / f"{index}.mp4"
        with video.VideoWriter(path) as writer:
            writer.write(np.broadcast_to(colour, (4, 32, 32, 3)))
        assert np.abs(video.read_video(path).astype(int) - colour).max() <= 4


@pytest.mark.parametrize("scale", [2, 4])
def test_an_enlarged_frame_has_the_colours_of_its_image_and_of_no_neighbour(scale):
    """Before compression: every 2 x 2 pixels that share a colour lie within one pixel of the image."""
    image = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)
    frame = video.video_frame(image, 0, fps=Fraction(16), scale=scale)
    luma, *chroma = (
        np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width] for plane in frame.planes
    )
    red, green, blue = np.moveaxis(image / 255, -1, 0)
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # ITU-R BT.709
    expected = 16 + 219 * y, 128 + 224 * (blue - y) / 1.8556, 128 + 224 * (red - y) / 1.5748
    for plane, wanted, times in zip((luma, *chroma), expected, (scale, scale // 2, scale // 2), strict=True):
        assert np.abs(plane - wanted.repeat(times, 0).repeat(times, 1)).max() < 1.5
    assert (frame.width, frame.height, frame.format.name) == (10 * scale, 6 * scale, "yuv420p")
    assert (frame.colorspace, frame.color_range) == (1, 1)


@pytest.mark.parametrize(("scale", "least"), [(1, 32), (2, 36), (4, 40)])
def test_decibels_of_a_written_video(tmp_path, scale, least):
    """One pixel of noise that moves, on a background: hard edges of colour, as the miniature's."""
    images = clip(24, 32, 48)
    images[:, 20:24, 30:34] = (220, 40, 40)
    with video.VideoWriter(tmp_path / "a.mp4", scale=scale) as writer:
        writer.write(images)
    error = video.read_video(tmp_path / "a.mp4").astype(float) - images.repeat(scale, 1).repeat(scale, 2)
    assert -10 * np.log10(np.square(error).mean() / 255**2) > least


def test_cut_back_to_the_last_whole_fragment(tmp_path):
    """At every length: what is left plays, and holds every image that was whole."""
    with video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(9))
        growing = (tmp_path / "a.mp4").read_bytes()
    counts = [_images_after_cut(tmp_path / "cut.mp4", growing[:length]) for length in (*range(0, len(growing), len(growing) // 60), None)]
    assert counts == sorted(counts) and set(counts) >= {0, 1, 4, 7} and counts[-1] == 8


def _images_after_cut(path, content):
    path.write_bytes(content)
    video.cut_to_whole_fragments(path)
    return len(list(video.images_of(path))) if path.stat().st_size else 0


def test_playable_while_it_grows(tmp_path):
    images = clip(30)
    with video.VideoWriter(tmp_path / "a.mp4") as writer:
        for written in (9, 21):
            writer.write(images[writer.num_images : written])
            copy = shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
            assert len(video.read_video(copy)) == written - 1 == video.probe(copy).images


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_a_plain_valid_file(tmp_path, error):
    path = tmp_path / "a.mp4"
    with pytest.raises(error), video.VideoWriter(path) as writer:
        writer.write(clip(9))
        raise error
    assert len(video.read_video(path)) == 9
    data = path.read_bytes()
    assert b"moof" not in data and data.index(b"moov") < data.index(b"mdat")


def test_interrupted_rewrite_keeps_the_growing_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(video.os, "replace", interrupted)
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt), video.VideoWriter(path) as writer:
        writer.write(clip(9))
    assert len(video.read_video(path)) == 9
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]


def test_nothing_written_leaves_no_file(tmp_path):
    with video.VideoWriter(tmp_path / "a.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="33x48"), video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(1, 33, 48))
    with video.VideoWriter(tmp_path / "b.mp4", scale=2) as writer:
        writer.write(clip(1, 33, 47))
        with pytest.raises(ValueError, match="in a video of 66x94"):
            writer.write(clip(1, 32, 48))
    with pytest.raises(ValueError, match="float32"), video.VideoWriter(tmp_path / "c.mp4") as writer:
        writer.write(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="scale 0"):
        video.VideoWriter(tmp_path / "d.mp4", scale=0)


def test_read_some_images(tmp_path):
    with video.VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(clip(40))
    everything, indices = video.read_video(tmp_path / "a.mp4"), video.evenly_spaced(40, 5)
    assert indices[0] == 0 and indices[-1] == 39 and len(indices) == 5
    np.testing.assert_array_equal(video.read_images(tmp_path / "a.mp4", indices), everything[indices])
    assert video.evenly_spaced(3, 12) == [0, 1, 2] and video.evenly_spaced(1, 12) == [0]


def test_contact_sheet(tmp_path):
    images = list(clip(7, 64, 64))
    captions = [f"{index} s\na very long caption that will need several lines to be readable at all" for index in range(7)]
    video.contact_sheet(images, tmp_path / "a.png", columns=3, captions=captions, title="a red square")
    video.contact_sheet(images, tmp_path / "b.png", columns=3)
    with_text, without = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert with_text.width == without.width == 3 * (256 + 8) + 8
    assert without.height == 8 + 3 * (256 + 8) < with_text.height
    assert without.getpixel((8 + 250, 8 + 250)) == tuple(COLOURS[0])
    with pytest.raises(ValueError, match="2 captions for 7"):
        video.contact_sheet(images, tmp_path / "c.png", captions=["a", "b"])


def test_checks_before_starting(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        check_writable(tmp_path / "file" / "folder")
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ValueError, match="GiB of disk needed"):
        check_disk(tmp_path, 2**62)
