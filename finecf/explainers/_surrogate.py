"""Which regions are worth a forward: scores guessed from two feature maps, without running the model.

The features under the shown regions are taken to be those of the whole image, and elsewhere those of the baseline; a
cell that lies across a border counts by area. For a head that folds, the logits of every set are then one small matrix
product (ours; the idea is FG-VCE's folded head). It only orders candidates: what is chosen is scored by the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._subset import Chosen
from finecf.models import HeadFold
from finecf.reference.submodular import confidence_of


class Surrogate:
    """Guessed scores of one image's sets of regions.

    Args:
        fold: the head as sums over cells.
        image, blank: feature maps [D,h,w] of the image and of its baseline.
        labels: int32 [H,W]; regions: m.
        target: the class.
        weights, confidence: as in `finecf.explainers._evaluation.Terms`.
    """

    def __init__(
        self,
        fold: HeadFold,
        image: Tensor,
        blank: Tensor,
        labels: Tensor,
        regions: int,
        target: int,
        weights: Tensor,
        confidence: str,
    ) -> None:
        shown = F.one_hot(labels.to(image.device).long(), regions).permute(2, 0, 1).to(image.dtype)
        self._share = F.adaptive_avg_pool2d(shown[None], (image.shape[1], image.shape[2]))[0].flatten(
            1
        )  # [m,P]: of each cell's area
        maps = torch.stack([image, blank])
        linear = fold.kind == "linear"
        there, elsewhere = fold.cell_logits(maps) if linear else fold.cell_preactivations(maps)
        self._change = (there - elsewhere).to(image.dtype)  # [P,C] or [P,Hd]
        self._start = elsewhere.sum(0) + fold.bias
        self._tail = None if linear else fold.tail
        self._target, self._weights, self._confidence = target, weights, confidence

    def totals(self, chosen: Chosen, candidates: list[int]) -> Tensor:
        """Guessed F of the set with each candidate added, float64 [r] on the CPU."""
        device = self._share.device
        covered = self._share[chosen.selected.to(device)].sum(0) + self._share[torch.tensor(candidates, device=device)]
        kept, removed = self._logits(covered), self._logits(1 - covered)
        terms = (
            confidence_of(kept, self._confidence),
            chosen.effectiveness(candidates).to(device),
            kept.double().softmax(1)[:, self._target],
            1 - removed.double().softmax(1)[:, self._target],
        )
        guess: Tensor = sum(weight * term for weight, term in zip(self._weights.tolist(), terms, strict=True) if weight)
        return guess.cpu()

    def _logits(self, covered: Tensor) -> Tensor:
        sums = self._start + covered @ self._change
        return sums if self._tail is None else self._tail(sums)
