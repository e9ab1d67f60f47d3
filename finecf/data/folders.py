"""Any folder of images, one subfolder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from finecf.data._files import (
    IMAGE_SUFFIXES,
    Sample,
    Transform,
    checked_size,
    existing_file,
    existing_folder,
    read_image,
    resized,
)


class LabelledImages(Dataset[Sample]):
    """Image files with labels; item i is (float32 [3,H,W] RGB in [0,1], label, path).

    paths, labels: one for each image. class_names: one for each label.
    size: side or (height, width) to resize to, plainly (no crop); None keeps the size of the file.
    transform: applied to the tensor, e.g. the normalisation of a model (leave it out where `finecf.wrap` is given a
        `preprocess`).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        class_names: Sequence[str],
        size: int | tuple[int, int] | None = 224,
        transform: Transform | None = None,
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(f"labels: expected one for each of {len(paths)} images, got {len(labels)}")
        self.paths, self.labels, self.class_names = list(paths), list(labels), list(class_names)
        self.size, self.transform = checked_size(size), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        tensor = resized(read_image(self.paths[index]), self.size)
        return tensor if self.transform is None else self.transform(tensor), self.labels[index], str(self.paths[index])

    def images(self, indices: Sequence[int] | None = None) -> torch.Tensor:
        """Those items (default: all) as one float32 [n,3,H,W]; needs a `size`."""
        chosen = range(len(self)) if indices is None else indices
        if self.size is None:
            raise ValueError(
                "images: expected a data set with a size, so that the images can be stacked, got size=None"
            )
        return torch.stack([self[i][0] for i in chosen]) if len(chosen) else torch.empty(0, 3, 0, 0)


def _split_paths(split_file: Path, root: Path, flag: str) -> set[Path]:
    """The files that a list of `path flag` lines marks with `flag`."""
    rows = [
        line.rsplit(None, 1)
        for line in existing_file(split_file, "split file").read_text("utf-8").splitlines()
        if line.strip()
    ]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"split file: expected lines '<class>/<file> <flag>' in {split_file}, got one without a flag")
    flags = sorted({row[1] for row in rows})
    if flag not in flags:
        raise ValueError(f"split: expected one of the flags {flags} of {split_file}, got {flag!r}")
    return {root / row[0] for row in rows if row[1] == flag}


class ImageFolderDataset(LabelledImages):
    """Images in `<root>/<class>/.../<file>`; item i is (float32 [3,H,W] RGB in [0,1], label, path).

    Classes are the subfolders in sorted order; files follow in sorted order. A folder with images but no subfolders
    is read as one class named after it.

    split_file: a text file of lines `<class>/<file> <flag>` (CUB's convention: 1 = train, 0 = test), and
    split: "train", "test" or a flag itself; both or neither. A `split` without `split_file` looks for `split.txt` in
        root and beside it.
    classes: the names of the subfolders to read, in the order of their labels (default: all, sorted).
    size, transform: as in `LabelledImages`.
    Raises FileNotFoundError when the folder is missing or holds no images, saying what was looked for.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split_file: str | os.PathLike[str] | None = None,
        split: str | None = None,
        classes: Sequence[str] | None = None,
        size: int | tuple[int, int] | None = 224,
        transform: Transform | None = None,
    ) -> None:
        checked_size(size)
        folder = existing_folder(root, "image folder")
        if split_file is not None and split is None:
            raise ValueError("split: expected 'train', 'test' or a flag of the split file, got None")
        present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        where = {name: folder / name for name in present} or {folder.resolve().name: folder}
        names = list(where) if classes is None else list(classes)
        missing = [name for name in names if name not in where]
        if missing:
            raise ValueError(
                f"classes: expected subfolders of {folder} (it has {len(present)}: {_some(present)}), got {missing}"
            )
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = sorted(
                file for file in where[name].rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            paths += found
            labels += [label] * len(found)
        if not paths:
            raise FileNotFoundError(
                f"image folder: expected images ({', '.join(IMAGE_SUFFIXES)}) in {folder}/<class>/, "
                f"found none in {len(names)} folder(s); give the folder whose subfolders are the classes"
            )
        if split is not None:
            listing = self._find_split_file(folder) if split_file is None else Path(split_file).expanduser()
            chosen = _split_paths(listing, folder, {"train": "1", "test": "0"}.get(split, split))
            absent = sorted(
                path for path in chosen if path.relative_to(folder).parts[0] in names and not path.is_file()
            )
            if absent:
                raise FileNotFoundError(
                    f"image folder: {listing} lists {len(absent)} file(s) that are not there, the first {absent[0]}"
                )
            kept = [i for i, path in enumerate(paths) if path in chosen]
            paths, labels = [paths[i] for i in kept], [labels[i] for i in kept]
        super().__init__(paths, labels, names, size, transform)
        self.root = folder

    @staticmethod
    def _find_split_file(folder: Path) -> Path:
        candidates = [folder / "split.txt", folder.resolve().parent / "split.txt"]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(
            "split file: expected split.txt (lines '<class>/<file> <flag>') "
            f"at {candidates[0]} or {candidates[1]}, found neither"
        )


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
