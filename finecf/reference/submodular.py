"""The four terms of SMDL's set function for candidate regions, in plain torch and float64."""

import math

import torch
from torch import Tensor

CONFIDENCES = ("entropy", "evidential")
"""How sure a classifier is of its logits: by the entropy of their softmax, or by evidence exp(clamp(z, -10, 10))."""


def confidence_of(logits: Tensor, confidence: str) -> Tensor:
    """The confidence term of logits [...,C], float64 [...]."""
    classes = logits.shape[-1]
    if confidence == "entropy":
        p = logits.double().softmax(-1)
        return 1 + (p * (p + 1e-7).log()).sum(-1) / math.log(classes)
    return 1 - classes / (logits.double().clamp(-10, 10).exp() + 1).sum(-1)


def submodular_gains(
    insertion_logits: Tensor,
    deletion_logits: Tensor | None,
    image: Tensor,
    candidate: Tensor,
    distance: Tensor,
    running_min: Tensor,
    selected: Tensor,
    target: Tensor,
    weights: Tensor,
    confidence: str,
    consistency: Tensor | None,
    collaboration: Tensor | None,
    largest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [R,4], their weighted sum [R] (float64) and each image's best row [B] (int64; -1: it has none)."""
    rows = insertion_logits.shape[0]
    wanted = target[image][:, None]

    def probability(logits: Tensor) -> Tensor:
        return logits.double().softmax(1).gather(1, wanted)[:, 0]

    to_candidate = distance.mT[image, candidate]
    chosen = selected[image].scatter(1, candidate[:, None], False)
    nearest = torch.minimum(running_min[image], to_candidate).where(chosen, torch.zeros_like(to_candidate)).sum(1)
    own = running_min[image].gather(1, candidate[:, None])[:, 0]
    effectiveness = (nearest + own).where(chosen.any(1), torch.zeros_like(nearest))

    if consistency is None:
        consistency = probability(insertion_logits)
    if collaboration is None:
        nothing = torch.zeros(rows, dtype=torch.float64, device=image.device)
        collaboration = nothing if deletion_logits is None else 1 - probability(deletion_logits)
    scores = torch.stack(
        [confidence_of(insertion_logits, confidence), effectiveness, consistency, collaboration], dim=1
    )
    # Terms of weight 0 are left out, so that an infinite distance does not make NaN of them.
    total = torch.where(weights != 0, weights * scores, torch.zeros_like(scores)).sum(1)
    return scores, total, _best(image, candidate, total, distance.shape[0], largest)


def _best(image: Tensor, candidate: Tensor, total: Tensor, images: int, largest: bool) -> Tensor:
    """The row of each image's largest (smallest) total, ties to the lowest candidate, then to the lowest row."""
    order = candidate.argsort(stable=True)
    order = order[total[order].argsort(stable=True, descending=largest)]
    order = order[image[order].argsort(stable=True)]
    best = torch.full((images,), -1, dtype=torch.int64, device=image.device)
    counts = torch.zeros_like(best).scatter_add_(0, image, torch.ones_like(image))
    starts = counts.cumsum(0) - counts
    some = counts > 0
    best[some] = order[starts[some]]
    return best
