"""VBench's totals from published figures; measures that need no weights, on videos whose answer is known."""

import json

import numpy as np
import pytest

from longlive import video
from longlive.evaluation import pixel_metrics
from longlive.evaluation.__main__ import main
from longlive.evaluation.pixel_metrics import reduce_video
from longlive.evaluation.vbench_score import DIMENSIONS, PUBLISHED, dimension_table, parts, read_results, score, total_table

TOTALS = ("total", "quality", "semantic")
MIDDLE = {name: (one.low + one.high) / 2 for name, one in DIMENSIONS.items()}


@pytest.mark.parametrize("row", [*PUBLISHED["vbench"].values(), *PUBLISHED["vbench_long"].values()])
def test_published_rows_follow_from_their_parts(row):
    total, quality, semantic = row
    percent = {"quality": quality, "semantic": semantic}
    results = {name: one.low + percent[one.part] / 100 * (one.high - one.low) for name, one in DIMENSIONS.items()}
    assert parts(results) == pytest.approx({**percent, "total": total}, abs=0.011)  # three roundings


def test_ends_and_middle():
    assert score({name: one.low for name, one in DIMENSIONS.items()}) == pytest.approx(dict.fromkeys(TOTALS, 0))
    assert score({name: one.high for name, one in DIMENSIONS.items()}) == pytest.approx(dict.fromkeys(TOTALS, 100))
    assert score(MIDDLE) == pytest.approx(dict.fromkeys(TOTALS, 50))


def test_weights():
    """Dynamic degree counts half: 0.5 of 6.5; a semantic dimension 1 of 9."""
    more = score(MIDDLE | {"dynamic_degree": 1.0})
    assert more["quality"] - 50 == pytest.approx(100 * 0.5 * 0.5 / 6.5) and more["semantic"] == pytest.approx(50)
    more = score(MIDDLE | {"scene": 0.8222})
    assert more["semantic"] - 50 == pytest.approx(50 / 9) and more["total"] - 50 == pytest.approx(50 / 9 / 5)
    assert score(MIDDLE | {"motion_smoothness": 0.9975})["quality"] - 50 == pytest.approx(50 / 6.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scene": None, "color": None}, "2 of 16 dimensions are missing: color, scene"),
        ({"colour": 0.5}, "colour is no dimension of VBench"),
        ({"imaging_quality": 67.2}, "imaging_quality is 67.2; dimensions are between 0 and 1"),
        ({"scene": float("nan")}, "scene is nan"),
    ],
)
def test_what_has_no_total(change, words):
    results = {name: value for name, value in (MIDDLE | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        score(results)


def results(**averages):
    """The content of a result of vbench, of one video each."""
    return json.dumps({name: [value, [{"video_path": "a.mp4", "video_results": value}]] for name, value in averages.items()})


def test_results_of_vbench_are_read_from_several_files(tmp_path):
    names = list(MIDDLE)
    for number, part in enumerate((names[:5], names[5:])):
        (tmp_path / f"run{number}_eval_results.json").write_text(results(**{name: MIDDLE[name] for name in part}))
    assert read_results(tmp_path) == MIDDLE
    assert "| **mine** | **50.00** |" in total_table(read_results(tmp_path), name="mine", published=PUBLISHED["vbench"])
    partly = total_table({"scene": 0.4}, name="mine", published=PUBLISHED["vbench"])
    assert "**" not in partly and "LongLive (published) | 84.87" in partly
    assert "| color | semantic × 1 | missing |" in dimension_table({"scene": 0.4})
    for content, words in (
        (results(scene=0.9), "scene is"),
        ("[", "no result of vbench"),
        ("5", "no result of vbench"),
        ('{"scene": [0.9, []]}', "of 0 videos"),
    ):
        (tmp_path / "again_eval_results.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_results(tmp_path)
    with pytest.raises(ValueError, match="contains no results"):
        read_results(tmp_path / "nowhere")


def rising(count, step=2):
    """Every pixel grows by `step` from image to image."""
    return np.broadcast_to((10 + step * np.arange(count))[:, None, None, None], (count, 8, 8, 3)).astype(np.uint8)


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def test_flicker_of_known_videos():
    assert pixel_metrics.temporal_flickering(reduce_video(rising(20))) == pytest.approx((255 - 2) / 255)
    assert pixel_metrics.temporal_flickering(reduce_video(np.zeros((5, 4, 4, 3), np.uint8))) == 1.0
    assert pixel_metrics.temporal_flickering(reduce_video(noise(300))) == pytest.approx(
        1 - 85.33 / 255, abs=0.01
    )  # mean |a - b| of uniform bytes


def test_flicker_at_block_starts():
    images = rising(33, 1).copy()
    images[21:] += 9  # the step into image 21 is ten times the others
    found = reduce_video(images)
    assert pixel_metrics.block_starts(33) == [9, 21] and pixel_metrics.block_starts(9) == []
    assert pixel_metrics.relative_change(found, [21]) == pytest.approx(10)
    assert pixel_metrics.relative_change(found, [9]) == pytest.approx(1)
    assert np.isnan(pixel_metrics.relative_change(found, [])) and np.isnan(pixel_metrics.relative_change(found, [0, 40]))
    measured = pixel_metrics.measure(found, switches=[21])
    assert measured.switch_flicker == pytest.approx(10) and measured.block_flicker == pytest.approx(1) and measured.images == 33


def test_colour_drift_and_collapse():
    red, blue = (np.full((40, 8, 8, 3), colour, np.uint8) for colour in ((200, 10, 10), (10, 10, 200)))
    drift = pixel_metrics.colour_drift(reduce_video(np.concatenate([red, blue])))
    assert drift[:40].max() == 0 and drift[40:].min() == 1
    images = noise(60, seed=1)
    away = pixel_metrics.sink_similarity(reduce_video(images))
    assert away[:9] == pytest.approx(1, abs=1e-5) and away[9:].max() < 0.6
    images[50:] = images[:10]
    assert pixel_metrics.sink_similarity(reduce_video(images))[50:59].min() > 0.99


def test_loops():
    """Something that comes back is a loop; standing still and moving on are none."""
    images = noise(60, seed=2)
    assert pixel_metrics.loop_similarity(reduce_video(images), lag=20).max() < 0.9  # chance, of pictures of 64 pixels
    images[40:] = images[:20]
    back = pixel_metrics.loop_similarity(reduce_video(images), lag=20)
    assert back[:40].max() < 0.9 and back[40:].min() > 1.0  # all of the way back from no correlation
    assert pixel_metrics.loop_similarity(reduce_video(np.repeat(images[:1], 60, 0)), lag=20).max() == pytest.approx(0, abs=1e-6)
    assert pixel_metrics.loop_similarity(reduce_video(images), lag=59)[:59].max() == 0


def test_memory_does_not_grow_with_pixels():
    """What is kept of a large video is as much as of a small one."""
    large, small = (reduce_video(np.kron(noise(12), np.ones((1, k, k, 1), np.uint8))) for k in (16, 4))
    assert [one.shape for one in large] == [one.shape for one in small] == [(11,), (12, 512), (12, 12)]
    assert np.allclose(large.correlation, small.correlation, atol=0.02) and np.allclose(large.changes, small.changes)


@pytest.mark.parametrize(
    "images", [np.zeros((1, 4, 4, 3), np.uint8), np.zeros((3, 4, 4, 3)), np.zeros((3, 4, 4), np.uint8), [rising(1)[0], noise(1)[0, :4]]]
)
def test_what_is_no_video(images):
    with pytest.raises(ValueError, match=r"at least two|uint8|in a video of"):
        reduce_video(images)


def test_opencv_reads_colours_its_own_way(tmp_path):
    """BT.601 of a file that says BT.709: grey is the same, saturated colours are not."""
    red, grey = (np.broadcast_to(np.array(colour, np.uint8), (4, 16, 16, 3)) for colour in ((220, 20, 20), (120, 120, 120)))
    for name, images in (("red", red), ("grey", grey)):
        with video.VideoWriter(tmp_path / f"{name}.mp4", crf=0) as writer:
            writer.write(images)
    found = {name: np.stack(list(video.images_of(tmp_path / f"{name}.mp4", as_opencv=True))).astype(int) for name in ("red", "grey")}
    assert np.abs(found["grey"] - grey).max() <= 2
    red_709 = np.stack(list(video.images_of(tmp_path / "red.mp4"))).astype(int)
    assert np.abs(red_709 - red).max() <= 3 and np.abs(found["red"] - red).max() > 8


def test_the_commands(tmp_path, capsys, caplog):
    with video.VideoWriter(tmp_path / "a.mp4", crf=0) as writer:
        writer.write(np.repeat(np.repeat(rising(33), 4, 1), 4, 2))
    (tmp_path / "a.json").write_text(json.dumps({"prompts": [{"image": 0, "prompt": "x"}, {"image": 21, "prompt": "y"}]}))
    assert main(["measure", str(tmp_path / "a.mp4"), "--output", str(tmp_path / "pictures")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 33 and found["motion"] == pytest.approx(2, abs=0.3) and found["switch_flicker"] == pytest.approx(1, abs=0.5)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["a_over_time.png", "a_sheet.png"]
    (tmp_path / "all_eval_results.json").write_text(results(**MIDDLE))
    assert main(["score", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["total"] == 50
    assert main(["score", str(tmp_path), "--long"]) == 0 and "FramePack (published) | 81.95" in capsys.readouterr().out
    (tmp_path / "all_eval_results.json").write_text(results(scene=0.4))
    assert main(["score", str(tmp_path)]) == 2 and "15 of 16 dimensions are missing" in caplog.text
    assert main(["measure", str(tmp_path / "b.mp4")]) == 2 and "cannot be read as a video" in caplog.text
    (tmp_path / "a.json").write_text("{}")
    assert main(["measure", str(tmp_path / "a.mp4")]) == 2 and 'has no field "prompts"' in caplog.text
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path), "seconds=3"])
