"""Latents of the state world are what they say, and its reader reads them all."""

import math

import pytest
import torch

from experiments.state_world import (
    CELLS,
    DRAWN,
    IDENTITY,
    StateIdentity,
    captions_of,
    draw_identity,
    latents,
    negative,
    read,
    tables,
    text_of,
    to_images,
)  # fmt: skip
from longlive.miniature import oracle
from longlive.miniature.world import LATTICE, RADII, Captioned, Identity, all_captioned, held_out, render

RED_CIRCLE = Captioned("circle", "red", "black", "right")


@pytest.fixture(scope="module")
def everything():
    """Every caption with an identity, and their latents of four frames."""
    generator = torch.Generator().manual_seed(0)
    captions = all_captioned()
    identities = [draw_identity(generator) for _ in captions]
    return captions, identities, latents(captions, identities, 4)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_reader_is_right_on_every_caption(everything, noise):
    captions, identities, x0 = everything
    noisy = x0 + noise * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    reading = read(noisy)
    for name, right in reading.correct(captions).items():
        assert right.all(), name
    for name, right in reading.correct_frames(captions).items():
        assert right.float().mean() > (0.999 if noise else 0.99999), name
    for name in IDENTITY:
        beside = (getattr(reading, name)[:, 0] - torch.tensor([getattr(i, name) for i in identities])).abs()
        beside = torch.minimum(beside, IDENTITY[name] - beside)
        right = beside <= (4 if noise and name == "texture" else 0)  # of 64 directions
        assert right.float().mean() > (0.999 if noise else 0.99999), name
    assert (reading.residual - noise).abs().max() < (0.15 if noise else 1e-5)
    assert (reading.jump(captions) < (1.5 if noise else 1e-4)).all()


def test_every_element_has_mean_0_and_variance_1_over_the_world(everything):
    generator = torch.Generator().manual_seed(2)
    identities = [draw_identity(generator) for _ in range(3750)]
    many = latents(all_captioned() * 5, identities, 1)
    assert (many.var(dim=0) - 1).abs().max() < 0.1 and many.mean(dim=0).abs().max() < 0.1
    assert (many.flatten(1).square().mean(dim=1) - 1).abs().max() < 1e-5  # every state has the same norm
    per_element = sum(table.square().mean(dim=0) for table in tables().values())
    torch.testing.assert_close(per_element, torch.ones_like(per_element))


def test_attributes_do_not_disturb_each_other():
    parts = tables()
    assert {name: len(table) for name, table in parts.items()} == DRAWN
    for name, table in parts.items():
        assert table.sum(dim=0).abs().max() < 1e-12
        for other in parts.keys() - {name}:
            assert (table @ parts[other].T).abs().max() < 1e-12
        apart = torch.cdist(table, table) + 99 * torch.eye(len(table))
        assert apart.min() > (0.15 if name == "texture" else 1.1) * table[0].norm()


def test_the_embedding_stays_what_trained_weights_know():
    frame = latents([RED_CIRCLE], [StateIdentity(2, 5, 1, 6)], 1).flatten()
    torch.testing.assert_close(frame[:4], torch.tensor([-0.98195, -2.09859, -1.82745, 2.59023]), atol=1e-4, rtol=0)
    torch.testing.assert_close(text_of([RED_CIRCLE])[0, :2, 0], torch.tensor([-1.24754, -0.20205]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("attribute", "value"), [("color", "cyan"), ("motion", "up")])
def test_a_switch_changes_one_attribute_and_the_position_runs_on(attribute, value):
    after = RED_CIRCLE.with_one_change(attribute, value)
    captions, identity = [RED_CIRCLE] * 6 + [after] * 6, StateIdentity(1, 3, 6, 2)
    video, plain = latents([captions], [identity], 12), latents([RED_CIRCLE], [identity], 12)
    assert torch.equal(video[:, :6], plain[:, :6]) and not torch.equal(video[:, 6:], plain[:, 6:])
    reading = read(video)
    assert reading.jump([captions]).max() < 1e-4
    assert all(right.all() for right in reading.correct_frames([captions]).values())
    assert all(right.all() for right in reading.correct([after], slice(6, None)).values())
    assert not reading.correct([after], slice(0, 6))[attribute].any()
    assert not any(changed.any() for changed in reading.identity_changed(slice(0, 6)).values())
    torch.testing.assert_close(latents([captions], [identity], 5, start=7), video[:, 7:])


def test_the_world_is_a_torus_that_repeats():
    video = latents([RED_CIRCLE], [StateIdentity(0, 0, 5, 5)], CELLS + 1)
    assert torch.equal(video[:, 0], video[:, CELLS])
    assert read(video).x[0].tolist() == [5, 6, 7, 0, 1, 2, 3, 4, 5] and (read(video).y == 5).all()


def test_another_identity_is_noticed():
    one, other = (latents([RED_CIRCLE], [identity], 6) for identity in (StateIdentity(0, 1, 2, 3), StateIdentity(2, 1, 4, 3)))
    reading = read(torch.cat([one, other], dim=1))
    changed = reading.identity_changed(slice(0, 6))
    assert changed["size"][0].tolist() == [False] * 6 + [True] * 6 and not changed["texture"].any()
    jump = reading.jump([RED_CIRCLE])[0]
    assert jump[6] == pytest.approx(4, abs=1e-3) and jump[:6].max() < 1e-3  # expected at 8 = 0, found at 4
    assert reading.motion[0, 6] == -1


def test_light_turns_a_little_or_far():
    one, near, far = (latents([RED_CIRCLE], [StateIdentity(0, texture, 2, 3)], 3) for texture in (63, 1, 31))
    reading = read(torch.cat([one, near, far], dim=1))
    turned = reading.turned(slice(0, 3))[0]
    torch.testing.assert_close(turned, torch.tensor([0.0] * 3 + [11.25] * 3 + [180.0] * 3), atol=1e-2, rtol=0)
    assert reading.identity_changed(slice(0, 3))["texture"][0].tolist() == [False] * 6 + [True] * 3
    with pytest.raises(ValueError, match="of 9 frames selects none"):
        reading.turned(slice(9, 12))


def test_what_is_not_there_is_not_named(everything):
    captions, _, x0 = everything
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    for nothing in (torch.zeros_like(x0), noise, torch.full_like(x0, torch.nan)):
        reading = read(nothing)
        assert not any(right.any() for right in reading.correct(captions).values())
        assert not (reading.residual <= 0.8).any()
    blue = latents([RED_CIRCLE.with_one_change("color", "blue")], [StateIdentity(0, 0, 0, 0)], 3)
    between = read((blue + latents([RED_CIRCLE], [StateIdentity(0, 0, 0, 0)], 3)) / 2)
    assert (between.color == -1).all() and (between.shape == 0).all() and 0.2 < between.residual.mean() < 0.4


def test_images_are_those_of_the_pixel_world():
    generator = torch.Generator().manual_seed(4)
    captions = held_out(6)
    identities = [draw_identity(generator) for _ in captions]
    drawn = to_images(latents(captions, identities, 3))
    same = [Identity(RADII[i.size], LATTICE * i.x, LATTICE * i.y, round(i.texture / 8) % 8) for i in identities]
    assert torch.equal(drawn, render(captions, same, 9)[:, ::4])
    assert (oracle.read(to_images(torch.zeros(1, 2, 8, 4, 4))).shape == -1).all()


def test_words_are_read_back():
    captions = all_captioned()
    text = text_of(captions, 6, 32)
    assert text.shape == (750, 6, 32) and captions_of(text) == captions
    assert captions_of(text.bfloat16()) == captions
    assert captions_of(torch.cat([negative(1), text_of([RED_CIRCLE])])) == [None, RED_CIRCLE]
    blend = (text_of([RED_CIRCLE]) + text_of([RED_CIRCLE.with_one_change("shape", "ring")])) / 2
    with pytest.raises(ValueError, match=r"rows \[1\] are not captions"):
        captions_of(torch.cat([text_of([RED_CIRCLE]), blend]))
    with pytest.raises(ValueError, match="3 tokens cannot hold"):
        text_of(captions, 3)


def test_identities():
    assert math.prod(IDENTITY.values()) == 12288
    generator = torch.Generator().manual_seed(5)
    drawn = [draw_identity(generator) for _ in range(1000)]
    for name, count in IDENTITY.items():
        assert {getattr(i, name) for i in drawn} == set(range(count))
    with pytest.raises(ValueError, match=r"texture 64 is not in this world; choose from 0\.\.63"):
        StateIdentity(0, 64, 0, 0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one entry for each of the 5 frames, not 4"):
        latents([[RED_CIRCLE] * 4], [StateIdentity(0, 0, 0, 0)], 3, start=2)
    with pytest.raises(ValueError, match="2 captions for 1 identities"):
        latents([RED_CIRCLE] * 2, [StateIdentity(0, 0, 0, 0)], 3)
    with pytest.raises(ValueError, match=r"latents are \[B, F, 8, 4, 4\], got"):
        read(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="of 3 frames selects none"):
        read(torch.zeros(1, 3, 8, 4, 4)).correct([RED_CIRCLE], slice(3, 6))
