"""The case list of the operators: what their CPU kernels (tests/ops) and, emulated on the host, their CUDA kernels
(tests/emulation) are tested over. Without torch, as the emulation is.

One size at a time passes a border: of vectors and warps (2, 31..33), of tiles of 32 permutations, of row blocks,
candidate panels and chunks, of 32 x 64 CUDA tiles, of class splits (256) and of the classes that a warp walks (1024);
of the 16 rows of logits that a thread takes and the 4 of a CUDA block, and of the 256 pixels of one.
All of it is emulated: the largest, 10,000 classes, takes 0.6 s a launch there, and the whole list under a minute. A
size that takes much longer is to be left out where the emulation takes the list, by name and with its seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

SEEDS = range(3)
"""Thread orders in which each case is emulated."""

VALUES = ("prob", "log_prob", "log_odds", "logit")


class Shapley(NamedTuple):
    """Sizes of `masked_class_scores` and `permutation_shapley_tiles`."""

    cells: int
    classes: int
    count: int


class Nearest(NamedTuple):
    """Sizes of `nearest_candidates`."""

    cells: int
    channels: int
    rows: int


class Replacement(NamedTuple):
    """Sizes of `best_replacement` and `replace_until_flip`."""

    cells: int
    classes: int
    rows: int


class Gains(NamedTuple):
    """Sizes of `submodular_gains`."""

    candidates: int
    regions: int
    classes: int


class Regions(NamedTuple):
    """Sizes of `compose_regions`, and of `rank_masks`, which knows no regions."""

    outputs: int
    images: int
    planes: int
    height: int
    width: int
    regions: int


SHAPLEY = [
    *[Shapley(7, classes, 5) for classes in (2, 31, 32, 33, 200, 257, 1000, 1025, 10000)],
    *[Shapley(cells, 33, 4) for cells in (1, 49, 196)],
    *[Shapley(7, 31, count) for count in (1, 31, 32, 33, 35, 100)],
    *[Shapley(1, 2, count) for count in (1, 70)],
    Shapley(49, 257, 2),
]

NEAREST = [
    *[Nearest(7, channels, 97) for channels in (1, 7, 16, 17, 2048)],
    *[Nearest(cells, 33, 97) for cells in (1, 4, 5, 33, 49)],
    *[Nearest(7, 33, rows) for rows in (1, 47, 48, 49, 63, 64, 65, 96, 3000, 4097)],
    Nearest(1, 1, 1),
    Nearest(49, 70, 300),
    Nearest(2, 3, 2200),
]

# Some hundred pairs, as a rule, since a kernel may score few of them one by one.
REPLACEMENT = [
    *[Replacement(13, classes, 96) for classes in (2, 31, 32, 33, 200, 257, 1000, 1025, 10000)],
    *[Replacement(1, 33, 600), Replacement(8, 33, 97), Replacement(49, 33, 97), Replacement(196, 33, 48)],
    *[Replacement(49, 33, rows) for rows in (1, 47, 48, 49, 63, 64, 65, 96, 129)],
    Replacement(33, 32, 129),
    Replacement(7, 33, 3000),
    Replacement(1, 2, 1),
]

SPREADS = (0.1, 1.0, 3.0, 8.0, 25.0, 27.0, 30.0, 90.0, 200.0)
"""Scales of logits. From about 25 on, products of the factorised form underflow for good pairs as well."""

WEIGHTS = ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (3.5, 0.25), (0.4, 50.0), (1e3, 1e-3))
"""weight_sim and weight_cls."""

SEARCH_OPTIONS: tuple[dict[str, float], ...] = (
    {"top_cells": 1},
    {"top_cells": 3},
    {"top_cells": 1000},
    {"max_edits": 0},
    {"max_edits": 1},
    {"max_edits": 20},
    {"reuse_candidates": True},
    {"weight_sim": 0.0},
    {"weight_cls": 0.0},
    {"top_cells": 2, "reuse_candidates": True, "weight_sim": 5.0, "weight_cls": 0.5},
)


SUBMODULAR = [
    *[Gains(candidates, 7, 5) for candidates in (0, 1, 2, 3, 4, 5, 15, 16, 17, 33)],
    *[Gains(9, 7, classes) for classes in (2, 7, 8, 9, 31, 32, 33, 1000)],
    *[Gains(23, regions, 5) for regions in (1, 2, 31, 32, 33, 200)],
]

REGIONS = [
    Regions(1, 1, 1, 1, 1, 1),
    Regions(17, 3, 3, 1, 1, 5),
    Regions(17, 2, 3, 13, 11, 1),
    Regions(5, 2, 1, 9, 7, 6),
    Regions(5, 2, 5, 1, 33, 6),
    Regions(2, 2, 3, 31, 1, 40),
    Regions(3, 1, 3, 5, 51, 2),
    Regions(3, 1, 3, 16, 16, 49),
    Regions(3, 1, 2, 1, 257, 300),
    Regions(2, 1, 2, 33, 17, 256),
    Regions(2, 1, 1, 33, 17, 257),
]


def kept(rows: int) -> list[int]:
    """How many of so many rows `nearest_candidates` is asked for."""
    return sorted({1, min(5, rows), rows})


def names(sizes: Iterable[Shapley | Nearest | Replacement | Gains | Regions]) -> list[str]:
    """Names of sizes for pytest, as P7-C33-N96, with the letter that each axis has in the contracts."""
    letters = {"cells": "P", "classes": "C", "channels": "D", "rows": "N", "count": "M", "candidates": "R"}
    letters |= {"regions": "m", "outputs": "n", "images": "B", "planes": "Ch", "height": "H", "width": "W"}
    return ["-".join(f"{letters[axis]}{n}" for axis, n in size._asdict().items()) for size in sizes]
