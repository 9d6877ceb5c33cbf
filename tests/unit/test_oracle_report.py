"""The oracle's report on mp4 files whose answer is known: renders of the world."""

import dataclasses

import numpy as np
import pytest
import torch

from longlive import video
from longlive.evaluation import oracle_report, values
from longlive.evaluation.prepared import video_path
from longlive.evaluation.suites import Entry
from longlive.generation.prompt_files import Script
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES, RADII, Captioned, Identity, draw_identity, render
from tests.unit.test_prepared import PREPARED

FIRST = Captioned("ring", "blue", "white", "right")
SECOND = FIRST.with_one_change("color", "red")


def write(path, images):
    with video.VideoWriter(path, scale=4, crf=10) as writer:
        writer.write(images.movedim(1, -1).numpy())


def chain(captions, num_images=97, identity=None):
    """One video, `captions` from image to image, uint8 `[T, 3, 64, 64]`."""
    identity = identity or draw_identity(torch.Generator().manual_seed(0))
    return render([captions], [identity], num_images)[0]


def captions_by(one):
    return oracle_report.captions_of(dataclasses.replace(PREPARED, entries=(one,), num_latent_frames=None), one)


def entry(*meanings, seconds=3.0):
    texts = tuple(canonical(meaning) for meaning in meanings)
    return Entry(index=0, name="x", script=Script("here", texts, durations=(seconds,) * len(texts)), samples=1)


def of_video(path, images, *meanings, seconds=3.0):
    write(path, images)
    one = entry(*meanings, seconds=seconds)
    said = captions_by(one)
    seen = oracle_report.look(path, said)
    return oracle_report.metrics(seen, said, fps=16.0), seen, said


def test_all_right(tmp_path):
    found, seen, said = of_video(tmp_path / "x.mp4", chain([FIRST] * 97), FIRST)
    assert [number for number, _ in said] == [0] and seen.correct.shape == (97, 4)
    assert all(found[f"{name}_right"] == 1 for name in ATTRIBUTES) and found["all_right"] == found["adherence_last_second"] == 1
    assert found["clearness"] > 0.85 and found["size_drift"] < 0.03 and np.isnan(found["switch_seconds"])
    assert oracle_report.over_seconds(seen, fps=16.0).shape == (6, 4)  # what is left is too short to count


def test_a_switch_and_how_long_it_takes(tmp_path):
    """The new colour comes eight images after the prompt: half a second of wrong colour, nothing else."""
    one = entry(FIRST, SECOND)
    (_, (at, _)) = captions_by(one)
    late = chain([FIRST] * (at + 8) + [SECOND] * (97 - at - 8))
    found, seen, _ = of_video(tmp_path / "x.mp4", late, FIRST, SECOND)
    assert found["switch_seconds"] == pytest.approx(0.5) and found["color_right"] == pytest.approx(1 - 8 / 97)
    assert found["shape_right"] == found["background_right"] == found["motion_right"] == 1
    assert not seen.correct[at : at + 8, list(ATTRIBUTES).index("color")].any()
    never, _, _ = of_video(tmp_path / "y.mp4", chain([FIRST] * 97), FIRST, SECOND)
    assert never["switch_seconds"] == pytest.approx((97 - at) / 16)


def test_motion_follows_within_its_window(tmp_path):
    turned = FIRST.with_one_change("motion", "up")
    one = entry(FIRST, turned)
    (_, (at, _)) = captions_by(one)
    found, _, _ = of_video(tmp_path / "x.mp4", chain([FIRST] * at + [turned] * (97 - at)), FIRST, turned)
    assert found["motion_right"] > 0.95 and found["switch_seconds"] <= 0.25


def test_size_that_no_prompt_says(tmp_path):
    small, large = (chain([FIRST] * 48, 48, Identity(radius=radius, x=16, y=16, light=0)) for radius in (RADII[0], RADII[-1]))
    found, _, _ = of_video(tmp_path / "x.mp4", torch.cat([small, large]), FIRST)
    assert found["size_drift"] == pytest.approx(RADII[-1] / RADII[0] - 1, abs=0.06)


def test_nothing_to_see(tmp_path):
    found, _, _ = of_video(tmp_path / "x.mp4", torch.full((33, 3, 64, 64), 255, dtype=torch.uint8), FIRST)
    assert found["background_right"] == 1 and found["shape_right"] == found["color_right"] == found["motion_right"] == 0
    assert np.isnan(found["size_drift"]) and found["all_right"] == 0


def test_what_the_oracle_cannot_read(tmp_path):
    with video.VideoWriter(tmp_path / "x.mp4") as writer:
        writer.write(np.zeros((3, 64, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="64x96 pixels"):
        oracle_report.read_small(tmp_path / "x.mp4")
    with pytest.raises(ValueError, match="lacks shape, color, background, motion of the miniature world"):
        captions_by(Entry(index=0, name="x", script=Script("here", ("a cat",)), samples=1))


def test_a_folder(tmp_path):
    """Two videos of different length: what is over is no longer counted."""
    entries = (entry(FIRST), dataclasses.replace(entry(SECOND, seconds=2.0), name="y", index=1))
    prepared = dataclasses.replace(PREPARED, entries=entries, num_latent_frames=None)
    for planned, meaning in zip(prepared.videos, (FIRST, SECOND)):
        write(video_path(tmp_path, planned.name), chain([meaning] * planned.num_frames, planned.num_frames))
    oracle_report.run(tmp_path, prepared)
    found, about = values.read(tmp_path, "oracle")
    assert found["adherence"] == {"x-0": 1.0, "y-0": 1.0}
    assert about["adherence_over_seconds"] == [[[1.0] * 4] * 4, [[1.0] * 4] * 2 + [[None] * 4] * 2]  # 57 and 33 frames


def test_steady_motion():
    """Around every image the mean displacement counts; what is unknown is left out."""
    reading = oracle.read(chain([FIRST] * 40, 40)[None])
    steady = reading.steady_motion(8)
    assert steady.shape == (1, 40) and (steady == list(ATTRIBUTES["motion"]).index("right")).all()
    holes = dataclasses.replace(reading, displacement=reading.displacement.clone())
    holes.displacement[:, 10:14] = torch.nan
    assert (holes.steady_motion(8) == steady).all()
    holes.displacement[:, 4:30] = torch.nan
    assert (holes.steady_motion(8)[0, 10:24] == -1).all()
