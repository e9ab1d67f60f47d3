"""How much memory an explainer may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

DEFAULT_SHARE = 4
DEFAULT_LIMIT = 1 << 30


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now, read from CUDA, from Linux, or from the size of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def budget_for(device: torch.device, asked: int | None) -> int:
    """The memory budget in bytes: what was asked for, else a quarter of what is free and at most 1 GiB.

    Raises:
        ValueError: the budget asked for is not positive.
    """
    if asked is None:
        return min(free_memory(device) // DEFAULT_SHARE, DEFAULT_LIMIT)
    if asked <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes or None, got {asked}")
    return int(asked)


def checked_micro_batch(asked: int | None) -> int | None:
    """How many images the user lets go through the model at a time; None: it is for us to say.

    Raises:
        ValueError: fewer than one.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"micro_batch must be at least 1, or None; got {asked}")
    return asked


@contextmanager
def graph_bytes(*modules: nn.Module) -> Iterator[dict[int, int]]:
    """The bytes of every storage that graphs hold on to inside, by address, without the modules' own weights.

    Raises:
        RuntimeError: in a backward, where what a graph holds was overwritten since, as autograd itself does.
    """
    weights = {each.untyped_storage().data_ptr() for module in modules for each in module.parameters()}
    held: dict[int, int] = {}

    def keep(saved: Tensor) -> tuple[Tensor, int]:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return saved, saved._version

    def give_back(kept: tuple[Tensor, int]) -> Tensor:
        saved, version = kept
        if saved._version != version:  # hooks switch off autograd's own look
            raise RuntimeError("a tensor that the gradient needs was overwritten by an in-place operation")
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, give_back):
        yield held
