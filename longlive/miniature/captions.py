"""Captions of videos of the miniature world, and the meaning of their words.

A caption is a sentence template filled with synonyms. No word belongs to two attributes, so every caption can be parsed by word matching:
`parse`. Knows nothing of tokens or networks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from longlive.miniature.world import ATTRIBUTES, Captioned

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("circle", "disc", "disk", "ball", "dot"),
        "square": ("square", "box"),
        "triangle": ("triangle", "triangular shape"),
        "cross": ("cross", "plus", "plus sign"),
        "ring": ("ring", "donut", "doughnut", "hoop"),
    },
    "color": {
        "red": ("red", "crimson", "scarlet"),
        "green": ("green", "emerald"),
        "blue": ("blue", "cobalt"),
        "yellow": ("yellow", "golden", "lemon"),
        "purple": ("purple", "violet"),
        "cyan": ("cyan", "turquoise", "aqua"),
    },
    "background": {
        "black": ("black", "pitch black", "jet black"),
        "white": ("white", "snow white"),
        "gray": ("gray", "grey"),
        "brown": ("brown", "chocolate"),
        "pink": ("pink", "rosy"),
    },
}
DIRECTIONS: dict[str, tuple[str, ...]] = {
    "right": ("right", "to the right", "rightward", "rightwards", "towards the right"),
    "left": ("left", "to the left", "leftward", "leftwards", "towards the left"),
    "down": ("down", "downward", "downwards", "to the bottom"),
    "up": ("up", "upward", "upwards", "to the top"),
}
# Every motion in two forms: after a noun ("moving right") and after "it" ("moves right").
VERBS = (
    ("moving", "moves"),
    ("drifting", "drifts"),
    ("gliding", "glides"),
    ("sliding", "slides"),
    ("traveling", "travels"),
    ("going", "goes"),
)
PHRASES: dict[str, tuple[tuple[str, str], ...]] = {
    "down": (("falling", "falls"), ("sinking", "sinks"), ("descending", "descends")),
    "up": (("rising", "rises"), ("climbing", "climbs"), ("ascending", "ascends")),
    "still": (
        ("standing still", "stands still"),
        ("staying still", "stays still"),
        ("not moving", "does not move"),
        ("at rest", "is at rest"),
        ("motionless", "is motionless"),
        ("stationary", "is stationary"),
        ("unmoving", "is unmoving"),
    ),
}
SPOKEN_MOTIONS: dict[str, tuple[str, ...]] = {  # the words of a motion phrase by which `parse` knows it
    "right": ("right", "rightward", "rightwards"),
    "left": ("left", "leftward", "leftwards"),
    "down": ("down", "downward", "downwards", "bottom", "falling", "falls", "sinking", "sinks", "descending", "descends"),
    "up": ("up", "upward", "upwards", "top", "rising", "rises", "climbing", "climbs", "ascending", "ascends"),
    "still": ("still", "not moving", "not move", "at rest", "motionless", "stationary", "unmoving"),
}
GROUNDS = ("background", "backdrop", "canvas", "screen")
TEMPLATES = (
    "a {color} {shape} {moving} on a {background} {ground}",
    "on a {background} {ground}, a {color} {shape} {moves}",
    "the {shape} is {color}, it {moves} over {background}",
    "{color} {shape}, {moving}, {background} {ground}",
    "a {color} {shape} that {moves} in front of a {background} {ground}",
    "{background} {ground} with a {color} {shape} {moving}",
    "a {shape}, {color}, {moving}, against {background}",
    "there is a {color} {shape} {moving} on a {background} {ground}",
    "the {ground} is {background} and the {color} {shape} {moves}",
    "a {color} {shape} {moves} over a {background} {ground}",
    "{moving}: a {color} {shape} on {background}",
    "a {shape} {moves}; the {shape} is {color}, the {ground} {background}",
    "we see a {background} {ground} and a {shape} in {color}, {moving}",
    "{color} {shape} on {background}, {moving}",
    "{shape} {moving}, {color} on {background}",
    "a {ground} in {background}, on it a {color} {shape} that {moves}",
)
UNSEEN_TEMPLATES = (  # not used in training: they measure generalisation
    "in front of {background}, a {color} {shape} {moves}",
    "{background} {ground}, {moving} {color} {shape}",
    "look, the {color} {shape} {moves} and the whole {ground} behind it is plain {background}",
    "it is a {shape}, it is {color}, it {moves}, and there is {background} behind it",
)
# Words of prompts that mean nothing in this world; one token each, so that long prompts fit.
COMMON = """
    and are as at background be beautiful bright by camera cinematic clip color colour colorful colored cute dark detailed each
    few first for from full has have high his image its light little made make movie must my new nice no of or over picture
    please plain pretty quality realistic resolution scene short shot side simple slow slowly small big large some something
    style than that their them then these this tiny to very view was watch what while will with without you your quickly fast
    smooth smoothly frame frames object another same again but
""".split()  # noqa: SIM905
OPENINGS = ("a video of", "please show", "now", "show me", "a short clip:", "in this video,")


class SwitchPair(NamedTuple):
    """Two captions that differ in `attribute` only."""

    before: Captioned
    after: Captioned
    attribute: str


def _choose(options: Sequence, generator: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def _motion(motion: str, generator: torch.Generator) -> tuple[str, str]:
    """A motion after a noun and after "it"."""
    own = PHRASES.get(motion, ())
    general = len(DIRECTIONS.get(motion, ()))  # every general phrase is as likely as every phrase of this motion
    if int(torch.randint(len(own) + general, (), generator=generator)) < len(own):
        return _choose(own, generator)
    after_noun, after_it = _choose(VERBS, generator)
    direction = _choose(DIRECTIONS[motion], generator)
    return f"{after_noun} {direction}", f"{after_it} {direction}"


def _article(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def canonical(captioned: Captioned) -> str:
    """The canonical sentence for a video: "a red circle moving right on a black background"."""
    motion = "standing still" if captioned.motion == "still" else f"moving {captioned.motion}"
    return _article(f"a {captioned.color} {captioned.shape} {motion} on a {captioned.background} background")


def caption(captioned: Captioned, generator: torch.Generator, *, templates: Sequence[str] = TEMPLATES) -> str:
    """A random sentence for a video: template, synonyms, opening, case and full stop are drawn."""
    moving, moves = _motion(captioned.motion, generator)
    words = {name: _choose(values[getattr(captioned, name)], generator) for name, values in NAMES.items()}
    text = _choose(templates, generator).format(**words, moving=moving, moves=moves, ground=_choose(GROUNDS, generator))
    if _choose(range(5), generator) == 0:
        text = f"{_choose(OPENINGS, generator)} {text}"
    text = _article(text)
    case = _choose(range(10), generator)
    if case == 0:
        text = text.upper()
    elif case < 5:
        text = text[0].upper() + text[1:]
    return text + _choose((".", "", ""), generator)


@lru_cache(maxsize=1)
def _meanings() -> tuple[re.Pattern[str], dict[str, tuple[str, str]]]:
    """A pattern of every phrase with a meaning, longest first, and the meaning of each: `(attribute, value)`."""
    spoken = NAMES | {"motion": SPOKEN_MOTIONS}
    meaning = {phrase: (name, value) for name, values in spoken.items() for value, phrases in values.items() for phrase in phrases}
    longest_first = sorted(meaning, key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b"), meaning


def parse(text: str) -> dict[str, str]:
    """Attributes that `text` names, by word match: `{"color": "red", "shape": "circle"}`; of two values of an attribute the first.

    Empty when the text names none.
    """
    pattern, meaning = _meanings()
    found: dict[str, str] = {}
    for phrase in pattern.findall(" ".join(text.lower().split())):
        name, value = meaning[phrase]
        found.setdefault(name, value)
    return found


@lru_cache(maxsize=1)
def known_words() -> tuple[str, ...]:
    """Every word that a caption of `TEMPLATES` can contain, in lower case, sorted."""
    texts = [phrase for values in NAMES.values() for phrases in values.values() for phrase in phrases]
    texts += [phrase for phrases in DIRECTIONS.values() for phrase in phrases]
    texts += [phrase for phrases in SPOKEN_MOTIONS.values() for phrase in phrases]
    texts += [form for forms in (VERBS, *PHRASES.values()) for pair in forms for form in pair]
    texts += [*GROUNDS, *OPENINGS, "an"]
    texts += [re.sub(r"\{\w+\}", " ", template) for template in TEMPLATES]
    return tuple(sorted(set(re.findall(r"[a-z]+", " ".join(texts)))))


@lru_cache(maxsize=1)
def understood() -> dict[str, dict[str, tuple[str, ...]]]:
    """What the miniature understands: attribute -> value -> phrases, the one of `canonical` first."""
    motions: dict[str, tuple[str, ...]] = {}
    for motion in ATTRIBUTES["motion"]:
        general = (f"{form} {motion}" for form in dict.fromkeys(form for pair in VERBS for form in pair))
        own = (form for pair in PHRASES.get(motion, ()) for form in pair)
        motions[motion] = (*general, *own) if motion in DIRECTIONS else tuple(own)
    return NAMES | {"motion": motions}


def summary() -> str:
    """The attributes and their values in a line."""
    return ", ".join(f"{name} ({', '.join(values)})" for name, values in understood().items())


def unknown_words(text: str) -> list[str]:
    """The words of a prompt that are neither in captions nor common; the miniature sees them as letters without a meaning."""
    known = {*known_words(), *COMMON}
    return [word for word in dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower())) if word not in known]


def hint(text: str) -> str | None:
    """What to tell a person whose prompt has words that the miniature does not know; None when there are none."""
    unknown = ", ".join(f'"{word}"' for word in unknown_words(text))
    return f"the miniature does not know {unknown}; it understands {summary()}" if unknown else None
