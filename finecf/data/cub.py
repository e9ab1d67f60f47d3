"""CUB-200-2011 (Wah et al., 2011) in the layout in which it is distributed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finecf.data._files import Transform, existing_file, existing_folder, parse, read_table
from finecf.data.folders import LabelledImages

_WHAT = "CUB-200-2011"


@dataclass(frozen=True)
class CUBAnnotation:
    """What CUB says of one image, in pixels of the image file.

    image_id: CUB's number. box: (left, top, width, height). parts: (x, y) of every part by name, None where it is
        not visible.
    """

    image_id: int
    box: tuple[float, float, float, float]
    parts: dict[str, tuple[float, float] | None]


class CUB200(LabelledImages):
    """CUB-200-2011; item i is (float32 [3,H,W] RGB in [0,1], label from 0, path).

    root: the folder with `images.txt`, `image_class_labels.txt`, `train_test_split.txt`, `classes.txt`,
        `bounding_boxes.txt`, `images/` and (if there) `parts/parts.txt` and `parts/part_locs.txt`; or the folder
        above it.
    split: "train", "test" or "all": the official split.
    classes: labels to keep (0 to 199, as in the file minus one), renumbered in this order; default all.
    size, transform: as in `LabelledImages`.
    Raises FileNotFoundError and ValueError that name the file that is missing or broken.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        classes: Sequence[int] | None = None,
        size: int | tuple[int, int] | None = 224,
        transform: Transform | None = None,
    ) -> None:
        if split not in ("train", "test", "all"):
            raise ValueError(f"split: expected 'train', 'test' or 'all', got {split!r}")
        folder = existing_folder(root, _WHAT)
        if not (folder / "images.txt").is_file() and (folder / "CUB_200_2011" / "images.txt").is_file():
            folder = folder / "CUB_200_2011"
        self.root = folder
        files = self._pairs("images.txt")
        label_of = self._pairs("image_class_labels.txt")
        in_train = self._pairs("train_test_split.txt")
        boxes = {
            int(parse(int, row[0], folder / "bounding_boxes.txt", _WHAT)): row[1:]
            for row in read_table(folder / "bounding_boxes.txt", _WHAT, 5)
        }
        names = self._pairs("classes.txt")
        kept = sorted(number - 1 for number in names) if classes is None else [int(label) for label in classes]
        unknown = [label for label in kept if label + 1 not in names]
        if unknown:
            raise ValueError(
                f"classes: expected labels from 0 to {len(names) - 1} of {folder / 'classes.txt'}, got {unknown}"
            )
        renumbered = {label + 1: new for new, label in enumerate(kept)}
        part_names, part_places = self._parts()

        paths: list[Path] = []
        labels: list[int] = []
        self.annotations: list[CUBAnnotation] = []
        for image_id, file in files.items():
            for table, where in (
                (label_of, "image_class_labels.txt"),
                (in_train, "train_test_split.txt"),
                (boxes, "bounding_boxes.txt"),
            ):
                if image_id not in table:
                    raise ValueError(f"{_WHAT}: expected a line for image {image_id} in {folder / where}, found none")
            number = int(parse(int, label_of[image_id], folder / "image_class_labels.txt", _WHAT))
            if number not in renumbered or (
                split != "all" and in_train[image_id] != ("1" if split == "train" else "0")
            ):
                continue
            paths.append(folder / "images" / file)
            labels.append(renumbered[number])
            x, y, width, height = (parse(float, text, folder / "bounding_boxes.txt", _WHAT) for text in boxes[image_id])
            places = part_places.get(image_id, {})
            self.annotations.append(
                CUBAnnotation(
                    image_id, (x, y, width, height), {name: places.get(part) for part, name in part_names.items()}
                )
            )
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{_WHAT}: images.txt lists {len(absent)} image(s) that are not there, the first {absent[0]}"
            )
        super().__init__(paths, labels, [names[label + 1] for label in kept], size, transform)

    def _pairs(self, name: str) -> dict[int, str]:
        path = self.root / name
        return {int(parse(int, key, path, _WHAT)): value for key, value in read_table(path, _WHAT, 2, rest=True)}

    def _parts(self) -> tuple[dict[int, str], dict[int, dict[int, tuple[float, float] | None]]]:
        """Part names, and the places of the visible parts of each image; both empty where CUB comes without part
        locations.
        """
        if not (self.root / "parts").exists():
            return {}, {}
        path = existing_file(self.root / "parts" / "part_locs.txt", _WHAT)
        names_path = self.root / "parts" / "parts.txt"
        names = {
            int(parse(int, key, names_path, _WHAT)): name for key, name in read_table(names_path, _WHAT, 2, rest=True)
        }
        places: dict[int, dict[int, tuple[float, float] | None]] = {}
        for row in read_table(path, _WHAT, 5):
            image_id, part = (int(parse(int, text, path, _WHAT)) for text in row[:2])
            x, y = (parse(float, text, path, _WHAT) for text in row[2:4])
            if row[4] not in ("0", "1"):
                raise ValueError(f"{_WHAT}: expected the visibility 0 or 1 in {path}, got {row[4]!r}")
            places.setdefault(image_id, {})[part] = (x, y) if row[4] == "1" else None
        return names, places
