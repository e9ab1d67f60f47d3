"""Safetensors files written in a stream and read in slices, so that a bank need not fit in memory.

The format (an 8-byte little-endian header length, a JSON header, the tensors' bytes) is the safetensors library's;
any reader of it opens these files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor

_DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "F64": (torch.float64, "<f8"),
    "F32": (torch.float32, "<f4"),
    "F16": (torch.float16, "<f2"),
    "I64": (torch.int64, "<i8"),
    "U8": (torch.uint8, "|u1"),
}
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor to write: its shape and dtype, and its rows in pieces, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path` that takes its place at the end, or vanishes after an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", suffix=".part", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(file.name, 0o666 & ~umask)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file piece by piece; `path` changes only once it is whole."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, entry in entries.items():
        size = int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, entry in entries.items():
            written = sum(write_tensor(file, piece.to(entry.dtype)) for piece in entry.pieces)
            if written != (expected := int(np.prod(entry.shape, dtype=np.int64)) * entry.dtype.itemsize):
                raise RuntimeError(f"tensor {name!r}: {written} bytes were written, its shape says {expected}")


def write_tensor(file: IO[bytes], tensor: Tensor) -> int:
    """Append the tensor's bytes; returns their number."""
    array = tensor.detach().cpu().contiguous().numpy()
    if sys.byteorder == "big":
        array = array.byteswap()
    file.write(array.reshape(-1).view(np.uint8).data)
    return int(array.nbytes)


class TensorFile:
    """An open safetensors file: metadata, and tensors read slice by slice from the disk.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or it is shorter than its header says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        self._file: BinaryIO = open(self.path, "rb")  # noqa: SIM115 (held open: the file may be replaced meanwhile)
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > _MAX_HEADER:
            raise ValueError(f"{self.path} is not a safetensors file")
        if size < 8 + length:
            raise ValueError(self._truncated(8 + length, size))
        try:
            header = json.loads(self._file.read(length))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {
                name: (_DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
                for name, e in header.items()
            }
            end = max((8 + length + e["data_offsets"][1] for e in header.values()), default=8 + length)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} is not a safetensors file that finecf wrote: its header is damaged"
            ) from error
        if size < end:
            raise ValueError(self._truncated(end, size))

    def _truncated(self, expected: int, size: int) -> str:
        return (
            f"{self.path} is truncated: its header promises {expected} bytes and it has {size}; "
            "copy it again or build it again"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._entries[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""
        return self._entries[name][0][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a tensor, read into memory of their own."""
        (_, code), shape, offset = self._entries[name]
        stop = shape[0] if stop is None else stop
        array = np.empty((stop - start, *shape[1:]), dtype=code)
        row = int(np.prod(shape[1:], dtype=np.int64)) * array.itemsize
        if array.size:
            read_into(self._file, array, offset + start * row)
        return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))

    def mapped(self, name: str) -> Tensor:
        """The whole tensor, mapped copy-on-write: pages come in as they are touched."""
        (_, code), shape, offset = self._entries[name]
        if 0 in shape:
            return self.read(name)
        return torch.from_numpy(np.memmap(self._file, dtype=code, mode="c", offset=offset, shape=shape))


def read_into(file: IO[bytes], array: np.ndarray, offset: int) -> None:
    """Fill a contiguous array from the file's bytes at `offset`, without moving the file's position."""
    view = array.reshape(-1).view(np.uint8).data
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise ValueError(f"{getattr(file, 'name', 'the file')} ended while it was read; it was cut short meanwhile")
        view, offset = view[count:], offset + count
