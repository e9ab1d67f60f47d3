"""Opening what users point at, with a sentence when it is not there or broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

Transform = Callable[[torch.Tensor], torch.Tensor]
Sample = tuple[torch.Tensor, int, str]
"""(float32 [3,H,W] RGB in [0,1], label, path of the file)."""


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """The folder as a Path; a FileNotFoundError says what was looked for there."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"{what}: expected a folder at {folder}, found nothing there; check the path")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{what}: expected a folder at {folder}, found a file; give the folder that contains it"
        )
    return folder


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """The file as a Path; a FileNotFoundError says what was looked for there."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{what}: expected a file at {file}, found {'a folder' if file.is_dir() else 'nothing'} there"
        )
    return file


def read_table(path: Path, what: str, columns: int, rest: bool = False) -> list[list[str]]:
    """The lines of a text table, split at white space into `columns` fields; `rest` keeps the white space of the
    last field.

    Empty lines are left out. A line with another number of fields is a ValueError that names file and line.
    """
    rows: list[list[str]] = []
    for number, line in enumerate(existing_file(path, what).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = line.split(None, columns - 1) if rest else line.split()
        if len(row) != columns:
            raise ValueError(f"{what}: expected {columns} fields in line {number} of {path}, got {len(row)}: {line!r}")
        rows.append(row)
    return rows


def parse(kind: type, text: str, path: Path, what: str) -> float:
    """A number from a field of a table; a ValueError names the file."""
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what}: expected a number in {path}, got {text!r}") from None


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """An image file as uint8 RGB [H,W,3]; missing and broken files are a FileNotFoundError and a ValueError that
    name the path.
    """
    file = existing_file(path, "image")
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"image: expected a readable image at {file}, but it cannot be decoded ({error}); restore or remove it"
        ) from error


def resized(image: np.ndarray, size: int | tuple[int, int] | None) -> torch.Tensor:
    """uint8 [H,W,3] to float32 [3,h,w] in [0,1], plainly resized (bilinear, antialiased) to `size` (side, or (h,
    w)); None keeps it.
    """
    picture = Image.fromarray(image)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if (width, height) != picture.size:
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    array = np.array(picture, dtype=np.float32) / np.float32(255.0)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def checked_size(size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """Refuses a size that is not positive."""
    sides = () if size is None else ((size,) if isinstance(size, int) else tuple(size))
    if size is not None and (len(sides) not in (1, 2) or min(sides) < 1):
        raise ValueError(f"size: expected a positive side or (height, width) in pixels, or None, got {size!r}")
    return size
