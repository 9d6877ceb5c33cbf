"""The world is what it says, and its oracle reads every render."""

import pytest
import torch

from longlive.miniature import oracle
from longlive.miniature.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    FPS,
    RADII,
    SHADE,
    SIZE,
    SPEED,
    Captioned,
    Identity,
    all_captioned,
    draw_identity,
    held_out,
    render,
    training_set,
    validation_set,
)  # fmt: skip

RED_CIRCLE = Captioned("circle", "red", "black", "right")


def test_oracle_reads_at_least_99_of_100_renders():
    captions = all_captioned()
    generator = torch.Generator().manual_seed(0)
    reading = oracle.read(render(captions, [draw_identity(generator) for _ in captions], 5))
    for name, right in reading.correct(captions).items():
        assert right.float().mean() >= 0.99, name
    assert (reading.iou > 0.8).all()


def test_oracle_reads_identity():
    identities = [Identity(radius, x, y, light) for radius, x, y, light in ((10.0, 0, 62, 0), (12.0, 30, 2, 3), (14.0, 63 // 2 * 2, 40, 6))]
    reading = oracle.read(render([RED_CIRCLE] * 3, identities, 4))
    position = torch.tensor([[i.x, i.y] for i in identities]).float()
    apart = (reading.position[:, 0] - position + SIZE / 2) % SIZE - SIZE / 2
    assert apart.abs().max() < 1
    assert (reading.radius[:, 0] - torch.tensor([i.radius for i in identities])).abs().max() < 0.6
    torch.testing.assert_close(reading.displacement, torch.tensor([float(SPEED), 0.0]).expand(3, 3, 2), atol=0.05, rtol=0)


def test_oracle_does_not_name_what_is_not_there():
    blank = torch.full((1, 3, 3, SIZE, SIZE), 12, dtype=torch.uint8)
    assert (oracle.read(blank).shape == -1).all() and oracle.read(blank).verdict(0) is None
    noise = torch.randint(0, 256, (2, 3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert (oracle.read(noise).shape == -1).all()
    blur = render([Captioned("square", "red", "black", "still")], [Identity(10.0, 32, 32, 0)], 2).float()
    blur = torch.nn.functional.avg_pool2d(blur[0], 25, 1, 12)[None].to(torch.uint8)
    assert (oracle.read(blur).shape != ATTRIBUTES["shape"].index("square")).all()
    with pytest.raises(ValueError, match="the oracle reads uint8"):
        oracle.read(blank.float())


def test_a_switch_changes_one_attribute_and_the_position_runs_on():
    after = RED_CIRCLE.with_one_change("color", "cyan")
    video = render([[RED_CIRCLE] * 6 + [after] * 6], [Identity(12.0, 60, 20, 2)], 12)
    plain = render([RED_CIRCLE], [Identity(12.0, 60, 20, 2)], 12)
    assert torch.equal(video[:, :6], plain[:, :6]) and not torch.equal(video[:, 6:], plain[:, 6:])
    reading = oracle.read(video)
    assert reading.verdict(0, slice(0, 6)) == RED_CIRCLE and reading.verdict(0, slice(6, 11)) == after
    torch.testing.assert_close(reading.displacement[0], torch.tensor([float(SPEED), 0.0]).expand(11, 2), atol=0.1, rtol=0)


def test_the_world_is_a_torus_that_repeats():
    frames = SIZE // SPEED
    video = render([RED_CIRCLE], [Identity(14.0, 6, 8, 1)], frames + 1)
    assert torch.equal(video[:, 0], video[:, frames])
    area = [(video[0, t].float().sum(0) > 60).sum() for t in range(frames)]
    assert max(area) - min(area) <= 2  # nothing is lost at the borders


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_every_shape_has_the_same_area(shape):
    for radius in RADII:
        image = render([Captioned(shape, "yellow", "black", "still")], [Identity(radius, 32, 32, 0)], 1)[0, 0, 0].float()
        coverage = ((image - BACKGROUNDS["black"][0]) / (COLORS["yellow"][0] * (1 - SHADE / 2))).sum()
        assert abs(coverage / (torch.pi * radius**2) - 1) < 0.06


def test_held_out_combinations_are_never_trained_on():
    assert not set(held_out(100)) & set(training_set(100))
    assert len(held_out(100)) + len(training_set(100)) == len(all_captioned()) == 750
    for name, values in ATTRIBUTES.items():
        assert {getattr(c, name) for c in training_set()} == set(values)
    assert held_out(16) == held_out(100)[:16]
    assert not set(validation_set(50)) & (set(held_out(100)) | set(training_set(150)))
    assert len(validation_set(50)) == 50 and {c.shape for c in validation_set(50)} == set(ATTRIBUTES["shape"])


def test_what_is_not_in_the_world_is_refused():
    with pytest.raises(ValueError, match="shape 'blob' is not in this world; choose from circle"):
        Captioned("blob", "red", "black", "right")
    with pytest.raises(ValueError, match="one entry for each of the 5 pixel frames"):
        render([[RED_CIRCLE] * 4], [Identity(12.0, 0, 0, 0)], 5)
    assert FPS == 16
