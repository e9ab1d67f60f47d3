"""Painters of the repainter, for the small shipped net of birds and for classifiers and images of one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from finecf.data.birds import SyntheticBirds
from finecf.explainers import Repainter
from finecf.explainers._mirror_fit import Items
from finecf.explainers.repaint import LEARNING_RATE
from finecf.models import Classifier
from finecf.models.decoder import Range
from finecf.training.mirror import mirror_classifier, mirror_recipe
from finecf.training.train import command_of, thread_count

BIRDS: Final = 16_000
"""Birds that the painter is trained on, from the first of the training split."""
STEPS: Final = 20_000
RECIPES: Final = ("birds",)


class _Bytes(Dataset[tuple[Tensor, int]]):
    """Images uint8 [N,H,W,3] and labels, a byte a value: float images of all would take four times as much."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._labels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self._images[number].float() / 255, int(self._labels[number])


def train_repainter(
    on: str = "birds",
    out: str | os.PathLike[str] = "repainter.safetensors",
    classifier: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    images: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    threads: int | None = 1,
    resume: bool = True,
    progress: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains the painter of one set and writes it to `out`; returns its description.

    Args:
        on: "birds".
        out: the safetensors file; `<out>.resume` beside it keeps the state.
        classifier: the file of a net, instead of the shipped one.
        steps: how many, instead of 20,000.
        images: how many training birds, instead of 16,000.
        seed: of everything drawn.
        precision: "float32" or "bfloat16".
        threads: of torch (None: as they are); the same number gives the same weights on one machine.
        resume: whether to go on from `<out>.resume`.
        progress: whether to show a bar.
        command: what the description says made the file.

    Raises:
        ValueError: unknown set, or settings that `Repainter.fit` refuses.
        FileNotFoundError: the classifier is not there.
    """
    if on not in RECIPES:
        raise ValueError(f"painters are trained on {', '.join(RECIPES)}; got {on!r}")
    with thread_count(threads):
        wrapped = mirror_classifier(on, classifier)
        birds = SyntheticBirds("train", n=images or BIRDS)
        net = None if classifier is None else Path(classifier)
        told = {"seed": seed, "precision": precision, "threads": threads, "steps": steps, "images": images}
        repainter = train_painter(
            wrapped,
            _Bytes(np.array(birds.images()), birds.labels),
            mirror_recipe(on).pairs,
            out,
            steps=steps,
            seed=seed,
            precision=precision,
            resume=resume,
            progress=progress,
            about={
                "command": command or command_of("repainter", on=on, classifier=net, **told),
                "images": len(birds),
            },
        )
        return repainter.meta


def train_painter(
    classifier: Classifier,
    data: Items,
    pairs: Sequence[tuple[int | str, int | str]],
    out: str | os.PathLike[str],
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    precision: str = "float32",
    flip: bool = True,
    image_range: Range = (0.0, 1.0),
    resume: bool = True,
    progress: bool = False,
    about: Mapping[str, object] | None = None,
) -> Repainter:
    """Trains a painter for a classifier of one's own, and writes it to `out`.

    Args:
        classifier: what `finecf.wrap` returned; its head must be linear behind global average pooling.
        data: as of `Repainter.fit`: a Dataset of (image, label), a loader of one, or tensors.
        pairs: look-alikes, by index or name.
        out: the safetensors file; `<out>.resume` beside it keeps the state.
        steps: how many, instead of 20,000.
        learning_rate: instead of that of `Repainter.fit`.
        seed: of everything drawn.
        precision: "float32" or "bfloat16".
        flip: whether images are mirrored left to right in half of the steps.
        image_range: least and largest value of the images as the model takes them, a number or one per channel.
        resume: whether to go on from `<out>.resume`.
        progress: whether to show a bar.
        about: what else the file's description says.

    Returns:
        The repainter, ready to repaint; `Repainter(classifier, out)` reads it again.

    Raises:
        ValueError: what `Repainter.fit` refuses.
        TrainingStopped: as of `Repainter.fit`.
    """
    repainter = Repainter(classifier, progress=progress)
    repainter.fit(
        data,
        list(pairs),
        steps=STEPS if steps is None else steps,
        learning_rate=LEARNING_RATE if learning_rate is None else learning_rate,
        seed=seed,
        precision=precision,
        flip=flip,
        image_range=image_range,
        checkpoint=out,
        resume=resume,
    )
    repainter.meta |= {**(about or {}), "threads": torch.get_num_threads()}
    repainter.save(out)
    return repainter
