"""The classes of SyntheticBirds: part attributes, families of look-alikes, and their names.

A class is one attribute tuple for each of the nine parts. A family is a star: a base class, and siblings that change
one part each, so that two classes of a family differ in exactly one part (base and sibling) or two (two siblings).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PARTS = ("body", "head", "beak", "eye", "crest", "wing", "tail", "breast", "legs")
"""Part names; the value of a part in a part map is its position here plus one (0 is background)."""

FAMILY_SIZE = 4
MAX_CLASSES = 200

Attributes = tuple[str, ...]

# What the attribute tuple of each part says.
FIELDS: dict[str, Attributes] = {
    "body": ("colour",),
    "head": ("colour", "pattern", "pattern colour"),
    "beak": ("shape", "colour"),
    "eye": ("iris", "ring"),
    "crest": ("shape", "colour"),
    "wing": ("colour", "pattern", "pattern colour"),
    "tail": ("shape", "colour", "tip colour"),
    "breast": ("colour", "pattern", "pattern colour"),
    "legs": ("colour",),
}


@dataclass(frozen=True)
class BirdClass:
    """One class: its name, the number of its family, and the attributes of every part (in the order of `FIELDS`)."""

    name: str
    family: int
    parts: Mapping[str, Attributes]


@dataclass(frozen=True)
class _Family:
    name: str
    base: dict[str, Attributes]
    siblings: tuple[tuple[str, str, Attributes], ...]  # (prefix of the name, part, attributes)


_CURATED = (
    _Family(
        "olive warbler",
        {
            "body": ("olive",),
            "head": ("olive", "plain", "olive"),
            "beak": ("dagger", "charcoal"),
            "eye": ("black", "white"),
            "crest": ("none", "olive"),
            "wing": ("moss", "plain", "white"),
            "tail": ("square", "moss", "moss"),
            "breast": ("yellow", "plain", "brown"),
            "legs": ("pink",),
        },
        (
            ("two-barred", "wing", ("moss", "two bars", "white")),
            ("streaked", "breast", ("yellow", "streaks", "brown")),
            ("red-eyed", "eye", ("black", "red")),
        ),
    ),
    _Family(
        "rufous bunting",
        {
            "body": ("rufous",),
            "head": ("charcoal", "plain", "charcoal"),
            "beak": ("cone", "slate"),
            "eye": ("black", "grey"),
            "crest": ("none", "charcoal"),
            "wing": ("brown", "one bar", "white"),
            "tail": ("square", "brown", "brown"),
            "breast": ("buff", "plain", "charcoal"),
            "legs": ("slate",),
        },
        (
            ("yellow-billed", "beak", ("cone", "yellow")),
            ("fork-tailed", "tail", ("forked", "brown", "brown")),
            ("twin-barred", "wing", ("brown", "two bars", "white")),
        ),
    ),
    _Family(
        "azure jay",
        {
            "body": ("blue",),
            "head": ("blue", "plain", "blue"),
            "beak": ("dagger", "charcoal"),
            "eye": ("black", "sky"),
            "crest": ("swept", "blue"),
            "wing": ("navy", "patch", "white"),
            "tail": ("square", "navy", "navy"),
            "breast": ("silver", "plain", "black"),
            "legs": ("charcoal",),
        },
        (
            ("collared", "breast", ("silver", "band", "black")),
            ("fan-crested", "crest", ("fan", "blue")),
            ("hook-billed", "beak", ("hook", "charcoal")),
        ),
    ),
    _Family(
        "grey shrike",
        {
            "body": ("grey",),
            "head": ("silver", "mask", "black"),
            "beak": ("hook", "charcoal"),
            "eye": ("black", "silver"),
            "crest": ("none", "silver"),
            "wing": ("charcoal", "plain", "white"),
            "tail": ("long", "charcoal", "charcoal"),
            "breast": ("white", "plain", "rufous"),
            "legs": ("charcoal",),
        },
        (
            ("capped", "head", ("silver", "cap", "black")),
            ("white-winged", "wing", ("charcoal", "patch", "white")),
            ("red-legged", "legs", ("red",)),
        ),
    ),
    _Family(
        "buff waxwing",
        {
            "body": ("tan",),
            "head": ("tan", "mask", "charcoal"),
            "beak": ("cone", "charcoal"),
            "eye": ("black", "tan"),
            "crest": ("swept", "tan"),
            "wing": ("slate", "one bar", "white"),
            "tail": ("square", "slate", "yellow"),
            "breast": ("cream", "plain", "brown"),
            "legs": ("charcoal",),
        },
        (
            ("red-tailed", "tail", ("square", "slate", "red")),
            ("spotted", "breast", ("cream", "spots", "brown")),
            ("white-eyed", "eye", ("black", "white")),
        ),
    ),
)

_BODY_COLOURS = ("teal", "violet", "brown", "slate", "moss", "crimson", "charcoal", "sky", "orange", "buff")
_NOUNS = ("finch", "thrush", "flycatcher", "tanager", "grosbeak", "vireo", "sparrow", "starling", "oriole", "wren")
_DARKER = {
    "teal": "navy",
    "violet": "charcoal",
    "brown": "charcoal",
    "slate": "charcoal",
    "moss": "brown",
    "crimson": "brown",
    "charcoal": "black",
    "sky": "slate",
    "orange": "charcoal",
    "buff": "brown",
}


def _siblings_of(base: dict[str, Attributes]) -> list[tuple[str, str, Attributes]]:
    """Every change of one part that a generated family may use, with the prefix that names it."""
    wing, breast, head = base["wing"], base["breast"], base["head"]
    wings = (("bar-winged", "one bar"), ("two-barred", "two bars"), ("patch-winged", "patch"))
    breasts = (("streaked", "streaks"), ("spotted", "spots"), ("collared", "band"))
    heads = (("capped", "cap"), ("masked", "mask"))
    beaks = (("thick-billed", "cone"), ("hook-billed", "hook"), ("curve-billed", "decurved"))
    tails = (("fork-tailed", "forked"), ("long-tailed", "long"), ("wedge-tailed", "pointed"))
    crests = (("swept-crested", "swept"), ("fan-crested", "fan"))
    options: list[tuple[str, str, Attributes]] = []
    options += [(name, "wing", (wing[0], pattern, wing[2])) for name, pattern in wings]
    options += [(name, "breast", (breast[0], pattern, breast[2])) for name, pattern in breasts]
    options += [(name, "head", (head[0], pattern, head[2])) for name, pattern in heads]
    options += [(name, "beak", (shape, base["beak"][1])) for name, shape in beaks]
    options += [("yellow-billed", "beak", (base["beak"][0], "yellow"))]
    options += [(name, "tail", (shape, *base["tail"][1:])) for name, shape in tails]
    if base["crest"][0] != "none":  # a part of a family is on all of its birds, so that it can be seen to differ
        options += [(name, "crest", (shape, base["crest"][1])) for name, shape in crests]
    options += [("red-eyed", "eye", ("black", "red")), ("white-eyed", "eye", ("black", "white"))]
    options += [("red-legged", "legs", ("red",)), ("yellow-legged", "legs", ("yellow",))]
    return [option for option in options if option[2] != base[option[1]]]


def _generated(index: int) -> _Family:
    """Family `index` (counted from the curated ones on): body colour and noun name it, a fixed seed chooses the
    rest.
    """
    rng = np.random.default_rng([20240229, index])
    colour = _BODY_COLOURS[index % len(_BODY_COLOURS)]
    noun = _NOUNS[(index + index // len(_BODY_COLOURS)) % len(_NOUNS)]
    dark = _DARKER[colour]

    def pick(*options: str) -> str:
        return options[int(rng.integers(len(options)))]

    head = pick(colour, dark, "silver", "cream")
    base: dict[str, Attributes] = {
        "body": (colour,),
        "head": (head, "plain", "black"),
        "beak": (pick("dagger", "cone"), pick("charcoal", "slate")),
        "eye": ("black", pick("grey", "sky", "yellow")),
        "crest": (pick("none", "swept", "fan"), head),
        "wing": (dark, pick("plain", "one bar"), pick("white", "yellow", "buff")),
        "tail": (pick("square", "pointed"), dark, pick(dark, "white")),
        "breast": (pick("white", "cream", "yellow", "buff", "silver"), "plain", pick("brown", "black", "rufous")),
        "legs": (pick("charcoal", "pink", "slate"),),
    }
    chosen: list[tuple[str, str, Attributes]] = []
    options = _siblings_of(base)
    while len(chosen) < FAMILY_SIZE - 1:
        option = options[int(rng.integers(len(options)))]
        if option[1] not in {part for _, part, _ in chosen}:
            chosen.append(option)
    return _Family(f"{colour} {noun}", base, tuple(chosen))


@lru_cache(maxsize=1)
def all_classes() -> tuple[BirdClass, ...]:
    """All 200 classes; the first 20 (five families) are the default set. Any number of classes is a prefix of this
    table.
    """
    families = [*_CURATED, *(_generated(index) for index in range(MAX_CLASSES // FAMILY_SIZE - len(_CURATED)))]
    classes: list[BirdClass] = []
    for number, family in enumerate(families):
        classes.append(BirdClass(family.name, number, family.base))
        for prefix, part, attributes in family.siblings:
            classes.append(BirdClass(f"{prefix} {family.name}", number, {**family.base, part: attributes}))
    return tuple(classes)


def differing(p: BirdClass, q: BirdClass) -> tuple[str, ...]:
    """Names of the parts whose attributes differ between two classes, in the order of `PARTS`."""
    return tuple(part for part in PARTS if p.parts[part] != q.parts[part])
