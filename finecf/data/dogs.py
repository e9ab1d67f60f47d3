"""Stanford Dogs (Khosla et al., 2011) in the layout in which it is distributed."""

from __future__ import annotations

import os
from xml.etree import ElementTree

from finecf.data._files import Transform, existing_file, existing_folder
from finecf.data.folders import LabelledImages

_WHAT = "Stanford Dogs"


class StanfordDogs(LabelledImages):
    """Stanford Dogs; item i is (float32 [3,H,W] RGB in [0,1], label from 0, path).

    root: the folder with `Images/<class>/<file>.jpg`, the official lists `train_list.mat` and `test_list.mat` (read
        with scipy) or `train_list.txt` and `test_list.txt` (one `<class>/<file>.jpg` a line), in it or in `lists/`,
        and (if there) `Annotation/`.
    split: "train", "test" or "all" (both lists).
    size, transform: as in `LabelledImages`.
    Classes are the folders of `Images` in sorted order, named without the WordNet number ("n02085620-Chihuahua" is
    "Chihuahua"). Raises FileNotFoundError, ValueError or (scipy needed, but not installed) ImportError with what was
    looked for and where.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "test",
        size: int | tuple[int, int] | None = 224,
        transform: Transform | None = None,
    ) -> None:
        if split not in ("train", "test", "all"):
            raise ValueError(f"split: expected 'train', 'test' or 'all', got {split!r}")
        self.root = existing_folder(root, _WHAT)
        images = existing_folder(self.root / "Images", _WHAT)
        folders = sorted(entry.name for entry in images.iterdir() if entry.is_dir())
        files = [file for part in (("train", "test") if split == "all" else (split,)) for file in self._list(part)]
        unknown = sorted({file.split("/")[0] for file in files} - set(folders))
        if unknown:
            raise FileNotFoundError(
                f"{_WHAT}: the list names {len(unknown)} class(es) without a folder in {images}, "
                f"the first {unknown[0]!r}"
            )
        paths = [images / file for file in files]
        absent = [path for path in paths if not path.is_file()]
        if absent:
            raise FileNotFoundError(
                f"{_WHAT}: the list names {len(absent)} image(s) that are not there, the first {absent[0]}"
            )
        number = {name: label for label, name in enumerate(folders)}
        names = [name.partition("-")[2].replace("_", " ") or name for name in folders]
        super().__init__(paths, [number[file.split("/")[0]] for file in files], names, size, transform)

    def _list(self, split: str) -> list[str]:
        places = [
            folder / f"{split}_list.{kind}" for kind in ("txt", "mat") for folder in (self.root, self.root / "lists")
        ]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{_WHAT}: expected one of {', '.join(str(place) for place in places)}, found none")
        if path.suffix == ".txt":
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        try:
            from scipy.io import loadmat
            from scipy.io.matlab import MatReadError
        except ImportError as error:
            raise ImportError(
                f"{_WHAT}: expected scipy, to read {path}; install it (pip install scipy) "
                f"or put {split}_list.txt with one '<class>/<file>.jpg' a line beside it"
            ) from error
        try:
            return [str(entry[0]) for entry in loadmat(path)["file_list"][:, 0]]
        except (MatReadError, KeyError, IndexError, ValueError, OSError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{_WHAT}: expected the variable 'file_list' in {path}, but it cannot be read ({error})"
            ) from error

    def boxes(self, index: int) -> list[tuple[int, int, int, int]]:
        """The dogs in image `index`: (left, top, right, bottom) in pixels of the file, from
        `Annotation/<class>/<name>`.
        """
        image = self.paths[index]
        path = existing_file(self.root / "Annotation" / image.parent.name / image.stem, _WHAT)
        try:
            found = ElementTree.parse(path).getroot().findall("object/bndbox")
            sides = [[int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")] for box in found]
        except (ElementTree.ParseError, ValueError) as error:
            raise ValueError(
                f"{_WHAT}: expected boxes (object/bndbox with xmin, ymin, xmax, ymax) in {path}, but: {error}"
            ) from error
        return [(left, top, right, bottom) for left, top, right, bottom in sides]
