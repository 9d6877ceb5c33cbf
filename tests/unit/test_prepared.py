"""A folder of prepared videos: what is wrong with it is found, and nothing is taken for finished that is not."""

import dataclasses
import json

import numpy as np
import pytest

from longlive import video
from longlive.evaluation.prepared import Prepared, claim, find_problems, finish_video, load_prepared, read_record, record_path
from longlive.evaluation.suites import Entry
from longlive.generation.prompt_files import Script

ENTRIES = tuple(
    Entry(index=i, name=name, script=Script("here", (name,)), samples=2, dimensions=("scene",)) for i, name in enumerate(("a cat", "a dog"))
)
PREPARED = Prepared(
    suite="vbench",
    prompt_list={"source": "here", "digest": "0", "dimensions": None, "limit": None, "samples": None},
    rewritten=None,
    seed=7,
    num_latent_frames=3,
    fps=16.0,
    block=3,
    model={"model": "tiny", "window": 9},
    weights=[{"file": "w", "sha256": "1"}],
    entries=ENTRIES,
    made_with=[{"commit": "a"}],
)


def write(path, images=9, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    with video.VideoWriter(path) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (images, size, size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    """All four videos."""
    claim(tmp_path, PREPARED)
    for planned in PREPARED.videos:
        write(tmp_path / "partial" / "0.mp4")
        finish_video(tmp_path, PREPARED, planned, tmp_path / "partial" / "0.mp4", {"rank": 0})
    return tmp_path


def test_round_trip(folder):
    assert load_prepared(folder) == PREPARED
    assert PREPARED.names == ["a cat-0", "a cat-1", "a dog-0", "a dog-1"]
    assert [planned.seed for planned in PREPARED.videos] == [7, 8, 10_007, 10_008]
    assert not find_problems(folder, PREPARED)
    assert sorted(path.name for path in (folder / "videos").iterdir()) == [f"{name}.mp4" for name in PREPARED.names]
    script = Script("here", ("a", "b"), durations=(1.0, 1.0))
    scripted = dataclasses.replace(PREPARED, num_latent_frames=None, entries=(dataclasses.replace(ENTRIES[0], script=script),))
    assert scripted.videos[0].num_latent_frames == 9 and scripted.prompt_starts(scripted.entries[0]) == [(0, "a"), (9, "b")]


def test_a_folder_of_an_earlier_version_has_temporal_stride_4(folder):
    content = json.loads((folder / "prepared.json").read_text())
    assert content.pop("temporal_stride") == 4 and dataclasses.replace(PREPARED, temporal_stride=2).videos[0].num_frames == 5
    (folder / "prepared.json").write_text(json.dumps(content))
    assert load_prepared(folder) == PREPARED
    claim(folder, PREPARED)
    with pytest.raises(ValueError, match="temporal_stride 4, this is 2"):
        claim(folder, dataclasses.replace(PREPARED, temporal_stride=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 8}, "seed 7, this is 8"),
        ({"num_latent_frames": 6}, "num_latent_frames 3, this is 6"),
        ({"model": {"model": "tiny", "window": 12}}, "model.window 9, this is 12"),
        ({"weights": [{"file": "w", "sha256": "2"}]}, r"other weights \(1 of them; the first that differs is number 1\)"),
        ({"entries": ENTRIES[:1]}, r"other entries \(2 then, 1 now; the first that differs is number 2\)"),
        ({"prompt_list": {**PREPARED.prompt_list, "digest": "1"}}, 'prompt_list.digest "0", this is "1"'),
        ({"rewritten": {"file": "x"}}, "rewritten null, this is"),
    ],
)
def test_a_folder_is_of_one_request(folder, change, words):
    before = (folder / "prepared.json").read_bytes()
    with pytest.raises(ValueError, match=words):
        claim(folder, dataclasses.replace(PREPARED, **change))
    assert (folder / "prepared.json").read_bytes() == before


def test_the_same_weights_elsewhere(folder):
    moved = {"weights": [{"file": "other/w", "changed": 9, "sha256": "1"}], "model": {**PREPARED.model, "model": "other"}}
    claim(folder, dataclasses.replace(PREPARED, **moved))
    assert load_prepared(folder).weights[0]["file"] == "other/w"


def test_what_it_was_made_with_is_added_up(folder):
    for commit in ("b", "a", "b"):
        claim(folder, dataclasses.replace(PREPARED, made_with=[{"commit": commit}], settings={"threads": 2}))
    assert load_prepared(folder).made_with == [{"commit": "a"}, {"commit": "b"}]


def test_missing_strangers_unreadable(folder):
    videos = folder / "videos"
    (videos / "a cat-1.mp4").rename(videos / "a cats-1.mp4")
    (videos / "a dog-0.mp4").write_bytes((videos / "a dog-0.mp4").read_bytes()[:100])
    assert find_problems(folder, PREPARED) == [
        "1 videos are missing: a cat-1.mp4",
        "1 files have names that no prompt of the list has: a cats-1.mp4",
        "  perhaps a cats-1.mp4 should be a cat-1.mp4",
        "1 videos cannot be read: a dog-0.mp4",
    ]
    assert len(find_problems(folder, PREPARED, counted=["a cat-0"])) == 1  # only the stranger
    assert [read_record(folder, name) is None for name in PREPARED.names] == [False, True, True, False]


@pytest.mark.parametrize(("images", "size"), [(12, 16), (9, 32)])
def test_mixed(folder, images, size):
    write(folder / "videos" / "a dog-1.mp4", images, size)
    (problem,) = find_problems(folder, PREPARED)
    assert f"not of one size and length (3 with 9 frames of 16x16, 1 with {images} frames of {size}x{size})" in problem


def test_half_a_video_is_not_taken(folder):
    write(folder / "partial" / "0.mp4", images=5)
    with pytest.raises(ValueError, match="has 5 frames instead of 9"):
        finish_video(folder, PREPARED, PREPARED.videos[-1], folder / "partial" / "0.mp4", {})
    record_path(folder, "a dog-1").unlink()  # killed between the video and its record
    assert read_record(folder, "a dog-1") is None and not find_problems(folder, PREPARED)
    record_path(folder, "a dog-1").write_text("{")
    assert read_record(folder, "a dog-1") is None


@pytest.mark.parametrize("content", ["{", "{}", json.dumps({"format": 1}), json.dumps({"format": 0})])
def test_what_is_no_prepared_folder(tmp_path, content):
    with pytest.raises(ValueError, match="run `prepare` first"):
        load_prepared(tmp_path)
    (tmp_path / "prepared.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read|another version"):
        load_prepared(tmp_path)
