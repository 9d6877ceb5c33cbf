"""What validation of the miniature shows and measures: combinations kept for it, by attribute and by kind of switch; batches."""

import pytest
import torch

from longlive.cache.window import Window
from longlive.checkpoints import store
from longlive.config import DistillationConfig
from longlive.generation.cues import PromptSchedule
from longlive.generation.dimensions import Timing
from longlive.generation.pipeline import BUNDLED
from longlive.generation.transition import Transition
from longlive.miniature.captions import canonical, parse
from longlive.miniature.world import ATTRIBUTES, SHAPES, Captioned, draw_identity, held_out, render, validation_set
from longlive.models.text import TextEncoder
from longlive.training import stages
from longlive.training.networks import load_network
from longlive.training.validation import Preview, miniature_schedules, read_by_oracle

FRAMES, MIDDLE = 30, 15


def captions_of(schedule):
    return [Captioned(**parse(cue.prompt)) for cue in schedule.cues]


def rendered(schedules, *, num_latent_frames=FRAMES, late=0):
    """Exact videos, uint8 [N, T, Y, X, 3], that follow a switch `late` images later."""
    timing, generator = Timing(), torch.Generator().manual_seed(0)
    length, said = timing.num_frames(num_latent_frames), []
    for schedule in schedules:
        starts = [timing.first_frame(cue.latent_frame) + (late if cue.latent_frame else 0) for cue in schedule.cues]
        said.append([captions_of(schedule)[sum(start <= t for start in starts) - 1] for t in range(length)])
    return render(said, [draw_identity(generator) for _ in schedules], length).movedim(2, -1)


def test_validation_shows_what_neither_the_test_nor_the_training_has():
    singles, switching = miniature_schedules(24, switch_at=None), miniature_schedules(10, switch_at=MIDDLE)
    assert [captions_of(schedule) for schedule in singles] == [[caption] for caption in validation_set()[:24]]
    assert len(switching) == 10 and {schedule.cues[1].latent_frame for schedule in switching} == {MIDDLE}
    for number, (before, after) in enumerate(map(captions_of, switching)):
        assert after in validation_set() and not {before, after} & set(held_out())
        assert [name for name in ATTRIBUTES if getattr(before, name) != getattr(after, name)] == [tuple(ATTRIBUTES)[number % 4]]
    with pytest.raises(ValueError, match="validation_videos 51: the miniature has 50 combinations"):
        miniature_schedules(51, switch_at=None)


@pytest.mark.parametrize(
    "settings, lengths",
    [
        ({"oracle": True}, [1] * 6),
        ({"oracle": True, "switch_at": (12,)}, [2] * 6),
        ({"switch_at": (12,), "num_switches": 2}, [3] * 2),
        ({"switch_at": (12,)}, [2] * 2),
        ({}, [1] * 2),
    ],
)
def test_a_stage_validates_on_the_world_or_on_its_first_prompts(settings, lengths):
    config = DistillationConfig(validation_videos=6, validation_frames=30, **settings)
    schedules = stages._schedules(config, [("a", "b", "c", "d"), ("e", "f", "g", "h")])
    assert [len(schedule.cues) for schedule in schedules] == lengths
    if config.oracle:
        assert {captions_of(schedule)[-1] for schedule in schedules} <= set(validation_set())
    else:
        starts = {1: [0], 2: [0, 15], 3: [0, 9, 18]}[lengths[0]]
        assert [(cue.latent_frame, cue.prompt) for cue in schedules[1].cues] == list(zip(starts, "efg"))


def test_perfect_videos_are_right_by_attribute_value_and_kind_of_switch():
    schedules = miniature_schedules(8, switch_at=MIDDLE)
    found = read_by_oracle(rendered(schedules), schedules)
    shapes = {captions_of(schedule)[-1].shape for schedule in schedules}
    assert {f"oracle/shape/{shape}" for shape in SHAPES if shape in shapes} <= found.keys()
    assert {f"switch/{what}/{kind}" for what in ("new", "kept", "lost") for kind in ATTRIBUTES} <= found.keys()
    assert found["oracle/all"] == found["switch/right"] == found["switch/light"] == found["switch/new/motion"] == 1
    assert found["switch/lost"] == 0 and found["oracle/iou"] > 0.9


def test_what_comes_too_late_is_wrong_at_the_switch_and_right_at_the_end():
    schedules = miniature_schedules(8, switch_at=MIDDLE)
    found = read_by_oracle(rendered(schedules, late=30), schedules)
    assert found["oracle/all"] == 1 and found["switch/right"] == found["switch/new"] == found["switch/new/shape"] == 0
    assert found["switch/kept"] == 1


def test_every_switch_of_a_chain_counts_when_it_is_shown_long_enough():
    first = validation_set()[0]
    second = first.with_one_change("color", "red" if first.color != "red" else "blue")
    third = second.with_one_change("motion", "up" if first.motion != "up" else "down")
    prompts = [canonical(one) for one in (first, second, third)]
    chain, hasty = (PromptSchedule.at_latent_frames(prompts, frames) for frames in ([9, 18], [9, 12]))
    found = read_by_oracle(rendered([chain]), [chain])
    assert found["switch/new/color"] == found["switch/new/motion"] == 1 and "switch/new/shape" not in found
    found = read_by_oracle(rendered([hasty]), [hasty])
    assert "switch/new/color" not in found and found["switch/new/motion"] == 1
    single = miniature_schedules(2, switch_at=None)
    assert not any(name.startswith("switch/") for name in read_by_oracle(rendered(single), single))


def test_a_batch_is_the_videos_one_by_one(tmp_path):
    """Of the miniature: two that switch at the same frame are made together, the third by itself, each with its own noise."""
    folder = BUNDLED["miniature"]
    network, vae = load_network(folder).eval(), store.load_vae(folder).eval()
    encode = TextEncoder(*store.load_text_encoder(folder), text_len=network.config.text_len).encode
    schedules = [*miniature_schedules(2, switch_at=6), *miniature_schedules(1, switch_at=None)]
    settings = {"window": Window.of(9, 3), "block": 3, "steps": [1000.0, 600.0], "num_latent_frames": 9, "height": 64, "width": 64}
    made = []
    for batch in (1, 8):
        preview = Preview(
            [schedules[0], schedules[2], schedules[1]],
            vae,
            encode,
            **settings,
            transition=Transition(),
            seed=5,
            batch=batch,
            measure=lambda videos, schedules: made.append(videos) or {"videos": float(len(videos))},
        )
        assert preview(network, tmp_path, batch) == {"videos": 3.0}
    assert (made[0].int() - made[1].int()).abs().max() <= 2 and not made[0][0].equal(made[0][2])
    names = {f"step_{batch:06d}{rest}" for batch in (1, 8) for rest in (".png", "_0.mp4", "_1.mp4", "_2.mp4")}
    assert {path.name for path in tmp_path.iterdir()} == names
