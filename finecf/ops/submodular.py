"""What SMDL's set function gains by each candidate region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finecf.ops._checks import Arguments, values_visible
from finecf.ops._dispatch import fake, run, working_precision
from finecf.reference import submodular as reference
from finecf.reference.submodular import CONFIDENCES

TERMS = ("confidence", "effectiveness", "consistency", "collaboration")
"""The terms of the set function, in the order of the scores' columns."""


class Gains(NamedTuple):
    """Scores of candidate rows, and the best row of each image."""

    scores: Tensor
    """float64 [R,4]: the terms, in the order of `TERMS`, of the selected regions and the candidate."""
    total: Tensor
    """float64 [R]: their weighted sum."""
    best: Tensor
    """int64 [B]: the row of the largest (smallest) total of each image; -1 where it has no row."""


def submodular_gains(
    insertion_logits: Tensor,
    deletion_logits: Tensor | None,
    image: Tensor,
    candidate: Tensor,
    distance: Tensor,
    running_min: Tensor,
    selected: Tensor,
    target: Tensor,
    weights: Tensor | Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    confidence: str = "entropy",
    consistency: Tensor | None = None,
    collaboration: Tensor | None = None,
    largest: bool = True,
) -> Gains:
    """The set function of SMDL (Chen et al., ICLR 2024) for each candidate region added to its image's selected ones.

    R candidate rows of B images together, m regions each. All arithmetic is float64.

        confidence     1 + sum_k P_k ln(P_k + 1e-7) / ln C, or 1 - C / sum_k (exp(clamp(z_k, -10, 10)) + 1)
        effectiveness  sum_{i in S} min_{j in S, j != i} distance[i,j]; 0 for one region
        consistency    p_target with the regions kept
        collaboration  1 - p_target with the regions removed

    Args:
        insertion_logits: [R,C], the model's logits with the selected regions and the candidate kept.
        deletion_logits: [R,C], with them removed; None: the collaboration term is 0 (or given).
        image: integers [R] in 0..B-1.
        candidate: integers [R] in 0..m-1; one that is selected already leaves the set as it is.
        distance: [B,m,m], between the features of single regions; the diagonal is not read.
        running_min: [B,m], the least distance of each region to another selected one (+inf: none).
        selected: bool [B,m].
        target: integers [B] in 0..C-1.
        weights: of the four terms, at least 0; a term of weight 0 is left out of the sum.
        confidence: "entropy" or "evidential".
        consistency: [R], numbers to take for this term (the cosine variant); None: from the logits.
        collaboration: [R], likewise.
        largest: whether the best row is the one of the largest total or of the smallest.

    Returns:
        scores [R,4], total [R], best [B]. Ties go to the lowest candidate, then to the lowest row.

    Raises:
        TypeError: an argument is not a tensor, or not of the kind asked for.
        ValueError: shapes or devices that do not fit together, values out of range, NaN or infinity.
    """
    args = Arguments("submodular_gains")
    args.real("insertion_logits", insertion_logits, "RC")
    if deletion_logits is not None:
        args.real("deletion_logits", deletion_logits, "RC")
    args.at_least("C", 2, "classes")
    args.real("distance", distance, "BMM")
    image = args.below("image", args.integer("image", image, "R"), "B", "images")
    candidate = args.below("candidate", args.integer("candidate", candidate, "R"), "M", "regions")
    args.real("running_min", running_min, "BM")
    args.boolean("selected", selected, "BM")
    target = args.target(target)
    args.choice("confidence", confidence, CONFIDENCES)
    weights = torch.as_tensor(weights, dtype=torch.float64, device=insertion_logits.device)
    args.real("weights", weights, "4")
    if values_visible() and bool((weights < 0).any()):
        args.refuse(f"weights must be at least 0, got {weights.tolist()}; leave a term out with 0")
    args.finite("weights", weights)
    args.finite("insertion_logits", insertion_logits)
    if deletion_logits is not None:
        args.finite("deletion_logits", deletion_logits)
        insertion_logits, deletion_logits = working_precision(insertion_logits, deletion_logits)
    else:
        (insertion_logits,) = working_precision(insertion_logits)
    given = []
    for name, values in (("consistency", consistency), ("collaboration", collaboration)):
        if values is not None:
            args.real(name, values, "R")
            args.finite(name, values)
        given.append(None if values is None else values.double())
    if values_visible() and bool(distance.isnan().any() | running_min.isnan().any()):
        args.refuse("distance and running_min must hold no NaN; check the features that they come from")
    found = run(
        "submodular_gains",
        reference.submodular_gains,
        insertion_logits,
        deletion_logits,
        image,
        candidate,
        distance.double(),
        running_min.double(),
        selected,
        target,
        weights,
        confidence,
        *given,
        largest,
    )
    return Gains(*found)


@fake("submodular_gains")
def _submodular_gains(
    insertion_logits: Tensor,
    deletion_logits: Tensor | None,
    image: Tensor,
    candidate: Tensor,
    distance: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, images = insertion_logits.shape[0], distance.shape[0]
    scores = insertion_logits.new_empty(rows, len(TERMS), dtype=torch.float64)
    return scores, scores.new_empty(rows), scores.new_empty(images, dtype=torch.int64)
