"""Trains the small shipped nets: seeded, resumable, and the same bits again on the same machine, versions and
threads.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from finecf.data.birds import SyntheticBirds
from finecf.data.digits import SIZE, Digits, digits
from finecf.data.fashion import FashionMNIST, fashion_mnist
from finecf.models.checkpoints import save_checkpoint
from finecf.regions.baseline import blur_every_second
from finecf.training.nets import BIRDS_WIDTHS, DIGITS_WIDTH, BirdsNet, DigitsNet

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, in all)."""

SHIFT_SHARE = 25
"""Training pictures are moved by up to a 25th of their side (5 pixels at 128)."""


@dataclass(frozen=True)
class _Recipe:
    """What the optimiser is told."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    seed: int
    precision: str  # "float32", or "bfloat16": the forward pass under autocast
    augment: bool  # pictures are moved and mirrored, where that leaves their class as it is
    blur: float = 0.0  # largest standard deviation, in pixels, of a blur of half of the pictures

    def told(self) -> dict[str, Any]:
        """What a description says of it; no blur is not mentioned, as in files of before there was one."""
        return {name: value for name, value in asdict(self).items() if name != "blur" or value}


def command_of(what: str, **options: object) -> str:
    """The `finecf train` command with these options; of a file only the name, and nothing of those that are None."""
    words = ["finecf", "train", what]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", Path(value).name if isinstance(value, os.PathLike) else str(value)]
    return shlex.join(words)


@contextmanager
def thread_count(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _reporter(progress: bool | Progress) -> Iterator[Progress]:
    """The caller's callback, a tqdm bar for each stage (True), or silence (False)."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda stage, done, total: None
        return
    from tqdm import tqdm

    bars: dict[str, tqdm[None]] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage)
        bars[stage].update(done - bars[stage].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def _one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: up along a cosine for a quarter of the steps, then down to nearly zero (Smith and
    Topin, 2018).
    """
    rise = max(1, steps // 4)
    if step < rise:
        low, high, share = peak / 25, peak, step / rise
    else:
        low, high, share = peak, peak / 1e4, (step - rise) / max(1, steps - rise)
    return low + (high - low) * (1 - math.cos(math.pi * share)) / 2


def _as_float(images: torch.Tensor) -> torch.Tensor:
    """Pictures as float32 in [0,1], from uint8 or float."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch as float32 in [0,1], moved by up to a share of its side and, for a fair coin, mirrored."""
    height, width = images.shape[-2:]
    reach = height // SHIFT_SHARE
    dy, dx, coin = (int(torch.randint(bound, (), generator=generator)) for bound in (2 * reach + 1, 2 * reach + 1, 2))
    padded = F.pad(_as_float(images), (reach,) * 4, mode="replicate")
    moved = padded[:, :, dy : dy + height, dx : dx + width]
    return moved.flip(-1) if coin else moved


def _softened(images: torch.Tensor, blur: float, generator: torch.Generator) -> torch.Tensor:
    """Every second picture blurred, all by the same sigma up to `blur`."""
    sigma = blur * float(torch.rand((), generator=generator))
    return blur_every_second(images, max(sigma, 0.05), 0)


def _read_state(resume_file: Path) -> dict[str, Any]:
    """The state of an interrupted training; a ValueError where the file is broken."""
    try:
        return torch.load(resume_file, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"resume: {resume_file} is truncated or not a training state ({error}); delete it, or pass resume=False"
        ) from error


def _fit(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    recipe: _Recipe,
    of: dict[str, Any],
    resume_file: Path,
    resume: bool,
    report: Progress,
) -> None:
    """Gradient descent over [N,3,H,W] pictures; after each epoch the state goes to `resume_file`, with what it is
    the state `of`.

    Order and augmentation of an epoch depend on (seed, epoch) alone, and the learning rate on the step alone, so
    that a run that was interrupted and resumed gives the same weights as one that was not.
    """
    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    per_epoch = len(images) // recipe.batch
    fingerprint = json.dumps({**recipe.told(), **of, "images": len(images)}, sort_keys=True)
    first = 0
    if resume and resume_file.is_file():
        state = _read_state(resume_file)
        if state["fingerprint"] != fingerprint:
            raise ValueError(
                f"resume: {resume_file} is of a run with other settings ({state['fingerprint']}); "
                "delete it, or pass resume=False"
            )
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["epoch"]
    net.train()
    for epoch in range(first, recipe.epochs):
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        order = torch.randperm(len(images), generator=generator)
        for k in range(per_epoch):
            step = epoch * per_epoch + k
            chosen = order[k * recipe.batch : (k + 1) * recipe.batch]
            for group in optimiser.param_groups:
                group["lr"] = _one_cycle(step, recipe.epochs * per_epoch, recipe.learning_rate)
            pictures = images[chosen]
            x = _augmented(pictures, generator) if recipe.augment else _as_float(pictures)
            if recipe.blur:
                x = _softened(x, recipe.blur, generator)
            half = recipe.precision == "bfloat16"
            # The cache would outlive a step inside a user's autocast.
            with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            report("train", step + 1, recipe.epochs * per_epoch)
        unfinished = resume_file.with_suffix(".partial")
        torch.save(
            {
                "fingerprint": fingerprint,
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "epoch": epoch + 1,
            },
            unfinished,
        )
        unfinished.replace(resume_file)


@torch.no_grad()
def predict(net: nn.Module, images: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """Int64 [N]: the predicted class of each picture, uint8 [N,3,H,W] or float [N,3,H,W] in [0,1]; `net` must be in
    eval mode.
    """
    parts = [net(_as_float(images[i : i + batch])).argmax(1) for i in range(0, len(images), batch)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _check(recipe: _Recipe, images: int) -> None:
    """Refuses what cannot be trained with."""
    if recipe.precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {recipe.precision!r}")
    for name, value in (("epochs", recipe.epochs), ("batch", recipe.batch)):
        if value < 1:
            raise ValueError(f"{name}: expected a whole number from 1 on, got {value}")
    if not 0 <= recipe.blur < math.inf:
        raise ValueError(f"blur: expected a number of pixels from 0 on, got {recipe.blur}")
    if not recipe.learning_rate > 0:
        raise ValueError(f"learning_rate: expected a positive number, got {recipe.learning_rate}")
    if images < recipe.batch:
        raise ValueError(
            f"images: expected at least one batch ({recipe.batch}), got {images}; draw more or take a smaller batch"
        )


Split = tuple[torch.Tensor, torch.Tensor]
"""Pictures [N,Ch,H,W] (uint8, or float in [0,1]) and int64 [N] labels."""


@dataclass(frozen=True)
class _Run:
    """What the caller says of one training, whatever is trained."""

    recipe: _Recipe
    out: Path
    threads: int | None
    resume: bool
    progress: bool | Progress


def _train(
    run: _Run,
    architecture: type[BirdsNet | DigitsNet],
    meta: dict[str, Any],
    splits: Callable[[Progress], tuple[Split, Split]],
    family_of: list[int],
    channels_last: bool,
) -> dict[str, Any]:
    """Builds a net from its description (`classes`, `arguments`), fits it to the first of the splits, grades it on the
    second as it will be stored (in half precision), and writes it with the whole description, which is returned.
    """
    recipe, out = run.recipe, run.out
    with thread_count(run.threads), _reporter(run.progress) as report, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        net: nn.Module = architecture(len(meta["classes"]), **meta["arguments"])
        meta = {"architecture": architecture.__name__, "seed": recipe.seed, **meta}
        train, (pictures, truth) = splits(report)
        if channels_last:
            net = net.to(memory_format=torch.channels_last)
        out.parent.mkdir(parents=True, exist_ok=True)
        resume_file = out.with_name(out.name + ".resume")
        _fit(net, *train, recipe, meta, resume_file, run.resume, report)
        stored = copy.deepcopy(net).half().float().eval()
        predicted = predict(stored, pictures)
        wrong, families = predicted != truth, torch.tensor(family_of)
        inside = int((families[predicted] == families[truth])[wrong].sum())
        meta = {
            **meta,
            "recipe": recipe.told(),
            "images": len(train[0]),
            "test_images": len(truth),
            "accuracy": round(1 - float(wrong.double().mean()), 4) if len(truth) else None,
            "mistakes": int(wrong.sum()),
            "mistakes_in_family": inside,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        save_checkpoint(out, net, meta)
        resume_file.unlink()
        return meta


def _batches(train: Digits | FashionMNIST, test: Digits | FashionMNIST) -> Callable[[Progress], tuple[Split, Split]]:
    """The splits of sets that lie in memory."""

    def splits(_: Progress) -> tuple[Split, Split]:
        return (train.batch(), torch.from_numpy(train.labels)), (test.batch(), torch.from_numpy(test.labels))

    return splits


def train_birds(
    out: str | os.PathLike[str] = "birds.safetensors",
    epochs: int = 12,
    images: int = 12_000,
    test_images: int = 4_000,
    classes: int = 20,
    size: int = 128,
    batch: int = 64,
    learning_rate: float = 4e-3,
    seed: int = 0,
    precision: str = "float32",
    threads: int | None = 1,
    workers: int = 0,
    cache: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | Progress = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a `BirdsNet` on SyntheticBirds and writes it to `out`; returns its description (the header of the
    checkpoint).

    out: the safetensors file. `<out>.resume` beside it keeps the state after each epoch, and is removed at the end.
    images, test_images: how many are drawn to train on, and to grade the net on.
    precision: "float32", or "bfloat16" for the convolutions, which is three times as fast on processors with matrix
        units (AMX) and slower on those without.
    threads: of torch (None: as they are); the same number gives the same weights on one machine. workers: processes
        that draw. cache: a folder that keeps the pictures for another run.
    resume: whether to go on from `<out>.resume`; a ValueError if it is of a run with other settings.
    progress: True for bars, or a callback (stage, done, in all).
    command: what the description says made the file.
    """
    train = SyntheticBirds("train", size=size, n=images, classes=classes, seed=seed, cache=cache)
    test = SyntheticBirds("test", size=size, n=test_images, classes=classes, seed=seed, cache=cache)
    recipe = _Recipe(epochs, batch, learning_rate, weight_decay=0.05, seed=seed, precision=precision, augment=True)
    _check(recipe, images)
    meta = {
        "arguments": {"widths": list(BIRDS_WIDTHS)},
        "classes": train.class_names,
        "size": size,
        "config_hash": train.config_hash(),
        "command": command
        or f"finecf train birds --images {images} --epochs {epochs} --seed {seed} --precision {precision}",
    }

    def splits(report: Progress) -> tuple[Split, Split]:
        # Channels-last views of [N,H,W,3], which train twice as fast on a CPU.
        found: list[Split] = []
        for birds in (train, test):
            drawn = birds.images(workers, partial(report, f"draw {birds.split}"))
            writable = drawn if drawn.flags.writeable else np.array(drawn)  # torch takes no memory-mapped ones
            found.append((torch.from_numpy(writable).permute(0, 3, 1, 2), torch.from_numpy(birds.labels)))
        return found[0], found[1]

    family_of = [train.family_of(label) for label in range(classes)]
    run = _Run(recipe, Path(out), threads, resume, progress)
    return _train(run, BirdsNet, meta, splits, family_of, channels_last=True)


def train_digits(
    out: str | os.PathLike[str] = "digits.safetensors",
    epochs: int = 12,
    batch: int = 32,
    learning_rate: float = 4e-3,
    seed: int = 0,
    precision: str = "float32",
    threads: int | None = 1,
    resume: bool = True,
    progress: bool | Progress = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a `DigitsNet` on the digits of scikit-learn, as `train_birds` does on birds; under a minute on one
    core.
    """
    train, test = digits("train"), digits("test")
    recipe = _Recipe(epochs, batch, learning_rate, weight_decay=0.05, seed=seed, precision=precision, augment=False)
    _check(recipe, len(train))
    meta = {
        "arguments": {"width": DIGITS_WIDTH},
        "classes": train.class_names,
        "size": SIZE,
        "command": command or f"finecf train digits --epochs {epochs} --seed {seed} --precision {precision}",
    }
    run = _Run(recipe, Path(out), threads, resume, progress)
    return _train(run, DigitsNet, meta, _batches(train, test), list(range(10)), channels_last=False)


def train_fashion(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str] = "fashion.safetensors",
    epochs: int = 8,
    batch: int = 128,
    width: int = 64,
    learning_rate: float = 4e-3,
    blur: float = 1.0,
    seed: int = 0,
    precision: str = "float32",
    threads: int | None = 1,
    resume: bool = True,
    progress: bool | Progress = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains a `DigitsNet` of one channel on Fashion-MNIST, as `train_birds` does on birds; `data`: where
    `fashion_mnist.npz` is.

    blur: half of the pictures are blurred by a Gaussian of up to so many pixels, so that what the net says does not
    hang on what a slight blur takes away.
    """
    train, test = fashion_mnist(data, "train"), fashion_mnist(data, "test")
    recipe = _Recipe(epochs, batch, learning_rate, 0.05, seed, precision, augment=True, blur=blur)
    _check(recipe, len(train))
    meta = {
        "arguments": {"width": width, "channels": 1},
        "classes": train.class_names,
        "size": 28,
        "command": command
        or f"finecf train fashion --data fashion_mnist.npz --epochs {epochs} --seed {seed} --precision {precision}",
    }
    run = _Run(recipe, Path(out), threads, resume, progress)
    return _train(run, DigitsNet, meta, _batches(train, test), list(range(10)), channels_last=True)
