"""VBench's totals from published figures; measures that need no weights, on videos whose answer is known."""

import json

import numpy as np
import pytest

from longlive import video
from longlive.evaluation import metrics, vbench_score
from longlive.evaluation.__main__ import main
from longlive.evaluation.vbench_score import DIMENSIONS, PUBLISHED, PUBLISHED_LONG, read_results, score, table, total

MIDDLE = {name: (one.low + one.high) / 2 for name, one in DIMENSIONS.items()}


@pytest.mark.parametrize("row", [*PUBLISHED.values(), *PUBLISHED_LONG.values()])
def test_published_rows_follow_from_their_parts(row):
    assert total(row.quality, row.semantic) == pytest.approx(row.total, abs=0.011)  # three roundings


def test_ends_and_middle():
    assert score({name: one.low for name, one in DIMENSIONS.items()}) == pytest.approx((0, 0, 0))
    assert score({name: one.high for name, one in DIMENSIONS.items()}) == pytest.approx((100, 100, 100))
    assert score(MIDDLE) == pytest.approx((50, 50, 50))


def test_weights():
    """Dynamic degree counts half: 0.5 of 6.5; a semantic dimension 1 of 9."""
    more = score(MIDDLE | {"dynamic_degree": 1.0})
    assert more.quality - 50 == pytest.approx(100 * 0.5 * 0.5 / 6.5) and more.semantic == pytest.approx(50)
    more = score(MIDDLE | {"scene": 0.8222})
    assert more.semantic - 50 == pytest.approx(50 / 9) and more.total - 50 == pytest.approx(50 / 9 / 5)
    assert score(MIDDLE | {"motion_smoothness": 0.9975}).quality - 50 == pytest.approx(50 / 6.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scene": None, "color": None}, "2 of 16 dimensions are missing: color, scene"),
        ({"colour": 0.5}, "colour is no dimension of VBench"),
        ({"imaging_quality": 67.2}, "imaging_quality is 67.2; dimensions lie between 0 and 1"),
        ({"scene": float("nan")}, "scene is nan"),
    ],
)
def test_what_has_no_total(change, words):
    results = {name: value for name, value in (MIDDLE | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        score(results)


def test_results_of_vbench_are_read_from_several_files(tmp_path):
    names = list(MIDDLE)
    for number, part in enumerate((names[:5], names[5:])):
        content = {name: [MIDDLE[name], [{"video_path": "a.mp4", "video_results": MIDDLE[name]}]] for name in part}
        (tmp_path / f"run{number}_eval_results.json").write_text(json.dumps(content))
    assert read_results(tmp_path) == MIDDLE
    assert "| **mine** | **50.00** |" in table(read_results(tmp_path), name="mine")
    partly = table({"scene": 0.4})
    assert "**" not in partly and "| color | semantic × 1 | missing |" in partly and "LongLive (published) | 84.87" in partly
    (tmp_path / "again_eval_results.json").write_text(json.dumps({"scene": [0.9, []]}))
    with pytest.raises(ValueError, match="scene is"):
        read_results(tmp_path)
    (tmp_path / "again_eval_results.json").write_text("[")
    with pytest.raises(ValueError, match="no result of vbench"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="holds no results"):
        read_results(tmp_path / "nowhere")
    assert vbench_score.Row._fields == ("total", "quality", "semantic")


def rising(count, step=2):
    """Every pixel grows by `step` from image to image."""
    return np.broadcast_to((10 + step * np.arange(count))[:, None, None, None], (count, 8, 8, 3)).astype(np.uint8)


def test_flicker_of_known_videos():
    assert metrics.temporal_flickering(rising(20)) == pytest.approx((255 - 2) / 255)
    assert metrics.temporal_flickering(np.zeros((5, 4, 4, 3), np.uint8)) == 1.0
    noise = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    assert metrics.temporal_flickering(noise) == pytest.approx(1 - 85.33 / 255, abs=0.01)  # mean |a - b| of uniform bytes


def test_flicker_at_borders():
    images = rising(33, 1).copy()
    images[21:] += 9  # the step into image 21 is ten times the others
    assert metrics.block_borders(33) == [9, 21] and metrics.block_borders(9) == []
    assert metrics.border_flicker(images, [21]) == pytest.approx(10)
    assert metrics.border_flicker(images, [9]) == pytest.approx(1)
    assert np.isnan(metrics.border_flicker(images, [])) and np.isnan(metrics.border_flicker(images, [0, 40]))
    measured = metrics.measure(images, switches=[21])
    assert measured.switch_flicker == pytest.approx(10) and measured.block_flicker == pytest.approx(1) and measured.images == 33


def test_colour_drift_and_collapse():
    red, blue = (np.full((40, 8, 8, 3), colour, np.uint8) for colour in ((200, 10, 10), (10, 10, 200)))
    drift = metrics.colour_drift(np.concatenate([red, blue]))
    assert drift[:40].max() == 0 and drift[40:].min() == 1
    noise = np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    away = metrics.sink_similarity(noise)
    assert away[:9] == pytest.approx(1, abs=1e-5) and away[9:].max() < 0.6
    back = noise.copy()
    back[50:] = noise[:10]
    assert metrics.sink_similarity(back)[50:59].min() > 0.99


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 3), np.uint8), np.zeros((3, 4, 4, 3)), np.zeros((3, 4, 4), np.uint8)])
def test_what_is_no_video(images):
    with pytest.raises(ValueError, match=r"at least two|uint8"):
        metrics.changes(images)


def test_the_commands(tmp_path, capsys):
    with video.VideoWriter(tmp_path / "a.mp4", crf=0) as writer:
        writer.write(np.repeat(np.repeat(rising(33), 4, 1), 4, 2))
    (tmp_path / "a.json").write_text(json.dumps({"prompts": [{"image": 0, "prompt": "x"}, {"image": 21, "prompt": "y"}]}))
    assert main(["measure", str(tmp_path / "a.mp4")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 33 and found["motion"] == pytest.approx(2, abs=0.3) and found["switch_flicker"] == pytest.approx(1, abs=0.5)
    (tmp_path / "all_eval_results.json").write_text(json.dumps({name: [value, []] for name, value in MIDDLE.items()}))
    assert main(["score", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["total"] == 50
    (tmp_path / "all_eval_results.json").write_text(json.dumps({"scene": [0.4, []]}))
    assert main(["score", str(tmp_path)]) == 2 and "15 of 16 dimensions are missing" in capsys.readouterr().err
    assert main(["measure", str(tmp_path / "b.mp4")]) == 2 and "cannot be read as a video" in capsys.readouterr().err
