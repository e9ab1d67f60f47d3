"""The bank of candidate cells: real cells of correctly classified reference images, grouped by class."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.models import bankfile
from finecf.models.classifier import Classifier
from finecf.models.fold import HeadFold
from finecf.models.layers import all_finite, close_names

_FORMAT = "finecf-bank-1"
_DTYPES = (torch.float32, torch.float16)
# Of float32 rows held at once while streaming: small enough that the allocator hands out the same memory again, 2.5
# times as fast as slices of 64 MiB, which the system maps and clears each time.
_SLICE_BYTES = 16 << 20
_CACHE_BYTES = 512 << 20  # of candidate logits kept
_IMAGE_BYTES = 256 << 20  # of 8-bit images kept by keep_images="auto"
_IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


class BankInterrupted(KeyboardInterrupt):
    """Ctrl-C during `CandidateBank.from_loader` or `extend`: `bank` holds what was built, marked as not complete."""

    def __init__(self, message: str, bank: CandidateBank) -> None:
        super().__init__(message)
        self.bank = bank


@dataclass
class _Gathered:
    """Reference images in the order of their arrival; `blocks` are their cells, [D,P] views or places in a spool."""

    labels: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    blocks: list[Tensor | None] = field(default_factory=list)
    pictures: list[Tensor | None] = field(default_factory=list)
    seen: dict[int, int] = field(default_factory=dict)
    shape: tuple[int, int, int] | None = None
    image_size: tuple[int, int] | None = None
    picture_bytes: int = 0
    n_images: int = 0


class CandidateBank:
    """Cells of reference images: one row of D features per cell, all cells of an image together, classes in order.

    `from_loader` and `load` make one; the constructor takes what is at hand.

    Args:
        features: [N,D] float32 or float16, N = images * H * W, cells of an image in reading order.
        labels: class of each image, never falling, so that a class is a range of rows.
        grid: (H, W) of the map.
        sources: where each image came from.
        pictures: 8-bit images [3,h,w], or None where one is not kept.
        classes: the classes that were looked for (also those of which no image was kept); the labels' when None.
        class_names: names of all the classifier's classes.
        fingerprint: of the classifier (`Classifier.fingerprint`).
        seen: per class, how many reference images were looked at.
        image_size: (height, width) of the images as the model took them.
        complete: False where the build was interrupted.

    Attributes:
        features: [N,D]; of a loaded bank it is mapped from the file, and `rows` is the way to read it in little memory.
        norms: [N] float32, the rows' Euclidean norms.
        image_index, cell_index: [N], image and cell of each row.

    Raises:
        ValueError: empty, of a wrong shape, not grouped, or with NaN or inf.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor | Sequence[int],
        grid: tuple[int, int],
        sources: Sequence[str] | None = None,
        pictures: Sequence[Tensor | None] | None = None,
        classes: Iterable[int] | None = None,
        class_names: Sequence[str] | None = None,
        fingerprint: dict[str, Any] | None = None,
        seen: dict[int, int] | None = None,
        image_size: tuple[int, int] | None = None,
        complete: bool = True,
    ) -> None:
        if features.dim() != 2 or features.dtype not in _DTYPES:
            raise ValueError(
                f"features of the bank is {features.dtype} of shape {list(features.shape)}; "
                "expected float32 or float16 [N,D]"
            )
        self._init_index(labels, grid, sources, classes, class_names, fingerprint, seen, image_size, complete)
        if features.shape[0] != len(self):
            raise ValueError(
                f"features of the bank has {features.shape[0]} rows; {len(self.labels)} images of "
                f"{grid[0]} x {grid[1]} cells make {len(self)}"
            )
        self._features: Tensor | None = features
        self._file: bankfile.TensorFile | None = None
        self.width = features.shape[1]
        self._pictures = list(pictures) if pictures is not None else [None] * len(self.labels)
        self._slots: Tensor | None = None
        self.norms = torch.cat([self.rows(a, b).norm(dim=1) for a, b in self.slices()])
        if not all_finite(self.norms):
            row = int((~torch.isfinite(self.norms)).nonzero()[0])
            raise ValueError(f"features of the bank holds NaN or inf (row {row}, {self._row_text(row)})")

    def _init_index(
        self,
        labels: Tensor | Sequence[int],
        grid: tuple[int, int],
        sources: Sequence[str] | None,
        classes: Iterable[int] | None,
        class_names: Sequence[str] | None,
        fingerprint: dict[str, Any] | None,
        seen: dict[int, int] | None,
        image_size: tuple[int, int] | None,
        complete: bool,
    ) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.grid = (int(grid[0]), int(grid[1]))
        if self.labels.dim() != 1 or len(self.labels) == 0 or min(self.grid) < 1:
            raise ValueError("the bank is empty: it needs at least one reference image of at least one cell")
        if bool((self.labels.diff() < 0).any()):
            raise ValueError("labels of the bank fall somewhere; expected images grouped by class, classes rising")
        count = len(self.labels)
        self.sources = list(sources) if sources is not None else [f"image {i}" for i in range(count)]
        if len(self.sources) != count:
            raise ValueError(f"the bank has {count} images and {len(self.sources)} sources; expected one per image")
        present = self.labels.unique().tolist()
        self.classes: list[int] = sorted(set(present) | set(classes or ()))
        self.class_names = list(class_names) if class_names is not None else None
        self.fingerprint = dict(fingerprint or {})
        self.seen = dict(seen or {})
        self.image_size = image_size
        self.complete = complete
        cells = self.grid[0] * self.grid[1]
        starts = torch.searchsorted(self.labels, torch.tensor(self.classes), right=False) * cells
        stops = torch.searchsorted(self.labels, torch.tensor(self.classes), right=True) * cells
        self._ranges = dict(zip(self.classes, zip(starts.tolist(), stops.tolist(), strict=True), strict=True))
        self._cache: OrderedDict[tuple[int, int, int], tuple[Tensor, int, Tensor]] = OrderedDict()

    # Building

    @classmethod
    def from_loader(
        cls,
        clf: Classifier,
        loader: Iterable[Any],
        classes: Iterable[int | str] | None = None,
        correct_only: bool = True,
        dtype: torch.dtype = torch.float32,
        keep_images: bool | int | str = "auto",
        progress: bool | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> CandidateBank:
        """Build a bank from labelled reference images.

        Args:
            clf: the classifier.
            loader: gives (images, labels) or (images, labels, sources), batches or single images; labels are the
                model's class indices, sources say where an image came from (a path, best).
            classes: classes wanted (indices or names); all that come when None.
            correct_only: keep only images that the classifier takes for their label.
            dtype: of the rows kept: float32, or float16 for half the space.
            keep_images: keep 8-bit copies to show patches of: "auto" up to 256 MiB, a number of bytes, all (True) or
                none (False). Images that are not kept are read again from their source where that is a file.
            progress: show a bar; None: where standard error is a terminal.
            path: build on the disk in bounded memory: rows are spooled beside `path`, written grouped by class, and
                the bank comes back mapped from there.

        Raises:
            ValueError: no image is left, labels out of range, maps of different sizes, values beyond float16.
            BankInterrupted: Ctrl-C. Its `bank` holds the images of all finished batches with `complete=False`; with
                `path` it has been saved there. (Plain KeyboardInterrupt where there was none yet.)
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}; a bank keeps torch.float32 or torch.float16")
        wanted = None if classes is None else {clf.class_index(c) for c in classes}
        gathered = _Gathered()
        with _Spool(path) as spool:
            interrupted: KeyboardInterrupt | None = None
            try:
                for batch in _bar(loader, progress, "bank"):
                    _gather(gathered, clf, batch, wanted, correct_only, dtype, _image_budget(keep_images), spool)
            except KeyboardInterrupt as error:
                if not gathered.labels:
                    raise
                interrupted = error
            if not gathered.labels:
                raise ValueError(_nothing_left(gathered, wanted, clf))
            bank = cls._assemble(gathered, clf, wanted, dtype, spool, path, complete=interrupted is None)
        if interrupted is not None:
            where = f" and is saved in {path}" if path is not None else ""
            raise BankInterrupted(
                f"the build was interrupted after {gathered.n_images} images; the bank of the {len(bank.labels)} kept "
                f"is in this exception's .bank{where}",
                bank,
            ) from interrupted
        return bank

    @classmethod
    def _assemble(
        cls,
        gathered: _Gathered,
        clf: Classifier,
        wanted: set[int] | None,
        dtype: torch.dtype,
        spool: _Spool,
        path: str | os.PathLike[str] | None,
        complete: bool,
    ) -> CandidateBank:
        assert gathered.shape is not None
        width, height, columns = gathered.shape
        cells = height * columns
        labels = torch.tensor(gathered.labels)
        order = labels.argsort(stable=True).tolist()
        index: dict[str, Any] = {
            "labels": labels[order],
            "grid": (height, columns),
            "sources": [gathered.sources[i] for i in order],
            "classes": sorted(wanted if wanted is not None else gathered.seen),
            "class_names": clf.class_names,
            "fingerprint": clf.fingerprint(),
            "seen": gathered.seen,
            "image_size": gathered.image_size,
            "complete": complete,
        }
        pictures = [gathered.pictures[i] for i in order]
        if path is not None:
            blocks = (spool.read(i, cells, width, dtype) for i in order)
            _write(Path(path), dtype, width, blocks, [_thunk(picture) for picture in pictures], index)
            return cls.load(path)
        features = torch.empty(len(order), cells, width, dtype=dtype)
        for place, i in enumerate(order):
            block = gathered.blocks[i]
            assert block is not None
            features[place].copy_(block.T)
            gathered.blocks[i] = None
        return cls(features.view(-1, width), pictures=pictures, **index)

    def extend(
        self,
        clf: Classifier,
        loader: Iterable[Any],
        classes: Iterable[int | str] | None = None,
        correct_only: bool = True,
        keep_images: bool | int | str = "auto",
        progress: bool | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> CandidateBank:
        """Add reference images in place; arguments as in `from_loader`.

        A bank that was loaded from a file is written to that file again (or to `path`), in a stream; the old file
        stays as it is until the new one is whole.

        Returns:
            The bank itself.

        Raises:
            ValueError: another classifier, or images that give maps of another shape.
            BankInterrupted: Ctrl-C. The images of all finished batches have been added, and `complete` is False.
        """
        self.check(clf)
        try:
            more = CandidateBank.from_loader(clf, loader, classes, correct_only, self.dtype, keep_images, progress)
        except BankInterrupted as interrupt:
            self._merge(interrupt.bank, path)
            raise BankInterrupted(
                f"the bank was being extended; {len(interrupt.bank.labels)} images were added before the interrupt",
                self,
            ) from interrupt
        self._merge(more, path)
        return self

    def _merge(self, more: CandidateBank, path: str | os.PathLike[str] | None) -> None:
        if (more.grid, more.width) != (self.grid, self.width):
            raise ValueError(
                f"the new images give maps of {more.width} x {more.grid}; the bank holds {self.width} x {self.grid}: "
                "use images of the same size"
            )
        labels = torch.cat([self.labels, more.labels])
        order = labels.argsort(stable=True).tolist()
        sources = self.sources + more.sources
        index = self._index() | {
            "labels": labels[order],
            "sources": [sources[i] for i in order],
            "classes": sorted({*self.classes, *more.classes}),
            "seen": {c: self.seen.get(c, 0) + more.seen.get(c, 0) for c in sorted({*self.seen, *more.seen})},
            "complete": self.complete and more.complete,
        }
        old = len(self.labels)
        places = [(self, i) if i < old else (more, i - old) for i in order]
        blocks = (bank._block(i) for bank, i in places)
        if path is None and self._file is not None:
            path = self._file.path
        if path is not None:
            _write(Path(path), self.dtype, self.width, blocks, [bank._lazy_picture(i) for bank, i in places], index)
            merged = CandidateBank.load(path)
        else:
            merged = CandidateBank(torch.cat(list(blocks)), pictures=[b._picture(i) for b, i in places], **index)
        self.__dict__.update(merged.__dict__)

    # Files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to a safetensors file, in a stream; a file that is there stays until the new one is whole."""
        images = range(len(self.labels))
        blocks = (self._block(i) for i in images)
        _write(Path(path), self.dtype, self.width, blocks, [self._lazy_picture(i) for i in images], self._index())

    @classmethod
    def load(cls, path: str | os.PathLike[str], memory_map: bool = True) -> CandidateBank:
        """Open a saved bank; its rows stay on the disk unless `memory_map=False`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no bank, or truncated.
        """
        file = bankfile.TensorFile(path)
        self = cls.__new__(cls)
        index = _metadata(file)
        self._init_index(file.read("labels"), **index)
        rows, self.width = file.shape("features")
        self.norms = file.read("norms")
        self._slots = file.read("picture_slots")
        if not rows == len(self) == len(self.norms) or len(self._slots) != len(self.labels):
            raise ValueError(f"{path} is damaged: it has {rows} rows of features for {len(self)} cells; build it again")
        if not all_finite(self.norms):
            raise ValueError(f"features of the bank {path} holds NaN or inf; build it again")
        self._file, self._features, self._pictures = file, None, []
        if memory_map:
            return self
        pictures = [self._picture(i) for i in range(len(self.labels))]
        return cls(file.read("features"), pictures=pictures, **self._index())

    def _index(self) -> dict[str, Any]:
        """What the constructor takes beside features and pictures; all but the labels is the file's metadata."""
        return {name: getattr(self, name) for name in _INDEX}

    # Reading

    def __len__(self) -> int:
        """N, the rows."""
        return len(self.labels) * self.cells

    def __repr__(self) -> str:
        where = "in memory" if self._file is None else f"in {self._file.path}"
        return (
            f"CandidateBank({len(self)} x {self.width} {self.dtype}, {len(self.labels)} images of "
            f"{len(self.classes)} classes, {where}{'' if self.complete else ', not complete'})"
        )

    @property
    def cells(self) -> int:
        """P, the cells of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are kept."""
        return self._features.dtype if self._features is not None else self._opened().dtype("features")

    @property
    def features(self) -> Tensor:
        """All rows [N,D] as they are kept; of a loaded bank mapped, and pages that are read stay: prefer `rows`."""
        return self._features if self._features is not None else self._opened().mapped("features")

    @property
    def image_index(self) -> Tensor:
        """Image of each row, [N] int64."""
        return torch.arange(len(self)) // self.cells

    @property
    def cell_index(self) -> Tensor:
        """Cell of each row in reading order, [N] int64."""
        return torch.arange(len(self)) % self.cells

    def class_range(self, wanted: int | str) -> tuple[int, int]:
        """The half-open range of rows of a class; empty where no reference image of it was kept.

        Raises:
            ValueError: the bank was not built for that class.
        """
        if isinstance(wanted, str):
            names = self.class_names or []
            if wanted not in names:
                raise ValueError(f"unknown class {wanted!r}: {close_names(wanted, names)}")
            wanted = names.index(wanted)
        if int(wanted) not in self._ranges:
            held = ", ".join(self._name(c) for c in self.classes[:20])
            more = f" and {len(self.classes) - 20} more" if len(self.classes) > 20 else ""
            raise ValueError(
                f"the bank holds no cells of class {self._name(int(wanted))}; it was built for {held}{more}"
            )
        return self._ranges[int(wanted)]

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop as float32 [n,D]; a loaded bank reads just these from the disk, into memory of their own."""
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"rows {start}..{stop} are not in the bank's 0..{len(self)}")
        if self._features is not None:
            return self._features[start:stop].float()
        rows = self._opened().read("features", start, stop).float()
        if not all_finite(rows):
            raise ValueError(f"features of the bank {self._opened().path} holds NaN or inf in rows {start}..{stop}")
        return rows

    def slices(
        self, start: int = 0, stop: int | None = None, max_bytes: int = _SLICE_BYTES
    ) -> Iterator[tuple[int, int]]:
        """Consecutive ranges that cover start..stop, each of at most `max_bytes` as float32 rows."""
        stop = len(self) if stop is None else stop
        step = max(1, max_bytes // (4 * self.width))
        for first in range(start, stop, step):
            yield first, min(stop, first + step)

    def candidate_logits(self, fold: HeadFold, start: int = 0, stop: int | None = None) -> Tensor:
        """What rows start..stop would add to the logits in place of a cell: [n,C], for a linear fold.

        Computed slice by slice, and kept (up to 512 MiB, the last used) for as long as the head's weights are the same.
        """
        if fold.weight.shape[1] != self.width:
            raise ValueError(f"the bank's rows have {self.width} features; the head takes {fold.weight.shape[1]}")
        stop = len(self) if stop is None else stop
        key, weight = (start, stop, fold.cells), fold.weight
        hit = self._cache.get(key)
        version = -1 if weight.is_inference() else weight._version
        if hit is not None and hit[0].data_ptr() == weight.data_ptr() and hit[1] == version >= 0:
            self._cache.move_to_end(key)
            return hit[2]
        out = torch.empty(stop - start, weight.shape[0], dtype=weight.dtype, device=weight.device)
        for a, b in self.slices(start, stop):
            out[a - start : b - start] = fold.candidate_logits(self.rows(a, b).to(weight.device))
        self._cache[key] = (weight, version, out)
        while sum(o.nbytes for _, _, o in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return out

    def patch_image(self, row: int) -> tuple[np.ndarray | None, tuple[int, int]]:
        """The reference image of a row, uint8 [h,w,3], and the row's cell (r, c); None where no image can be had.

        An image that was not kept is read from its source, if that is a file, and resized to the model's input: where
        the user's own transform cropped it, cell and picture agree only roughly.
        """
        if not 0 <= row < len(self):
            raise ValueError(f"row {row} is not in the bank's 0..{len(self) - 1}")
        image, cell = divmod(int(row), self.cells)
        place = divmod(cell, self.grid[1])
        picture = self._picture(image)
        if picture is not None:
            return picture.permute(1, 2, 0).numpy(), place
        return _read_picture(self.sources[image], self.image_size), place

    def source(self, row: int) -> str:
        """Where the row's reference image came from."""
        return self.sources[int(row) // self.cells]

    def check(self, clf: Classifier, features: Tensor | None = None) -> None:
        """Refuse, with a ValueError, a classifier (or its map [B,D,H,W]) that the bank was not built with."""
        if features is not None and features.shape[1] != self.width:
            raise ValueError(
                f"the bank's rows have {self.width} features, and layer {clf.layer_name!r} gives {features.shape[1]}: "
                "build the bank with this classifier and layer"
            )
        what = clf.differs_from(self.fingerprint)
        if what == "weights":
            raise ValueError(
                "the bank was built with other weights than this classifier has: build it again with this classifier"
            )
        if what is not None:
            text = "number of classes" if what == "classes" else what
            raise ValueError(
                f"the bank was built with {text} {self.fingerprint[what]!r}; this classifier has "
                f"{clf.fingerprint()[what]!r}: build the bank with this classifier"
            )

    def _opened(self) -> bankfile.TensorFile:
        assert self._file is not None
        return self._file

    def _block(self, image: int) -> Tensor:
        start, stop = image * self.cells, (image + 1) * self.cells
        return (
            self._features[start:stop] if self._features is not None else self._opened().read("features", start, stop)
        )

    def _picture(self, image: int) -> Tensor | None:
        picture = self._lazy_picture(image)
        return None if picture is None else picture()

    def _lazy_picture(self, image: int) -> Callable[[], Tensor] | None:
        if self._slots is None:
            return _thunk(self._pictures[image])
        slot = int(self._slots[image])
        return None if slot < 0 else lambda: self._opened().read("pictures", slot, slot + 1)[0]

    def _name(self, index: int) -> str:
        names = self.class_names
        return repr(names[index]) if names is not None and 0 <= index < len(names) else str(index)

    def _row_text(self, row: int) -> str:
        image, cell = divmod(row, self.cells)
        return f"cell {cell} of {self.sources[image]}"


_INDEX = (
    "labels",
    "grid",
    "sources",
    "classes",
    "class_names",
    "fingerprint",
    "seen",
    "image_size",
    "complete",
)


class _Spool:
    """Cells of the images in the order of their arrival, in a file that vanishes; unused where `path` is None."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._file: IO[bytes] | None = None
        if path is not None:
            folder = Path(path).absolute().parent
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def append(self, blocks: Tensor) -> None:
        """Add images' cells, [k,P,D]."""
        assert self._file is not None
        bankfile.write_tensor(self._file, blocks)

    def read(self, image: int, cells: int, width: int, dtype: torch.dtype) -> Tensor:
        """One image's cells, [P,D]."""
        assert self._file is not None
        self._file.flush()
        block = torch.empty(cells, width, dtype=dtype)
        bankfile.read_into(self._file, block.numpy(), image * block.nbytes)
        return block


def _gather(
    into: _Gathered,
    clf: Classifier,
    batch: Any,
    wanted: set[int] | None,
    correct_only: bool,
    dtype: torch.dtype,
    image_budget: int,
    spool: _Spool,
) -> None:
    """Run one batch and add the images that are kept; nothing is added unless all of it is."""
    raw, labels, sources = _unpack(batch, into.n_images)
    if wanted is not None and not any(label in wanted for label in labels):
        into.n_images += len(labels)
        return
    x = clf.prepare(raw)
    if len(x) != len(labels) or len(sources) != len(labels):
        raise ValueError(
            f"the loader gave {len(x)} images, {len(labels)} labels and {len(sources)} sources in one batch"
        )
    features, logits = clf.features_and_logits(x)
    shape = (features.shape[1], features.shape[2], features.shape[3])
    if into.shape not in (None, shape):
        raise ValueError(
            f"the reference images give maps of different shapes, {into.shape} and {shape}: resize them to one size"
        )
    classes = logits.shape[1]
    if any(not 0 <= label < classes for label in labels):
        bad = next(label for label in labels if not 0 <= label < classes)
        raise ValueError(f"the loader gave label {bad}; the classifier has classes 0..{classes - 1}")
    predicted = logits.argmax(1).tolist()
    kept = [
        i
        for i, label in enumerate(labels)
        if (wanted is None or label in wanted) and (not correct_only or predicted[i] == label)
    ]
    blocks = (features if len(kept) == len(labels) else features[kept]).flatten(2).cpu()
    if dtype == torch.float16 and blocks.numel() and float(blocks.abs().max()) > torch.finfo(dtype).max:
        raise ValueError("the features are larger than float16 holds (65504): use dtype=torch.float32")
    blocks = blocks.to(dtype)
    pictures: list[Tensor | None] = [None] * len(kept)
    if kept and into.picture_bytes < image_budget:
        size = into.image_size or (x.shape[2], x.shape[3])
        room = max(0, (image_budget - into.picture_bytes) // (3 * size[0] * size[1]))
        shown = _as_pictures(raw, x, kept[:room], size)
        pictures[: len(shown)] = shown
    # From here on nothing is computed: an interrupt loses at most this batch.
    if spool.on_disk:
        spool.append(blocks.transpose(1, 2))
        into.blocks += [None] * len(kept)
    else:
        into.blocks += list(blocks)
    into.pictures += pictures
    into.picture_bytes += sum(p.nbytes for p in pictures if p is not None)
    into.sources += [sources[i] for i in kept]
    into.shape, into.image_size = shape, into.image_size or (x.shape[2], x.shape[3])
    for label in labels:
        if wanted is None or label in wanted:
            into.seen[label] = into.seen.get(label, 0) + 1
    into.n_images += len(labels)
    into.labels += [labels[i] for i in kept]


def _unpack(batch: Any, number: int) -> tuple[Any, list[int], list[str]]:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            f"the loader gave a {type(batch).__name__}; expected (images, labels) or (images, labels, sources)"
        )
    labels = torch.as_tensor(batch[1])
    if labels.is_floating_point() or labels.dim() > 1:
        raise ValueError(f"labels is {labels.dtype} of shape {list(labels.shape)}; expected integers [B]")
    values = labels.reshape(-1).tolist()
    if len(batch) == 2:
        return batch[0], values, [f"image {number + i}" for i in range(len(values))]
    sources = [batch[2]] if isinstance(batch[2], (str, os.PathLike)) else batch[2]
    return batch[0], values, [str(source) for source in sources]


def _as_pictures(raw: Any, x: Tensor, kept: list[int], size: tuple[int, int]) -> list[Tensor]:
    """8-bit RGB pictures [3,h,w] of some images of a batch, with the geometry of the model's input."""
    if isinstance(raw, Tensor) and raw.shape[-2:] == x.shape[-2:]:
        x = raw if raw.dim() == 4 else raw.unsqueeze(0)
    low, high = (float(v) for v in x.aminmax())
    unit = x.dtype == torch.uint8 or (low >= 0 and high <= 1)
    # One image at a time: its intermediate results stay in the cache.
    return [_as_picture(x[i].cpu() if unit else _to_unit(x[i].cpu().float()), size) for i in kept]


def _as_picture(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image [Ch,h,w], 8-bit or in [0,1], as an 8-bit RGB picture in memory of its own."""
    picture = image.clone() if image.dtype == torch.uint8 else image.mul(255).add_(0.5).to(torch.uint8)
    picture = picture[:3] if picture.shape[0] >= 3 else picture[:1].expand(3, -1, -1)
    if tuple(picture.shape[1:]) != size:
        resized = F.interpolate(picture[None].float(), size=size, mode="bilinear", antialias=True)[0]
        picture = resized.round_().to(torch.uint8)
    return picture.contiguous()


def _to_unit(image: Tensor) -> Tensor:
    """A normalised image [Ch,h,w] in [0,1]: with ImageNet's normalisation undone, else stretched to its range."""
    low, high = (float(v) for v in image.aminmax())
    if image.shape[0] == 3:
        mean, std = (t.view(3, 1, 1) for t in _IMAGENET)
        unit = image * std + mean
        if float(unit.min()) >= -0.02 and float(unit.max()) <= 1.02:
            return unit.clamp_(0, 1)
    return (image - low) / max(high - low, 1e-12)


def _read_picture(source: str, size: tuple[int, int] | None) -> np.ndarray | None:
    if not Path(source).is_file():
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as image:
            rgb = image.convert("RGB")
            return np.asarray(rgb if size is None else rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)).copy()
    except UnidentifiedImageError:
        return None


def _write(
    path: Path,
    dtype: torch.dtype,
    width: int,
    blocks: Iterable[Tensor],
    pictures: Sequence[Callable[[], Tensor] | None],
    index: dict[str, Any],
) -> None:
    """Write a bank file from its images' cells [P,D] in order; the norms are taken as the cells pass by.

    `pictures` are called one at a time when it is their turn.
    """
    labels: Tensor = index["labels"]
    cells = index["grid"][0] * index["grid"][1]
    rows = len(labels) * cells
    norms = torch.empty(rows)

    def passing() -> Iterator[Tensor]:
        for image, block in enumerate(blocks):
            # Into one tensor: thousands of small ones between the large would keep freed memory from being used again.
            norms[image * cells : (image + 1) * cells] = block.float().norm(dim=1)
            yield block

    kept = [picture for picture in pictures if picture is not None]
    has = torch.tensor([picture is not None for picture in pictures])
    slots = torch.where(has, has.cumsum(0) - 1, -1)
    size = tuple(kept[0]().shape) if kept else (3, 0, 0)
    entries = {
        "features": bankfile.Entry(dtype, (rows, width), passing()),
        "norms": bankfile.Entry(torch.float32, (rows,), [norms]),
        "labels": bankfile.Entry(torch.int64, (len(labels),), [labels]),
        "picture_slots": bankfile.Entry(torch.int64, (len(labels),), [slots]),
        "pictures": bankfile.Entry(torch.uint8, (len(kept), *size), (picture() for picture in kept)),
    }
    meta = {name: index[name] for name in _INDEX if name != "labels"}
    bankfile.write(path, entries, {"format": _FORMAT, "bank": json.dumps(meta)})


def _thunk(picture: Tensor | None) -> Callable[[], Tensor] | None:
    return None if picture is None else lambda: picture


def _metadata(file: bankfile.TensorFile) -> dict[str, Any]:
    """The bank's index but for the labels, from a file that must be a bank."""
    needed = ("features", "norms", "labels", "picture_slots", "pictures")
    if file.metadata.get("format") != _FORMAT or not all(name in file for name in needed):
        raise ValueError(f"{file.path} is no candidate bank (format {_FORMAT}); CandidateBank.save writes one")
    try:
        meta = json.loads(file.metadata["bank"])
        meta["seen"] = {int(label): count for label, count in meta["seen"].items()}
        meta["image_size"] = None if meta["image_size"] is None else tuple(meta["image_size"])
        return {name: meta[name] for name in _INDEX if name != "labels"}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file.path} is damaged: its description of the bank cannot be read") from error


def _image_budget(keep_images: bool | int | str) -> int:
    if keep_images == "auto":
        return _IMAGE_BYTES
    if isinstance(keep_images, bool):
        return sys.maxsize if keep_images else 0
    if isinstance(keep_images, int) and keep_images >= 0:
        return keep_images
    raise ValueError(f'keep_images is {keep_images!r}; expected "auto", True, False or a number of bytes')


def _nothing_left(gathered: _Gathered, wanted: set[int] | None, clf: Classifier) -> str:
    if gathered.n_images == 0:
        return "the bank would be empty: the loader gave no images"
    if not gathered.seen:
        names = ", ".join(clf.class_name(c) for c in sorted(wanted or ()))
        return f"the bank would be empty: none of the {gathered.n_images} images is labelled {names}"
    return (
        f"the bank would be empty: none of the {sum(gathered.seen.values())} images of the wanted classes is "
        "classified as its label: check labels and preprocessing, or use correct_only=False"
    )


def _bar(items: Iterable[Any], progress: bool | None, text: str) -> Iterable[Any]:
    """`items` with a progress bar on standard error; None: only where that is a terminal."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return items
    from tqdm import tqdm

    return tqdm(items, desc=text, unit="batch", leave=False)
