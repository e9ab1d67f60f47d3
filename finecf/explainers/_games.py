"""A batch of feature maps as a game of cells: what coalitions and replacements are worth to the classifier's head.

One class for each kind of head (docs/fgvce.md, "Heads"): the more of the head adds up over cells, the cheaper it is.
B images, P = H*W cells, D channels, C classes, N rows of the candidate pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finecf import ops
from finecf.explainers._pool import Pool
from finecf.models import Classifier, HeadFold
from finecf.reference.shapley import class_value

HEAD_FACTOR = 4
"""A head is taken to need this many times its input in intermediates."""


@dataclass(frozen=True)
class Head:
    """The head that all games of a batch are played on.

    `fold` is how it adds up over cells (None: not at all), `budget` the bytes that scoring may take, `noise` the
    largest difference between logits computed in two ways: what is closer than that is a tie.
    """

    classifier: Classifier
    fold: HeadFold | None
    budget: int
    noise: float = 0.0


class Game(ABC):
    """Feature maps `features` [B,D,H,W], their logits [B,C] and what the head makes of changed ones."""

    kind: str

    def __init__(self, head: Head, features: Tensor, logits: Tensor) -> None:
        self.head = head
        self.features = features
        self.logits = logits

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.features.shape[2], self.features.shape[3]

    @property
    def cells(self) -> int:
        """P."""
        return self.features.shape[2] * self.features.shape[3]

    def vectors(self, cells: Tensor) -> Tensor:
        """Feature vectors [B,K,D] of the cells [B,K]."""
        index = cells[:, None].expand(-1, self.features.shape[1], -1)
        return self.features.flatten(2).gather(2, index).transpose(1, 2)

    @abstractmethod
    def masked_scores(self, masks: Tensor, classes: Tensor, value: str) -> Tensor:
        """Value [B,M] of `classes` [B] when every cell is scaled by masks [M,P]."""

    @abstractmethod
    def class_maps(self, classes: Tensor) -> Tensor:
        """Grad-CAM [B,P] of `classes` [B], not scaled; non-negative."""

    @abstractmethod
    def select(self, images: Tensor) -> Game:
        """The game of some of the images [K]."""

    @abstractmethod
    def edited(self, image: Tensor, cell: Tensor, pool: Pool, row: Tensor) -> Game:
        """The game after pool row `row[k]` took the place of cell `cell[k]` of image `image[k]`."""

    @abstractmethod
    def swap_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor) -> Tensor:
        """Logits [S,K,C] of one image after each single replacement of `cells[s]` by pool row `rows[s,k]`."""

    @abstractmethod
    def subset_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor, keep: Tensor) -> Tensor:
        """Logits [M,C] of one image when those replacements cells[e] <- rows[e] are made that keep [M,E] names."""


class LinearGame(Game):
    """Global pooling and one linear layer: cell p adds `cell_logits[p]` to the logits, a pool row its own logits."""

    kind = "linear"

    def __init__(self, head: Head, features: Tensor, cell_logits: Tensor, base_logits: Tensor) -> None:
        super().__init__(head, features, base_logits + cell_logits.sum(1))
        self.cell_logits = cell_logits
        self.base_logits = base_logits

    def masked_scores(self, masks: Tensor, classes: Tensor, value: str) -> Tensor:
        return ops.masked_class_scores(self.cell_logits, self.base_logits, masks, classes, value)

    def class_maps(self, classes: Tensor) -> Tensor:
        # The gradient of a class logit is the same weight row in every cell, so Grad-CAM is relu(W_c f_p) up to scale.
        return self.cell_logits.gather(2, classes[:, None, None].expand(-1, self.cells, 1))[..., 0].relu()

    def select(self, images: Tensor) -> LinearGame:
        return LinearGame(self.head, self.features[images], self.cell_logits[images], self.base_logits[images])

    def edited(self, image: Tensor, cell: Tensor, pool: Pool, row: Tensor) -> LinearGame:
        cell_logits = self.cell_logits.clone()
        cell_logits[image, cell] = pool.logits[row]
        # The features are not needed again: everything that is asked of an edited map follows from the cell logits.
        return LinearGame(self.head, self.features, cell_logits, self.base_logits)

    def swap_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor) -> Tensor:
        rest = self.logits[image] - self.cell_logits[image, cells]
        return rest[:, None] + pool.logits[rows]

    def subset_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor, keep: Tensor) -> Tensor:
        change = pool.logits[rows] - self.cell_logits[image, cells]
        return self.logits[image] + keep.to(change.dtype) @ change


class TailGame(Game):
    """Pooling or flattening, a linear layer, and more: pre-activations of that layer are additive over cells."""

    kind = "first_linear"

    def __init__(self, head: Head, fold: HeadFold, features: Tensor, preactivations: Tensor) -> None:
        super().__init__(head, features, fold.tail(fold.bias + preactivations.sum(1)))
        self.fold = fold
        self.preactivations = preactivations

    def masked_scores(self, masks: Tensor, classes: Tensor, value: str) -> Tensor:
        def score(own: Tensor) -> Tensor:
            batch = self._batch(own.shape[1])
            return _in_batches(lambda chunk: self.fold.tail(self.fold.bias + chunk @ own), masks, batch)

        return _values(torch.stack([score(own) for own in self.preactivations]), classes, value)

    def class_maps(self, classes: Tensor) -> Tensor:
        return self.head.classifier.cam(self.features, classes).flatten(1)

    def select(self, images: Tensor) -> TailGame:
        return TailGame(self.head, self.fold, self.features[images], self.preactivations[images])

    def edited(self, image: Tensor, cell: Tensor, pool: Pool, row: Tensor) -> TailGame:
        vectors = pool.vectors(row)
        preactivations = self.preactivations.clone()
        preactivations[image, cell] = self.fold.candidate_preactivations(vectors, cell)
        features = _replaced(self.features, image, cell, vectors)
        return TailGame(self.head, self.fold, features, preactivations)

    def swap_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor) -> Tensor:
        own = self.preactivations[image]
        total = self.fold.bias + own.sum(0)

        def score(pairs: Tensor) -> Tensor:
            cell, row = pairs.unbind(1)
            return self.fold.tail(total - own[cell] + self.fold.candidate_preactivations(pool.vectors(row), cell))

        batch = self._batch(self.features.shape[1] + 2 * own.shape[1])
        return _in_batches(score, _pairs(cells, rows), batch).unflatten(0, rows.shape)

    def subset_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor, keep: Tensor) -> Tensor:
        own = self.preactivations[image]
        change = self.fold.candidate_preactivations(pool.vectors(rows), cells) - own[cells]
        return self.fold.tail(self.fold.bias + own.sum(0) + keep.to(change.dtype) @ change)

    def _batch(self, numbers: int) -> int:
        return _batch_size(self.head.budget, numbers * self.features.element_size())


class HeadGame(Game):
    """Any head: every coalition and every replacement is a feature map that the head scores, in batches."""

    kind = "generic"

    def __init__(self, head: Head, features: Tensor, logits: Tensor) -> None:
        super().__init__(head, features, logits)
        self._batch = _batch_size(head.budget, features[0].numel() * features.element_size())

    def masked_scores(self, masks: Tensor, classes: Tensor, value: str) -> Tensor:
        scales = masks.unflatten(1, self.grid)[:, None]

        def score(own: Tensor) -> Tensor:
            return self._score(lambda chunk: own * chunk, scales)

        return _values(torch.stack([score(own) for own in self.features]), classes, value)

    def class_maps(self, classes: Tensor) -> Tensor:
        return self.head.classifier.cam(self.features, classes).flatten(1)

    def select(self, images: Tensor) -> HeadGame:
        return HeadGame(self.head, self.features[images], self.logits[images])

    def edited(self, image: Tensor, cell: Tensor, pool: Pool, row: Tensor) -> HeadGame:
        features = _replaced(self.features, image, cell, pool.vectors(row))
        logits = _in_batches(self.head.classifier.logits_from, features, self._batch)
        return HeadGame(self.head, features, logits)

    def swap_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor) -> Tensor:
        own = self.features[image]

        def swap(pairs: Tensor) -> Tensor:
            cell, row = pairs.unbind(1)
            maps = own.expand(len(pairs), *own.shape)
            return _replaced(maps, torch.arange(len(pairs), device=own.device), cell, pool.vectors(row))

        return self._score(swap, _pairs(cells, rows)).unflatten(0, rows.shape)

    def subset_logits(self, image: int, cells: Tensor, pool: Pool, rows: Tensor, keep: Tensor) -> Tensor:
        vectors = pool.vectors(rows)

        def make(chosen: Tensor) -> Tensor:
            maps = self.features[image].expand(len(chosen), *self.features.shape[1:])
            where, edit = chosen.nonzero(as_tuple=True)
            return _replaced(maps, where, cells[edit], vectors[edit])

        return self._score(make, keep)

    def _score(self, make: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
        return _in_batches(lambda chunk: self.head.classifier.logits_from(make(chunk)), items, self._batch)


def play(head: Head, features: Tensor, logits: Tensor) -> Game:
    """The cheapest game that the head allows; `logits` [B,C] are what it really gave for `features` [B,D,H,W].

    The game's noise is the difference between them and the game's own, at least the rounding of a number of their size.
    """
    game: Game
    if head.fold is None:
        game = HeadGame(head, features, logits)
    elif head.fold.kind == "linear":
        game = LinearGame(head, features, head.fold.cell_logits(features), head.fold.base_logits(len(features)))
    else:
        game = TailGame(head, head.fold, features, head.fold.cell_preactivations(features))
    size = max(1.0, float(logits.abs().amax())) if logits.numel() else 1.0
    error = float((game.logits - logits).abs().amax()) if logits.numel() else 0.0
    game.head = replace(head, noise=max(error, torch.finfo(logits.dtype).eps * size))
    return game


def _in_batches(score: Callable[[Tensor], Tensor], items: Tensor, batch: int) -> Tensor:
    return torch.cat([score(chunk) for chunk in items.split(batch)])


def _batch_size(budget: int, item_bytes: int) -> int:
    """Items that the head may score together.

    Raises:
        ValueError: not even one fits into the budget.
    """
    least = HEAD_FACTOR * item_bytes
    if least > budget:
        raise ValueError(
            f"memory_budget of {budget:,} bytes is too small for one coalition; "
            f"the least that works for this head and feature map is {least:,} bytes"
        )
    return budget // least


def _values(logits: Tensor, classes: Tensor, value: str) -> Tensor:
    """Value [B,M] of logits [B,M,C] for each image's class."""
    return torch.stack([class_value(own, int(wanted), value) for own, wanted in zip(logits, classes, strict=True)])


def _pairs(cells: Tensor, rows: Tensor) -> Tensor:
    """(cell, row) pairs [S*K,2] of cells [S] with rows [S,K]."""
    return torch.stack([cells[:, None].expand_as(rows), rows], dim=-1).flatten(0, 1)


def _replaced(maps: Tensor, image: Tensor, cell: Tensor, vectors: Tensor) -> Tensor:
    """A copy of maps [B,D,H,W] in which cell `cell[k]` of map `image[k]` is `vectors[k]`."""
    flat = maps.flatten(2).clone(memory_format=torch.contiguous_format)
    flat[image, :, cell] = vectors
    return flat.unflatten(2, maps.shape[2:])
