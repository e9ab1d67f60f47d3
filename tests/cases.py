"""Inputs of the operators, the implementations to test, and exact answers to compare with."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from sizes import VALUES as VALUES
from torch import Tensor

from finecf import _native

DEVICE = torch.device(os.environ.get("FINECF_TEST_DEVICE", "cpu"))
"""Where the operators are tested: `make gpu-check` sets it to "cuda"."""


def implementations() -> list[str]:
    """What can be tested here: plain torch, and the compiled kernels at every instruction set of this machine."""
    found = ["reference"]
    if _native.backend() == "reference":
        return found
    if DEVICE.type == "cuda":
        return [*found, "cuda"] if _native.build_info()["cuda"]["loaded"] else found
    return found + [f"cpu-{level}" for level in _native.cpu_isa_levels()]


every_implementation = pytest.mark.parametrize("implementation", implementations(), indirect=True)
compiled_implementations = pytest.mark.parametrize("implementation", implementations()[1:], indirect=True)


def strided(values: Tensor) -> Tensor:
    """The same values behind other strides: axes stored in reverse order, with a poisoned gap between elements."""
    reverse = tuple(reversed(range(values.ndim)))
    poison = float("nan") if values.is_floating_point() else 1 if values.dtype == torch.bool else -9999
    room = torch.full((*(values.shape[axis] for axis in reverse), 2), poison, dtype=values.dtype, device=values.device)
    room[..., 0] = values.permute(reverse)
    return room[..., 0].permute(reverse)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(rng: torch.Generator, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=rng, dtype=torch.float64) * scale).to(DEVICE, dtype)


def integers(rng: torch.Generator, high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=rng).to(DEVICE)


def game(batch: int = 2, cells: int = 7, classes: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """A linear head's game whose probabilities are neither all 0 nor all 1."""
    rng = generator(seed)
    return {
        "cell_logits": normal(rng, batch, cells, classes, scale=3 / cells**0.5, dtype=dtype),
        "base_logits": normal(rng, batch, classes, dtype=dtype),
        "target": integers(rng, classes, batch),
    }


def permutations(count: int, cells: int, seed: int = 0) -> Tensor:
    rng = generator(seed)
    rows = [torch.randperm(cells, generator=rng) for _ in range(count)]
    return (
        torch.stack(rows).to(DEVICE, torch.int32) if rows else torch.empty(0, cells, dtype=torch.int32, device=DEVICE)
    )


def exact_scores(cell_logits: Tensor, base_logits: Tensor, masks: Tensor, target: Tensor, value: str) -> Tensor:
    """`masked_class_scores` in float64, in one formula."""
    logits = base_logits.double()[:, None] + torch.einsum("mp,bpc->bmc", masks.double(), cell_logits.double())
    chosen = target[:, None, None].expand(-1, masks.shape[0], 1)
    wanted = logits.gather(2, chosen).squeeze(2)
    if value == "logit":
        return wanted
    if value == "log_odds":
        return wanted - logits.scatter(2, chosen, -torch.inf).logsumexp(2)
    log_prob = wanted - logits.logsumexp(2)
    return log_prob.exp() if value == "prob" else log_prob


def search(
    batch: int = 2,
    cells: int = 7,
    classes: int = 5,
    rows: int = 48,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of `replace_until_flip`: every image may use the whole bank, and needs a few edits as a rule."""
    rng = generator(seed)
    return {
        "cell_logits": normal(rng, batch, cells, classes, scale=scale, dtype=dtype),
        "candidate_logits": normal(rng, rows, classes, scale=scale, dtype=dtype),
        "similarity": torch.rand(batch, cells, rows, generator=rng, dtype=torch.float64).to(DEVICE, dtype),
        "base_logits": normal(rng, batch, classes, dtype=dtype),
        "target": integers(rng, classes, batch),
        "cell_scores": torch.rand(batch, cells, generator=rng, dtype=torch.float64).to(DEVICE, dtype),
        "candidate_range": torch.tensor([0, rows], device=DEVICE).repeat(batch, 1),
    }


def single(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same as arguments of `best_replacement`: the first edit, every cell allowed."""
    chosen = {name: arguments[name] for name in ("cell_logits", "candidate_logits", "similarity", "target")}
    return chosen | {
        "logits": arguments["base_logits"] + arguments["cell_logits"].sum(1),
        "allowed": torch.ones(arguments["cell_logits"].shape[:2], dtype=torch.bool, device=DEVICE),
        "candidate_range": arguments["candidate_range"],
    }


def exact_losses(arguments: dict[str, Any], image: int, logits: Tensor, sim: float = 1.0, cls: float = 1.0) -> Tensor:
    """Loss of every pair [P,N] of one image in float64, by its definition."""
    cell_logits, candidates = arguments["cell_logits"][image].double(), arguments["candidate_logits"].double()
    after = logits.double() - cell_logits[:, None] + candidates[None]
    wanted = after.log_softmax(2)[..., int(arguments["target"][image])]
    return sim * (1 - arguments["similarity"][image].double()) - cls * wanted


def permitted(arguments: dict[str, Any], image: int, allowed: Tensor, used: Tensor | None = None) -> Tensor:
    """Which pairs [P,N] an edit of one image may choose, from its range, its shortlist and what was used."""
    cells, rows = arguments["similarity"].shape[1:]
    pairs = allowed[:, None].expand(cells, rows).clone()
    start, stop = arguments["candidate_range"][image].tolist()
    pairs[:, :start] = False
    pairs[:, stop:] = False
    if used is not None:
        pairs &= ~used
    shortlist = arguments.get("shortlist")
    if shortlist is not None:
        listed = torch.zeros_like(pairs)
        for cell in range(cells):
            for row in shortlist[image, cell].tolist():
                if 0 <= row < rows:
                    listed[cell, row] = True
        pairs &= listed
    return pairs


def rounding(arguments: dict[str, Any], *more: Tensor) -> float:
    """What rounding may do to a loss in the type of the arguments: some units in the last place of the logits."""
    parts = [arguments["cell_logits"], arguments["candidate_logits"], *more]
    size = max(float(part.abs().max()) for part in parts if part.numel())
    return 32 * torch.finfo(arguments["cell_logits"].dtype).eps * max(1.0, size)


def gains(
    rows: int = 23,
    images: int = 3,
    regions: int = 7,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of `submodular_gains`: the last image has no row, the one before it no selected region."""
    rng = generator(seed)
    distance = torch.rand(images, regions, regions, generator=rng, dtype=torch.float64)
    selected = torch.rand(images, regions, generator=rng) > 0.5
    selected[max(images - 2, 0)] = False
    distance = distance + distance.mT
    others = distance.masked_fill(~selected[:, None] | torch.eye(regions, dtype=torch.bool), torch.inf)
    return {
        "insertion_logits": normal(rng, rows, classes, scale=3, dtype=dtype),
        "deletion_logits": normal(rng, rows, classes, dtype=dtype),
        "image": integers(rng, max(images - 1, 1), rows),
        "candidate": integers(rng, regions, rows),
        "distance": distance.to(DEVICE),
        "running_min": others.amin(2).to(DEVICE),
        "selected": selected.to(DEVICE),
        "target": integers(rng, classes, images),
        "weights": torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64).to(DEVICE),
    }


def composition(
    outputs: int = 5,
    images: int = 2,
    channels: int = 3,
    height: int = 9,
    width: int = 7,
    regions: int = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of `compose_regions`."""
    rng = generator(seed)
    return {
        "images": normal(rng, images, channels, height, width, scale=50).to(dtype),
        "labels": integers(rng, regions, images, height, width).to(torch.int32),
        "image": integers(rng, images, outputs),
        "keep": integers(rng, 2, outputs, regions).bool(),
        "baseline": normal(rng, images, channels, height, width, scale=50).to(dtype),
    }
