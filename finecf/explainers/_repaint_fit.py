"""Training of the painter: real images are spoiled where the classifier's evidence lies, and it learns to mend them.

What step n does depends on the seed and n alone, as in the training of Mirror-CFE's decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._mirror_fit import Pool, label_index, partners_of
from finecf.explainers._shared import check_range, plain
from finecf.explainers._spoiling import LEVELS, SQUARES, Windows, marks_of, spoil
from finecf.explainers._training import (
    TrainingStopped,
    check_finite,
    check_same_images,
    choice,
    fingerprint_of,
    joined,
    moments_of,
    said_of,
    seeded,
    set_moments,
    state_of,
    under,
)
from finecf.models import Classifier
from finecf.models.checkpoints import save_tensors
from finecf.models.painter import Painter

SHARES: Final = (0.25, 0.8)
"""Marks are where the evidence is above such a share of its largest."""
_ELSEWHERE: Final = 0.2
"""How often a window is spoiled in a rectangle as well, so that the painter learns more than the marks."""
_LEAST: Final = 0.04
"""Windows of which less is marked are always spoiled in a rectangle as well."""
_RISE: Final = 0.1
"""In this share of the steps the learning rate rises; then it falls along a cosine."""
_DECAY: Final = 1e-4
_LONGEST: Final = 1.0
"""Largest norm of a step's gradient."""
_BATCH_WHILE_LOOKING: Final = 64
_TRAIN_OTHERWISE: Final = "fit with image_range=(least, largest) of the images as the model takes them"


@dataclass(frozen=True)
class PainterRecipe:
    """What the training is told."""

    steps: int
    batch: int
    learning_rate: float
    seed: int
    precision: str
    flip: bool

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rise = max(1, round(_RISE * self.steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise))) / 2


@dataclass(frozen=True, eq=False)
class Known:
    """Training images that the classifier recognises: numbers in the pool and classes, int64 [N], and for each of the
    classes that its own may be led to the evidence against it, float16 [N,P,h,w] (the last ones repeat where it has
    fewer than P), scaled by a power of 2 so that the largest lies in [0.5,1).

    And of all images what the classifier says, as of `said_of`.
    """

    numbers: Tensor
    labels: Tensor
    evidence: Tensor
    said: dict[str, Tensor]


@dataclass
class PainterTrainer:
    """A painter in training, with its optimiser. `whole` is false in the middle of a step."""

    classifier: Classifier
    painter: Painter
    pool: Pool
    pairs: list[tuple[int, int]]
    weight: Tensor
    """The head's weight, float [C,D]."""
    recipe: PainterRecipe
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    whole: bool = True

    def __post_init__(self) -> None:
        device = self.classifier.device
        self.painter.to(device).train().requires_grad_(True)
        if device.type == "cpu":
            self.painter.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.AdamW(self.painter.parameters(), lr=self.recipe.learning_rate, weight_decay=_DECAY)
        self.partners = partners_of(self.pairs)
        with plain(device):
            self.known = self._look_through()

    @property
    def steps(self) -> int:
        """How many in all."""
        return self.recipe.steps

    @property
    def network(self) -> Painter:
        """What is trained."""
        return self.painter

    def _look_through(self) -> Known:
        """One pass over the images: which are recognised, and where their evidence lies."""
        most = max(len(each) for each in self.partners.values())
        numbers, labels, evidence, said = [], [], [], []
        size: tuple[int, ...] = ()
        for some in torch.arange(len(self.pool)).split(_BATCH_WHILE_LOOKING):
            x, named = self.pool.read(some)
            size = size or tuple(x.shape[1:])
            if tuple(x.shape[1:]) != size:
                raise ValueError(f"the training images have different sizes, {size} and {tuple(x.shape[1:])}")
            bounds = self.painter.low, self.painter.high
            check_range(x, *bounds, _TRAIN_OTHERWISE, bounds="image_range")
            maps, logits = self.classifier.features_and_logits(x)
            said.append(said_of(logits))
            for row, (predicted, name) in enumerate(zip(said[-1]["predicted"].tolist(), named, strict=True)):
                if predicted not in self.partners or label_index(self.classifier, name) not in (None, predicted):
                    continue
                others = self.partners[predicted]
                others = others + others[-1:] * (most - len(others))
                against = self.weight[predicted] - self.weight[others]
                numbers.append(int(some[row]))
                labels.append(predicted)
                evidence.append(_scaled(torch.einsum("pd,dhw->phw", against, maps[row].to(against))).half().cpu())
        for index in self.partners:
            if index not in labels:
                raise ValueError(
                    f"class {self.classifier.class_name(index)!r} of the pairs has no training image that the "
                    "classifier recognises"
                )
        return Known(torch.tensor(numbers), torch.tensor(labels), torch.stack(evidence), joined(said))

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
        """Windows [B,Ch,S,S] scaled to [0,1], where they are to be spoiled [B,1,S,S], their classes, and what draws
        the rest of the step.
        """
        draws = seeded(self.recipe.seed, step)
        rows = torch.randint(len(self.known.labels), (self.recipe.batch,), generator=draws)
        labels, side = self.known.labels[rows], self.painter.window
        other = [choice(range(len(self.partners[int(label)])), draws) for label in labels]
        low, high = SHARES
        share = low + (high - low) * torch.rand(len(rows), generator=draws)
        images = self.pool.take(self.known.numbers[rows]).float().cpu()
        size = images.shape[2:]
        evidence = self.known.evidence[rows, torch.tensor(other)].float()
        masks = F.interpolate(marks_of(evidence, share), size)
        reach = side * 5 // 16
        middles = []
        for mask in masks:
            places = mask[0].nonzero()
            place = places[choice(range(len(places)), draws)] if len(places) else torch.tensor(size) // 2
            middles.append(place + torch.randint(-reach, reach + 1, (2,), generator=draws))
        windows = Windows(torch.stack(middles), side, size)
        images, masks = windows.cut(images), windows.cut(masks)
        least = side * 7 // 32
        for mask in masks:
            elsewhere = float(torch.rand((), generator=draws)) < _ELSEWHERE
            top, left, height, width = torch.randint(side, (4,), generator=draws).tolist()
            if elsewhere or float(mask.mean()) < _LEAST:
                top, left = top % (side - least), left % (side - least)
                height, width = (least + each % (side * 11 // 32) for each in (height, width))
                mask[:, top : top + height, left : left + width] = 1
        if self.recipe.flip and choice((False, True), draws):
            images, masks = images.flip(3), masks.flip(3)
        low_bound, high_bound = self.painter.low.cpu(), self.painter.high.cpu()
        return (images - low_bound) / (high_bound - low_bound), masks, labels, draws

    def advance(self) -> dict[str, float]:
        """One step of the optimiser; the loss by name: the mean absolute error where windows were spoiled."""
        # A user's own autocast would reach into the products of matrices of the backward.
        with torch.autocast(self.classifier.device.type, enabled=False):
            return self._advance()

    def _advance(self) -> dict[str, float]:
        self.whole = False
        device = self.classifier.device
        images, mask, labels, draws = self.draw(self.step)
        square = LEVELS[self.step % len(LEVELS)] * (self.painter.window // SQUARES)
        spoiled = spoil(images, mask, square, draws)
        images, mask, spoiled, labels = (each.to(device) for each in (images, mask, spoiled, labels))
        if device.type == "cpu":
            spoiled = spoiled.to(memory_format=torch.channels_last)
        self.optimiser.param_groups[0]["lr"] = self.recipe.rate(self.step)
        with self._precision():
            mended = self.painter(spoiled, mask, labels)
        loss = ((mended.float() - images).abs() * mask).sum() / (images.shape[1] * mask.sum())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingStopped("mending", self.step, value)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.painter.parameters(), _LONGEST)
        self.optimiser.step()
        self.step += 1
        self.history.append({"mending": value})
        self.whole = True
        return self.history[-1]

    def check_weights(self) -> None:
        """Stop where the painter holds NaN or infinity."""
        check_finite(self.painter, self.step - 1)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        half = self.recipe.precision == "bfloat16"
        # Cached weights would outlive their updates inside a user's own autocast.
        with torch.autocast(self.classifier.device.type, dtype=torch.bfloat16, enabled=half, cache_enabled=False):
            yield

    # The state

    def fingerprint(self) -> str:
        """What a state must be the state of."""
        return fingerprint_of(
            asdict(self.recipe),
            pairs=self.pairs,
            images=len(self.pool),
            classifier=self.classifier.fingerprint(),
            painter=self.painter.settings,
        )

    def save(self, path: Path) -> None:
        """Write all that the next step needs."""
        tensors = {f"painter/{key}": value for key, value in self.painter.state_dict().items()}
        tensors |= moments_of(self.optimiser, "adam/")
        tensors |= {f"images/{name}": value for name, value in self.known.said.items()}
        save_tensors(path, tensors, {"step": self.step, "of": self.fingerprint(), "history": self.history})

    def load(self, path: Path) -> None:
        """Go on from a state that `save` wrote.

        Raises:
            ValueError: it is of another training, or broken.

        Warns:
            UserWarning: as of `check_same_images`.
        """
        tensors, meta = state_of(path, self.fingerprint())
        check_same_images(path, under(tensors, "images/"), self.known.said, "painter")
        self.step, self.history = meta["step"], meta["history"]
        self.painter.load_state_dict(under(tensors, "painter/"))
        set_moments(self.optimiser, tensors, "adam/")


def _scaled(evidence: Tensor) -> Tensor:
    """Each of evidence [P,h,w] times a power of 2, so that half precision holds it; marks hang on no scale."""
    largest = evidence.abs().amax((1, 2), keepdim=True)
    return torch.ldexp(evidence, -torch.frexp(largest).exponent)
