"""The same claims in pixels, with the miniature's own stages: `python -m experiments.pixels [--runs runs/miniature]`.

A single training: its numbers confirm those of the state world, and its pictures show them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments import ROOT
from experiments.measure import Scores, claim, line
from experiments.metrics import SwitchPair, estimate, image_change, per_block
from experiments.pixel_model import IMAGES, PixelModel, first_image, jump, radius_change, right
from experiments.report import Claim, Report, Table, write
from experiments.summary import summarize
from experiments.videos import Cut, switch_pairs
from longlive.cache.window import Window
from longlive.evaluation.charts import Panel
from longlive.generation.transition import Recache, Transition
from longlive.miniature import oracle
from longlive.miniature.captions import canonical
from longlive.miniature.world import ATTRIBUTES
from longlive.video import contact_sheet

SWITCH, AFTER = 24, 24  # frames
CLIP = 12
SEED = 9000
RESAMPLES = 2000
MODES: dict[str, Recache] = {"recache": "joint", "cache kept": "none", "cache cleared": "clear"}
SWITCH_METRICS = ("adherence", "unchanged", "size", "jump", "flicker")
DRIFT_METRICS = ("adherence", "overlap", "size", "jump")

compare = partial(claim, resamples=RESAMPLES)


def switch_scores(images: Tensor, pairs: list[SwitchPair]) -> Scores:
    """Scores of videos whose prompt switches at `SWITCH`: adherence per block of three frames, the others one value per video."""
    at, block = first_image(SWITCH), 3 * IMAGES
    reading, after = oracle.read(images), [pair.after for pair in pairs]
    shown = right(reading, after)
    changed = torch.stack([shown[pair.attribute][v] for v, pair in enumerate(pairs)])[:, at:]
    others = (sum(shown.values())[:, at:] - changed) / (len(ATTRIBUTES) - 1)  # type: ignore[index]
    past = slice(at - 2 * IMAGES, at)
    scores = {
        "adherence": per_block(changed, block),
        "unchanged": others.mean(dim=1),
        "size": radius_change(reading, past)[:, at:].mean(dim=1),
        "jump": jump(reading, after)[:, at],
        "flicker": image_change(images[:, at - 3 * IMAGES : at + 1], [pair.before for pair in pairs]),
    }
    return {name: values[None] for name, values in scores.items()}


def drift_scores(images: Tensor, pairs: list[SwitchPair]) -> Scores:
    """Scores of videos of one prompt, clip by clip, without the first image, which is alone in its latent frame."""
    reading, captions = oracle.read(images), [pair.before for pair in pairs]
    shown = torch.stack(list(right(reading, captions).values())).amin(dim=0)
    values = {
        "adherence": shown,
        "overlap": reading.iou,
        "size": radius_change(reading, slice(0, 3 * IMAGES)),
        "jump": jump(reading, captions),
    }
    length = CLIP * IMAGES
    return {
        name: torch.stack([part.mean(dim=1) for part in value[:, 1:].split(length, dim=1)], dim=1)[None] for name, value in values.items()
    }


def switches(model: PixelModel, videos: int, output: Path) -> tuple[dict[str, Scores], list[Claim]]:
    pairs, scores, shown = switch_pairs(videos), {}, {}
    for name, mode in MODES.items():
        cut = Cut(SWITCH, [pair.after for pair in pairs], Transition(keep_sink=False, recache=mode))
        images = model.make([pair.before for pair in pairs], num_latent_frames=SWITCH + AFTER, seed=SEED, cut=cut)
        scores[name], shown[name] = switch_scores(images, pairs), images[:4]
        logging.info("switch, %s: generated and read", name)
    at = first_image(SWITCH)
    picks = [at - 9, at - 1, at, at + 3, at + 7, at + 11, at + 23, at + 47]
    tiles, words = [], []
    for video, pair in enumerate(pairs[:4]):
        for name, images in shown.items():
            tiles += [images[video, pick].movedim(0, -1).numpy() for pick in picks]
            words += [f"{(pick - at) / model.fps:+.2f} s, {name}\n{canonical(pair.before if pick < at else pair.after)}" for pick in picks]
    contact_sheet(tiles, output / "pixels_switch.png", columns=len(picks), captions=words, title="a prompt switch, three ways")
    recache, kept, cleared = scores.values()
    claims = [
        compare("recache adheres more than cache kept, first block", "more", recache, kept, "adherence", at=0),
        compare("recache jumps less than cache cleared, pixels", "less", recache, cleared, "jump", margin=1.0),
        compare("recache keeps the size better than cache cleared", "less", recache, cleared, "size"),
        compare("recache flickers less than cache cleared", "less", recache, cleared, "flicker"),
    ]
    return scores, claims


def lasting(models: dict[str, tuple[PixelModel, Window | None]], videos: int, clips: int, output: Path, sheet: str) -> dict[str, Scores]:
    """Scores of videos of one prompt, `clips` clips long, of each arm; writes images of the first three to `sheet`."""
    pairs, scores, tiles, words = switch_pairs(videos), {}, [], []
    for name, (model, window) in models.items():
        images = model.make([pair.before for pair in pairs], num_latent_frames=clips * CLIP, seed=SEED, window=window)
        scores[name] = drift_scores(images, pairs)
        picks = torch.linspace(0, images.shape[1] - 1, 8).round().long().tolist()
        for video in range(min(3, videos)):
            tiles += [images[video, pick].movedim(0, -1).numpy() for pick in picks]
            words += [f"{pick / model.fps:.0f} s, {name}\n{canonical(pairs[video].before)}" for pick in picks]
        logging.info("%d clips, %s: generated and read", clips, name)
    contact_sheet(tiles, output / sheet, columns=8, captions=words, title=f"{clips} clips of one prompt")
    return scores


def table(title: str, scores: dict[str, Scores], metrics: tuple[str, ...]) -> Table:
    """Estimates of each metric; of a metric with values per block or clip the first and the last."""
    names, rows = [], {arm: [] for arm in scores}
    for name in metrics:
        several = next(iter(scores.values()))[name].ndim == 3
        for where, at in ((", first", 0), (", last", -1)) if several else (("", None),):
            names.append(name + where)
            for arm, found in scores.items():
                rows[arm].append(estimate(found[name] if at is None else found[name][..., at], resamples=RESAMPLES))
    return Table(title, names, rows)


def experiment(long: PixelModel, short: PixelModel, *, videos: int, attention_clips: int, length_clips: int, output: Path) -> Report:
    """Switches, attention and length, with the networks of the stages `long` and `init`."""
    clock = time.perf_counter()
    at_switch, claims = switches(long, videos, output)
    arms = {"window 9 + sink 3": (long, None), "window 12": (long, Window(0, CLIP))}
    attention = lasting(arms, videos, attention_clips, output, "pixels_attention.png")
    length = lasting({"init": (short, None), "long": (long, None)}, videos, length_clips, output, "pixels_length.png")
    sink, window = attention.values()
    init, tuned = length.values()
    claims += [
        compare("a sink keeps the size better than a window alone, last clip", "less", sink, window, "size", at=-1),
        compare("with a sink the last clip adheres more", "more", sink, window, "adherence", at=-1),
        compare("long tuning adheres more than init, last clip", "more", tuned, init, "adherence", at=-1),
        compare("long tuning keeps the overlap with a shape better than init, last clip", "more", tuned, init, "overlap", at=-1),
    ]
    curve = partial(line, resamples=RESAMPLES)
    panels = [
        Panel("New attribute after the switch", "frames after the switch", "share right",
              [curve(name, found["adherence"], step=3, first=3) for name, found in at_switch.items()], (0.0, 1.0)),
        Panel("Attention: all four attributes", "frame", "share of images right",
              [curve(name, found["adherence"], step=CLIP, first=CLIP) for name, found in attention.items()], (0.0, 1.0)),
        Panel("Attention: change of size", "frame", "relative",
              [curve(name, found["size"], step=CLIP, first=CLIP) for name, found in attention.items()]),
        Panel("Length: all four attributes", "frame", "share of images right",
              [curve(name, found["adherence"], step=CLIP, first=CLIP) for name, found in length.items()], (0.0, 1.0)),
    ]  # fmt: skip
    return Report(
        name="pixels",
        title="The pixel world: switch, attention, length",
        question="Does what the state world shows show in pixels too, with the miniature's own stages?",
        setting={
            "networks": "the stages init and long of scripts/miniature_recipe.sh, one training: intervals say nothing of another training",
            "test videos": f"{videos} of captions that training never shows; {SWITCH + AFTER} frames with a switch at {SWITCH}, "
            f"{attention_clips * CLIP} frames (attention), {length_clips * CLIP} frames (length)",
            "attention": "the network is trained with window 9 + sink 3; window 12 alone is tried at inference only",
            "pictures": "pixels_switch.png, pixels_attention.png, pixels_length.png",
        },
        tables=[
            table("Switch", at_switch, SWITCH_METRICS),
            table("Attention, clip by clip", attention, DRIFT_METRICS),
            table("Length, clip by clip", length, DRIFT_METRICS),
        ],
        claims=claims,
        panels=panels,
        seconds=time.perf_counter() - clock,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=Path, default=ROOT / "runs/miniature/evaluation/long/pipeline", help="pipeline of the stage long")
    parser.add_argument("--init", type=Path, default=ROOT / "runs/miniature/evaluation/init/pipeline", help="pipeline of the stage init")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--attention-clips", type=int, default=10)
    parser.add_argument("--length-clips", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "experiments")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        long, short = PixelModel(arguments.long), PixelModel(arguments.init)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"experiments.pixels: {error}; python -m experiments.recipe makes these pipelines\n")
        return 2
    report = experiment(
        long,
        short,
        videos=arguments.videos,
        attention_clips=arguments.attention_clips,
        length_clips=arguments.length_clips,
        output=arguments.output,
    )
    write(report, arguments.output)
    summarize(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
