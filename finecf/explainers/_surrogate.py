"""Which regions are worth a forward: scores guessed from two feature maps, and from what the model said before.

The features under the shown regions are taken to be those of the whole image, and elsewhere those of the baseline; a
cell that lies across a border counts by area. For a head that folds, the logits of every set are then one small matrix
product (ours; the idea is FG-VCE's folded head). Where the model has scored sets, a Gaussian process over sets learns
what it says beyond that: sets that differ in few regions are taken to be misjudged alike (ours). All this only orders
candidates: what is chosen is scored by the model.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._subset import Answer, Chosen, Guess, Slopes
from finecf.models import HeadFold
from finecf.reference.submodular import confidence_of

REACH: Final = 0.2
"""Two sets are judged alike up to about so many regions apart, as a share of all."""
REMEMBERED: Final = 128
"""Sets that the process knows; older ones differ in more regions and say little."""
OPTIMISM: Final = 0.5
"""Standard deviations added to a guess, so that what is uncertain is looked at."""
LEARNT: Final = torch.tensor([0.25, 0.4, 0.5], dtype=torch.float64)
"""What a difference that maps and process expect is worth beside a slope: of the confidence, and of the log odds with
regions kept and with them removed."""
STEEPNESS: Final = torch.tensor([0.35, 0.4, 0.28], dtype=torch.float64)
"""How far the slopes are followed, in regions. Both are rounded from regressions on validation birds."""
_NUGGET: Final = 1e-3
_LEAST_PROBABILITY: Final = 1e-7


class Prediction(NamedTuple):
    """What the process expects of sets."""

    mean: Tensor
    """[r,q]."""
    deviation: Tensor
    """[r,q]."""


class Residuals:
    """A Gaussian process over sets of regions, kernel exp(-Hamming distance / reach), for q numbers at once."""

    def __init__(self, regions: int, numbers: int) -> None:
        self._reach = max(1.0, REACH * regions)
        self._sets = torch.zeros(0, regions, dtype=torch.float64)
        self._values = torch.zeros(0, numbers, dtype=torch.float64)

    def learn(self, sets: Tensor, values: Tensor) -> None:
        """Take in sets, bool [r,m], and their numbers, float64 [r,q]."""
        self._sets = torch.cat([self._sets, sets.double()])[-REMEMBERED:]
        self._values = torch.cat([self._values, values])[-REMEMBERED:]

    def predict(self, sets: Tensor) -> Prediction:
        """The numbers of sets, bool [r,m]; nothing learnt: zero, with no deviation."""
        if len(self._values) < 2:
            nothing = self._values.new_zeros(len(sets), self._values.shape[1])
            return Prediction(nothing, nothing)
        asked = sets.double()
        known = self._kernel(self._sets, self._sets)
        known.diagonal().add_(_NUGGET)
        factor = torch.linalg.cholesky(known)
        across = self._kernel(self._sets, asked)
        half = torch.linalg.solve_triangular(factor, across, upper=False)
        share = (1 - half.square().sum(0)).clamp_min(0).sqrt()
        return Prediction(across.T @ torch.cholesky_solve(self._values, factor), share[:, None] * self._values.std(0))

    def _kernel(self, first: Tensor, second: Tensor) -> Tensor:
        apart = first.sum(1)[:, None] + second.sum(1) - 2 * first @ second.T
        return torch.exp(-apart / self._reach)


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
        self._target, self._weights, self._confidence = target, weights.cpu(), confidence
        self._kept = Residuals(regions, 2)
        self._removed = Residuals(regions, 1)

    def guess(self, chosen: Chosen, candidates: list[int], slopes: Slopes | None = None) -> Guess:
        """What the set with each candidate added may score; `slopes` are of the set."""
        mean, deviation = self._expected(_joined(chosen, candidates))
        if slopes is not None:
            at = self._expected(chosen.selected[None]).mean
            steep = at + LEARNT * (mean - at) + STEEPNESS * torch.stack(slopes, 1)[candidates]
            mean = torch.where(steep.isnan(), mean, steep)
        confidence, odds, odds_removed = mean.unbind(1)
        effectiveness = self._weights[1] * chosen.effectiveness(candidates)

        def of_kept(hope: float) -> Tensor:
            shown = (odds + hope * deviation[:, 1]).sigmoid()
            return self._weights[0] * confidence + effectiveness + self._weights[2] * shown

        def of_removed(hope: float) -> Tensor:
            return self._weights[3] * (1 - (odds_removed - hope * deviation[:, 2]).sigmoid())

        return Guess(of_kept(0), of_removed(0), of_kept(OPTIMISM), of_removed(OPTIMISM))

    def _expected(self, sets: Tensor) -> Prediction:
        """Confidence and log odds, with sets bool [r,m] kept and removed, from maps and from what was learnt: [r,3]."""
        prior = self._prior(sets)
        kept, removed = self._kept.predict(sets), self._removed.predict(sets)
        return Prediction(
            prior + torch.cat([kept.mean, removed.mean], 1), torch.cat([kept.deviation, removed.deviation], 1)
        )

    def learn(self, chosen: Chosen, answer: Answer) -> None:
        """Take in what the model said of the set with candidates added."""
        sets = _joined(chosen, answer.candidates)
        prior = self._prior(sets)
        found = torch.stack([answer.scores[:, 0], _log_odds(answer.curves[:, 0])], 1)
        self._kept.learn(sets, found - prior[:, :2])
        gone = answer.curves[:, 1]
        known = ~gone.isnan()
        self._removed.learn(sets[known], (_log_odds(gone) - prior[:, 2])[known, None])

    def _prior(self, sets: Tensor) -> Tensor:
        """Confidence, and log odds of the target with the regions kept and with them removed: float64 [r,3]."""
        covered = sets.to(self._share) @ self._share
        kept, removed = self._logits(covered), self._logits(1 - covered)
        target = [each.double().softmax(1)[:, self._target] for each in (kept, removed)]
        parts = [confidence_of(kept, self._confidence), *(_log_odds(each) for each in target)]
        return torch.stack(parts, 1).cpu()

    def _logits(self, covered: Tensor) -> Tensor:
        sums = self._start + covered @ self._change
        return sums if self._tail is None else self._tail(sums)


def _joined(chosen: Chosen, candidates: list[int]) -> Tensor:
    """The set with each candidate added, bool [r,m]."""
    sets = chosen.selected.repeat(len(candidates), 1)
    sets[torch.arange(len(candidates)), torch.tensor(candidates)] = True
    return sets


def _log_odds(probability: Tensor) -> Tensor:
    return torch.logit(probability.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY))
