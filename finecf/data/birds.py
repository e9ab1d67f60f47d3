"""SyntheticBirds: a fine-grained data set in which the right explanation is known.

Birds are drawn from parts. Classes come in families of look-alikes that differ in one or two parts, so
`differing_parts(p, q)` answers "why p rather than q" exactly, and `redraw(item, q)` shows the same bird in the same
place with q's parts: the true counterfactual picture. Pictures are confusable on purpose (occlusion, noise, rare
poses, weak markings), and a share of the training labels is flipped within the family.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from finecf.data import _bird_drawing as drawing
from finecf.data._bird_classes import FIELDS, MAX_CLASSES, PARTS, BirdClass, all_classes, differing
from finecf.data._bird_drawing import PART_NUMBER, BirdSettings, Scene, draw_bird, key_points, sample_scene

SPLITS = ("train", "val", "test")
DEFAULT_SIZES = {"train": 12_000, "val": 1_000, "test": 4_000}
DEFAULT_SETTINGS = BirdSettings()

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def _plain(value: object) -> object:
    """A table of the drawing as JSON can hold it, rounded so that it is the same on every machine."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return np.round(value, 6).tolist() if isinstance(value, np.ndarray) else value


def config_hash(settings: BirdSettings = DEFAULT_SETTINGS) -> str:
    """Hex digest (16 characters) of all that decides what is drawn: the settings, the class table, the palette and
    the outlines.

    A checkpoint records it; pictures of two generators with one hash come from one distribution.
    """
    tables = {name: _plain(value) for name, value in vars(drawing).items() if name.isupper()}
    described = {
        "settings": asdict(settings),
        "classes": [[c.name, c.family, [list(c.parts[part]) for part in PARTS]] for c in all_classes()],
        "tables": tables,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BirdItem:
    """One picture and all that is known about it.

    image: uint8 [H,W,3], RGB.
    label: the class a model is trained and tested with. It differs from `drawn_label` only where the training split
        flips it.
    drawn_label: the class whose parts are drawn.
    part_map: uint8 [H,W], the number of the visible part at each pixel (its position in `PARTS` plus one), 0 for none.
    keypoints: (x, y) in pixels of each part, None where it is not visible.
    box: (left, top, right, bottom) of the visible bird in pixels, right and bottom exclusive; four zeros where none
        of it is visible.
    params: the scene: pose, place, light, marking strengths (plain values).
    seed: redraws the picture to the bit, with `SyntheticBirds.draw(seed, drawn_label)` of the same size and settings.
    source: a name that `SyntheticBirds.find` turns into the index again.
    """

    image: np.ndarray
    label: int
    drawn_label: int
    part_map: np.ndarray
    keypoints: dict[str, tuple[float, float] | None]
    box: tuple[int, int, int, int]
    params: dict[str, object]
    seed: int
    source: str = field(default="")

    @property
    def part_masks(self) -> dict[str, np.ndarray]:
        """Bool [H,W] for each part: its visible pixels. The masks do not overlap."""
        return {part: self.part_map == number for part, number in PART_NUMBER.items()}

    def mask(self, parts: Sequence[str]) -> np.ndarray:
        """Bool [H,W]: the visible pixels of any of these parts. An unknown part name is a ValueError."""
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise ValueError(f"parts: expected names among {list(PARTS)}, got {unknown}")
        return np.isin(self.part_map, [PART_NUMBER[part] for part in parts])

    @property
    def pil(self) -> Image.Image:
        """The picture as a PIL image, RGB."""
        return Image.fromarray(self.image)

    @property
    def tensor(self) -> torch.Tensor:
        """The picture as float32 [3,H,W] in [0,1]."""
        return images_to_tensor(self.image)


def images_to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [...,H,W,3] to contiguous float32 [...,3,H,W] in [0,1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, -3))).float().div_(255.0)


class SyntheticBirds(Dataset[BirdItem]):
    """A split of the synthetic birds; item i is a `BirdItem`, drawn when it is asked for.

    split: "train", "val" or "test"; splits never share a seed.
    size: side of the square pictures in pixels, 32 to 1024. 128 and 224 are the usual ones.
    n: number of pictures (default: 12,000, 1,000 and 4,000 by split). Item i does not depend on n.
    classes: 2 to 200, in families of four; class c is the same for any number of classes.
    seed: of the whole data set; another seed gives other pictures of the same classes.
    cache: a folder; the pictures of the split are drawn once, kept there as one file, and memory-mapped from then on
        (used by `images`, `as_tensor` and `tensors`; part masks are drawn when asked for).
    settings: what the generator draws from; the default is frozen (`config_hash`).
    """

    def __init__(
        self,
        split: str = "test",
        size: int = 128,
        n: int | None = None,
        classes: int = 20,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        settings: BirdSettings = DEFAULT_SETTINGS,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {list(SPLITS)}, got {split!r}")
        if not 32 <= size <= 1024:
            raise ValueError(f"size: expected 32 to 1024 pixels, got {size}")
        if not 2 <= classes <= MAX_CLASSES:
            raise ValueError(f"classes: expected 2 to {MAX_CLASSES}, got {classes}")
        if seed < 0:
            raise ValueError(f"seed: expected a number from 0 on, got {seed}")
        n = DEFAULT_SIZES[split] if n is None else n
        if n < 0:
            raise ValueError(f"n: expected a number of pictures from 0 on, got {n}")
        self.split, self.size, self.n, self.seed, self.settings = split, size, n, seed, settings
        self.classes: tuple[BirdClass, ...] = all_classes()[:classes]
        self.cache = None if cache is None else Path(cache)
        self._mapped: np.ndarray | None = None

    def __len__(self) -> int:
        return self.n

    @property
    def class_names(self) -> list[str]:
        """One name for each class, in the order of the labels."""
        return [c.name for c in self.classes]

    @property
    def families(self) -> list[list[int]]:
        """The labels of each family of look-alikes."""
        return [
            [label for label, c in enumerate(self.classes) if c.family == f] for f in range(self.classes[-1].family + 1)
        ]

    def family_of(self, label: int | str) -> int:
        """The number of the family a class belongs to."""
        return self.classes[self.class_index(label)].family

    def class_index(self, label: int | str) -> int:
        """A label from a label or a class name; a ValueError names what there is."""
        if isinstance(label, str):
            if label not in self.class_names:
                raise ValueError(f"class: expected one of {self.class_names}, got {label!r}")
            return self.class_names.index(label)
        if not 0 <= int(label) < len(self.classes):
            raise ValueError(f"class: expected a label from 0 to {len(self.classes) - 1}, got {label}")
        return int(label)

    def attributes(self, label: int | str) -> dict[str, dict[str, str]]:
        """What each part of a class looks like: part -> attribute -> value."""
        parts = self.classes[self.class_index(label)].parts
        return {part: dict(zip(FIELDS[part], parts[part], strict=True)) for part in PARTS}

    def differing_parts(self, p: int | str, q: int | str) -> tuple[str, ...]:
        """Names of the parts that tell class p from class q: the true answer to "why p rather than q". Empty when p
        is q.
        """
        return differing(self.classes[self.class_index(p)], self.classes[self.class_index(q)])

    def config_hash(self) -> str:
        """`config_hash` of this data set's settings."""
        return config_hash(self.settings)

    def _seed_of(self, index: int) -> int:
        state = np.random.SeedSequence([self.seed, SPLITS.index(self.split), index]).generate_state(2, np.uint32)
        return int(state[0]) << 16 | int(state[1]) >> 16

    def _checked(self, index: int) -> int:
        if not -self.n <= index < self.n:
            raise IndexError(f"index: expected {-self.n} to {self.n - 1}, got {index}")
        return index % self.n

    def drawn_label(self, index: int) -> int:
        """The class that is drawn as item `index`: classes take turns."""
        return self._checked(index) % len(self.classes)

    def label(self, index: int) -> int:
        """The label of item `index`. In the training split a share of labels is flipped to another class of the
        family.
        """
        index = self._checked(index)
        drawn = self.drawn_label(index)
        if self.split != "train":
            return drawn
        rng = np.random.default_rng([self._seed_of(index), 9])
        flipped, which = float(rng.random()) < self.settings.label_flip, float(rng.random())
        others = [other for other in self.families[self.classes[drawn].family] if other != drawn] if flipped else []
        return others[int(which * len(others))] if others else drawn

    @cached_property
    def labels(self) -> np.ndarray:
        """Int64 [n]: the label of every item."""
        return np.array([self.label(i) for i in range(self.n)], dtype=np.int64)

    def source(self, index: int) -> str:
        """The name of an item: "birds/<split>/<seed>/<index>"."""
        return f"birds/{self.split}/{self.seed}/{self._checked(index)}"

    def find(self, source: str) -> int:
        """The index of the item with this name; a ValueError if it is not of this split and seed."""
        head, _, tail = source.rpartition("/")
        if head != f"birds/{self.split}/{self.seed}" or not tail.isdigit() or int(tail) >= self.n:
            raise ValueError(f"source: expected birds/{self.split}/{self.seed}/<0 to {self.n - 1}>, got {source!r}")
        return int(tail)

    def _item(self, scene: Scene, drawn: int, label: int, source: str) -> BirdItem:
        image, part_map = draw_bird(scene, self.classes[drawn], self.size)
        rows, columns = np.flatnonzero(part_map.any(1)), np.flatnonzero(part_map.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else (0, 0, 0, 0)
        return BirdItem(
            image, label, drawn, part_map, key_points(scene, part_map), box, scene.to_dict(), scene.seed, source
        )

    def draw(self, seed: int, label: int | str) -> BirdItem:
        """The bird of a seed as a class: to the bit the item that has this seed and class."""
        drawn = self.class_index(label)
        return self._item(sample_scene(seed, self.settings), drawn, drawn, "")

    def redraw(self, item: BirdItem, label: int | str) -> BirdItem:
        """The same bird, pose, background and noise with another class's parts: the true counterfactual picture of
        `item`.
        """
        drawn = self.class_index(label)
        return self._item(Scene.from_dict(item.params), drawn, drawn, "")

    def __getitem__(self, index: int) -> BirdItem:
        index = self._checked(index)
        scene = sample_scene(self._seed_of(index), self.settings)
        return self._item(scene, self.drawn_label(index), self.label(index), self.source(index))

    def _draw_image(self, index: int) -> np.ndarray:
        return draw_bird(
            sample_scene(self._seed_of(index), self.settings), self.classes[self.drawn_label(index)], self.size
        )[0]

    def as_tensor(self, index: int) -> tuple[torch.Tensor, int, str]:
        """Item `index` as (float32 [3,H,W] in [0,1], label, source)."""
        index = self._checked(index)
        image = self._draw_image(index) if self.cache is None else self.images()[index]
        return images_to_tensor(image), self.label(index), self.source(index)

    def tensors(self) -> TensorView:
        """The split as a Torch Dataset of (float32 [3,H,W] in [0,1], label, source)."""
        return TensorView(self)

    def _cache_file(self, folder: Path) -> Path:
        return (
            folder / f"birds-{self.config_hash()}-{self.split}-{self.seed}-{len(self.classes)}-{self.size}-{self.n}.npy"
        )

    def _draw_all(self, workers: int, progress: Progress | None) -> np.ndarray:
        images = np.empty((self.n, self.size, self.size, 3), dtype=np.uint8)
        loader = DataLoader(_Drawn(self), batch_size=64, num_workers=workers, collate_fn=np.stack)
        done = 0
        for batch in loader:
            images[done : done + len(batch)] = batch
            done += len(batch)
            if progress is not None:
                progress(done, self.n)
        return images

    def images(self, workers: int = 0, progress: Progress | None = None) -> np.ndarray:
        """All pictures: uint8 [n,H,W,3], drawn by `workers` processes beside this one (0: in this one).

        With a cache folder they are read from it (and written there the first time). The pictures do not depend on
        `workers`.
        """
        if self._mapped is not None:
            return self._mapped
        if self.cache is None:
            return self._draw_all(workers, progress)
        path = self._cache_file(self.cache)
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as stream:
                np.save(stream, self._draw_all(workers, progress))
            partial.replace(path)  # a reader never meets half a file
        self._mapped = np.load(path, mmap_mode="r")
        return self._mapped


class _Drawn(Dataset[np.ndarray]):
    """The pictures alone, for the worker processes."""

    def __init__(self, birds: SyntheticBirds) -> None:
        self.birds = birds

    def __len__(self) -> int:
        return len(self.birds)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.birds._draw_image(index)


class TensorView(Dataset[tuple[torch.Tensor, int, str]]):
    """A split of birds as (float32 [3,H,W] in [0,1], label, source)."""

    def __init__(self, birds: SyntheticBirds) -> None:
        self.birds = birds

    def __len__(self) -> int:
        return len(self.birds)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, str]:
        return self.birds.as_tensor(index)
