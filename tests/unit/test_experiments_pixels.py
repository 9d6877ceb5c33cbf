"""The pixel world's measures read rendered videos as what they are; the recipe's page tells what its journals say."""

import json

import pytest
import torch

from experiments import pixels, recipe
from experiments.pixel_model import PixelModel, first_image
from experiments.videos import Cut, switch_pairs
from longlive.generation.pipeline import LongLivePipeline
from longlive.generation.transition import Transition
from longlive.miniature.world import MOTIONS, SPEED, Identity, render


def rendered(pairs, at, length, *, move=0, grow=0):
    """Exact videos that switch at image `at`, there `move` pixels off and `grow` pixels larger."""
    first = [Identity(10, 8 * n % 64, 24 * n % 64, n % 8) for n in range(len(pairs))]
    second = []
    for identity, pair in zip(first, pairs, strict=True):
        (ax, ay), (bx, by) = MOTIONS[pair.before.motion], MOTIONS[pair.after.motion]
        x, y = (start + SPEED * ((at - 1) * a + b) for start, a, b in ((identity.x, ax, bx), (identity.y, ay, by)))
        second.append(Identity(identity.radius + grow, (x + move) % 64, y % 64, identity.light))
    before = render([pair.before for pair in pairs], first, at)
    return torch.cat([before, render([pair.after for pair in pairs], second, length - at)], dim=1)


@pytest.fixture(scope="module")
def pairs():
    return switch_pairs(8)


AT, LENGTH = first_image(pixels.SWITCH), first_image(pixels.SWITCH + pixels.AFTER - 1) + 4


def test_a_perfect_switch_scores_perfectly(pairs):
    scores = pixels.switch_scores(rendered(pairs, AT, LENGTH), pairs)
    assert scores["adherence"].shape == (1, 8, pixels.AFTER // 3)
    assert scores["adherence"].mean() > 0.98 and scores["unchanged"].mean() > 0.98
    assert scores["size"].max() < 0.12 and scores["jump"].max() < 1.5


def test_a_late_switch_another_size_and_another_place_are_seen(pairs):
    late = pixels.switch_scores(rendered(pairs, AT + 24, LENGTH), pairs)
    assert late["adherence"][0, :, :2].mean() < 0.1 and late["adherence"][0, :, 3:].mean() > 0.95
    larger = pixels.switch_scores(rendered(pairs, AT, LENGTH, grow=4), pairs)
    assert larger["size"].min() > 0.3 and larger["jump"].max() < 1.5
    elsewhere = pixels.switch_scores(rendered(pairs, AT, LENGTH, move=20), pairs)
    assert elsewhere["jump"].min() > 18 and elsewhere["size"].max() < 0.12
    assert (elsewhere["flicker"] >= pixels.switch_scores(rendered(pairs, AT, LENGTH), pairs)["flicker"]).all()


def test_drift_is_seen_clip_by_clip(pairs):
    still = [pair._replace(after=pair.before) for pair in pairs]
    length = 1 + 3 * pixels.CLIP * 4
    video = rendered(still, length - 48, length, grow=4)
    scores = pixels.drift_scores(video, still)
    assert scores["size"].shape == (1, 8, 3) and scores["adherence"].mean() > 0.98
    assert scores["size"][..., :2].max() < 0.12 < 0.3 < scores["size"][..., 2].min()


def test_a_distilled_model_makes_the_same_videos_again_and_another_is_refused(pairs, tmp_path):
    pipe = LongLivePipeline.from_pretrained("miniature")
    for name, distilled in (("few", True), ("many", False)):
        pipe.register_to_config(fresh_noise=distilled, denoising_steps=(1000, 500))
        pipe.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="not distilled"):
        PixelModel(tmp_path / "many")
    model, captions = PixelModel(tmp_path / "few"), [pair.before for pair in pairs[:2]]
    images = model.make(captions, num_latent_frames=6, seed=1)
    assert images.shape == (2, 21, 3, 64, 64) and images.dtype == torch.uint8
    assert model.make(captions, num_latent_frames=6, seed=1).equal(images) and not model.make(captions, num_latent_frames=6, seed=2).equal(
        images
    )
    cut = Cut(3, [pair.after for pair in pairs[:2]], Transition(keep_sink=False, recache="clear"))
    switched = model.make(captions, num_latent_frames=6, seed=1, cut=cut)
    assert switched[:, :9].equal(images[:, :9]) and not switched[:, 9:].equal(images[:, 9:])


def journal(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_step_trained_twice_counts_once_and_validation_beside_it(tmp_path):
    loss = "teacher/short_loss"
    timed = [{"step": 10 * n, loss: value, "seconds_per_step": took} for n, value, took in ((1, 2.0, 0.5), (2, 9.0, 9.0), (2, 1.0, 1.0))]
    journal(tmp_path / "teacher", [*timed[:2], {"step": 20, "oracle/shape": 0.5}, timed[2]])
    found = recipe.read_journal(tmp_path / "teacher")
    assert found is not None and found.steps == 20 and found.seconds == 10 * 0.5 + 10 * 1.0
    assert found.values(loss) == ([10, 20], [2.0, 1.0]) and found.values("oracle/shape") == ([20], [0.5])
    assert recipe.read_journal(tmp_path / "long") is None


def test_the_recipe_page_needs_no_videos(tmp_path, capsys):
    rows = [{"step": s, "language/loss": 1 / s, "seconds_per_step": 0.1} for s in range(1, 9)]
    journal(tmp_path / "runs" / "language", rows)
    assert recipe.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert "| language | 8 |" in (tmp_path / "out" / "recipe.md").read_text()
    assert json.loads((tmp_path / "out" / "recipe.json").read_text())["language"]["language/loss"] == 1 / 8
    assert (tmp_path / "out" / "recipe.png").stat().st_size > 1000
    assert recipe.main(["--runs", str(tmp_path / "none")]) == 2 and "no stage has run" in capsys.readouterr().err


def test_smoothing_keeps_a_constant_and_the_length():
    assert recipe.smoothed([3.0] * 100) == [3.0] * 100
    assert recipe.smoothed([]) == []
