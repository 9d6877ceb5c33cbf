"""Settings fail at start, by name; what is not said keeps its default."""

from dataclasses import dataclass, field

import pytest

from longlive.config import InferenceConfig
from longlive.settings import load


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.0, 0.999)


@dataclass(frozen=True, kw_only=True)
class Nested:
    steps: int = 10
    optimizer: Optimizer = field(default_factory=Optimizer)


def test_defaults_file_words_and_flags_in_this_order(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\nheight: 480\nwidth: 832\ndenoising_steps: [1000, 500]\n")
    config = load(InferenceConfig, path, ["height=64", "width=64"], {"width": 128})
    assert (config.seed, config.height, config.width, config.num_samples) == (1, 64, 128, 1)
    assert config.denoising_steps == (1000, 500)
    assert load(InferenceConfig) == InferenceConfig()


def test_flags_are_taken_as_they_are():
    for text in ("a cat: the movie", "1", "${seed} [x]", "null", "a, b"):
        assert load(InferenceConfig, flags={"prompt": text}).prompt == text


def test_words():
    config = load(InferenceConfig, None, ["switch_frame_indices=[3,9]", "seconds=10", "relative_rope=true", "prompt=null"])
    assert config.switch_frame_indices == (3, 9) and config.seconds == 10.0 and config.relative_rope and config.prompt is None


def test_files_named_in_a_file_lie_beside_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("prompts: prompts.txt\noutput: videos")
    config = load(InferenceConfig, path)
    assert config.prompts == str(tmp_path / "prompts.txt") and config.output == "videos"
    assert load(InferenceConfig, path, ["prompts=other.txt"]).prompts == "other.txt"


def test_nested_schemas(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("optimizer:\n  lr: 3e-4\n")
    config = load(Nested, path, ["optimizer.betas=[0.9,0.99]"])
    assert config == Nested(optimizer=Optimizer(lr=3e-4, betas=(0.9, 0.99)))
    with pytest.raises(ValueError, match=r"'optimiser'; did you mean 'optimizer'"):
        load(Nested, None, ["optimiser.lr=1"])
    with pytest.raises(ValueError, match=r"'optimizer\.rl'; did you mean 'optimizer\.lr'"):
        load(Nested, None, ["optimizer.rl=1"])
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        load(Nested, None, ["optimizer.lr=fast"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sed=1", "the command line: there is no setting 'sed'; did you mean 'seed'?"),
        ("seed=one", "setting seed: Value 'one' of type 'str' could not be converted to Integer"),
        ("seed=1.5", "setting seed"),
        ("dtype=float8", "setting dtype: Invalid value 'float8'"),
        ("switch_frame_indices=[3,a]", "setting switch_frame_indices: [3, 'a'] has the wrong type"),
        ("switch_frame_indices=3", "setting switch_frame_indices"),
        ("keep_sink=perhaps", "setting keep_sink"),
        ("prompt", "write key=value"),
        ("=3", "write key=value"),
        ("seconds=[1", "cannot be read"),
        ("seconds=-1", "longer than 0"),
        ("seconds=nan", "longer than 0"),
        ("num_samples=0", "at least one"),
        ("denoising_steps=[500,1000]", "decreasing"),
        ("denoising_steps=[]", "decreasing"),
        ("denoising_steps.0=3", "setting denoising_steps: "),
        ("checkpoint=a.pt", "without wan_dir"),
        ("crf=70", "51"),
        ("seed=-1", "choose one from 0"),
    ],
)
def test_mistakes_are_named(word, message):
    with pytest.raises(ValueError) as caught:
        load(InferenceConfig, None, [word])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_contradictions():
    for words in (["prompt=a", "prompts=b"], ["seconds=1", "num_latent_frames=3"], ["model=a", "wan_dir=b"]):
        with pytest.raises(ValueError, match="choose one"):
            load(InferenceConfig, None, words)


def test_bad_files(tmp_path):
    path = tmp_path / "inference.yaml"
    path.write_text("seeed: 1")
    with pytest.raises(ValueError, match=r"inference\.yaml: there is no setting 'seeed'; did you mean 'seed'"):
        load(InferenceConfig, path)
    with pytest.raises(ValueError, match=r"no configuration at .*inferense.yaml.*inference.yaml"):
        load(InferenceConfig, tmp_path / "inferense.yaml")
    path.write_text("seed: 1\nwidth: [3\nheight: 2")
    with pytest.raises(ValueError, match="line 3"):
        load(InferenceConfig, path)
    path.write_text("- seed")
    with pytest.raises(ValueError, match="not a YAML file of settings"):
        load(InferenceConfig, path)
    path.write_text("")
    assert load(InferenceConfig, path) == InferenceConfig()
