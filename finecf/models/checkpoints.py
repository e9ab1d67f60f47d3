"""Checkpoints of the small nets: safetensors with a JSON description in the header, checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

SHIPPED = Path(__file__).resolve().parent.parent / "data" / "checkpoints"
_KEY = "finecf"


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        # A copy: a single number may have a stride of 0, which counts as contiguous but cannot be seen as bytes.
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: str | os.PathLike[str], net: torch.nn.Module, meta: Mapping[str, Any]) -> None:
    """Writes the weights (floating point as float16) and the description `meta` (JSON values) to one safetensors
    file.
    """
    weights = {name: value.half() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    save_tensors(path, weights, meta)


def save_tensors(path: str | os.PathLike[str], values: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Writes tensors as they are, and the description `meta`, to one safetensors file: all of it or nothing."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in values.items()}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    header = json.dumps({**meta, "sha256": _digest(tensors)}, sort_keys=True)
    try:
        partial.write_bytes(save(tensors, metadata={_KEY: header}))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights (floating point as float32) and the description of a checkpoint. Errors as in `load_tensors`."""
    tensors, meta = load_tensors(path)
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}, meta


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors as they were saved, and their description.

    Raises FileNotFoundError where there is none, and ValueError where the file is truncated, changed or not a finecf
    checkpoint.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: expected a file at {file}, found {'a folder' if file.is_dir() else 'none'}"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get(_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"checkpoint: {file} ({file.stat().st_size} bytes) is truncated or not a safetensors file ({error}); "
            "restore it, or make it again"
        ) from error
    if header is None:
        raise ValueError(
            f"checkpoint: expected a description under {_KEY!r} in the header of {file}, "
            "found none; it was not written by finecf"
        )
    meta = json.loads(header)
    if "sha256" not in meta:
        raise ValueError(f"checkpoint: {file} was written by finecf, and holds no weights (an explanation, or a bank?)")
    if meta.pop("sha256") != _digest(tensors):
        raise ValueError(
            f"checkpoint: the weights in {file} are not those that were saved; restore it, or make it again"
        )
    return tensors, meta
