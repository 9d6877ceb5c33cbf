"""CLIP score with a CLIP of random weights in transformers' layout: which images are looked at, and what is made of them."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longlive import video
from longlive.evaluation.clip_score import ClipScore, PromptInterval, prompt_intervals, sampled_frames


@pytest.fixture(scope="session")
def clip(clip_folder):
    return ClipScore(str(clip_folder), device=torch.device("cpu"))


def noise(seed, count=1):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_two_images_a_second_in_the_middle():
    parts = prompt_intervals(["a", "b"], [10.0, 5.0])
    assert parts == [PromptInterval(0.0, 10.0, "a"), PromptInterval(10.0, 15.0, "b")]
    looked = sampled_frames(parts[0], fps=16, num_frames=1000)
    assert len(looked) == 20 and looked[:3] == [4, 12, 20] and looked[-1] == 156
    assert sampled_frames(parts[1], fps=16, num_frames=1000)[0] == 164
    assert sampled_frames(parts[1], fps=16, num_frames=190) == [164, 172, 180, 188] and not sampled_frames(parts[1], fps=16, num_frames=100)


def test_a_score_is_the_mean_cosine(clip):
    one, two = noise(0)[0], noise(1)[0]
    scores = [clip.cosine([image], "a cat") for image in (one, two)]
    assert scores[0] != pytest.approx(scores[1]) and all(abs(score) <= 100 for score in scores)
    assert clip.cosine([one, two], "a cat") == pytest.approx(sum(scores) / 2, abs=1e-4)
    assert clip.cosine([one], "a dog") != pytest.approx(scores[0])


def test_the_end_of_a_long_prompt_is_not_read(clip):
    assert clip.max_tokens == 12 and clip.num_tokens("a b c") == 5
    assert clip.cosine(noise(0), "a b c d e f g h i j k") == clip.cosine(noise(0), "a b c d e f g h i j z z")
    assert clip.cosine(noise(0), "a b c") != clip.cosine(noise(0), "a b d")


def test_the_prompts_of_a_video(clip, tmp_path):
    """Each interval against its own prompt; one that the video does not reach has no score."""
    images = np.repeat(np.concatenate([noise(0), noise(1)]), 32, 0)
    with video.VideoWriter(tmp_path / "x.mp4", crf=0) as writer:
        writer.write(images)
    parts = prompt_intervals(["a cat", "a dog", "a cow"], [2.0, 2.0, 2.0])
    found = clip.score_video(tmp_path / "x.mp4", parts)
    read = video.read_video(tmp_path / "x.mp4")
    assert found[0] == pytest.approx(clip.cosine([read[4]], "a cat"), abs=0.2)
    assert found[1] == pytest.approx(clip.cosine([read[40]], "a dog"), abs=0.2) and np.isnan(found[2])


def test_other_weights_are_noticed(clip, clip_folder, tmp_path):
    """By their digest, wherever they lie; a file that lacks some is refused, since transformers would draw them at random."""
    shutil.copytree(clip_folder, tmp_path / "clip")
    assert ClipScore(str(tmp_path / "clip"), device=torch.device("cpu")).digest == clip.digest
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["visual_projection.weight"] += 1
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    assert ClipScore(str(tmp_path / "clip"), device=torch.device("cpu")).digest != clip.digest
    kept = {name: weight for name, weight in weights.items() if "visual" not in name}
    save_file(kept, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of CLIP's weights, visual_projection\.weight"):
        ClipScore(str(tmp_path / "clip"), device=torch.device("cpu"))


def test_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"there is no CLIP model .*hf download laion"):
        ClipScore(str(tmp_path / "nowhere"), device=torch.device("cpu"))
