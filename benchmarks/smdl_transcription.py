"""A slow transcription of the published class as its description reads: image by image, no part of finecf in it.

For each candidate of a step it merges region images in uint64, converts through PIL, preprocesses, and stacks; the
images of a step go through the model in one batch. It is the peer of `bench_smdl.py` and the oracle of
`tests/compat/test_smdl_attribution.py`. Written from the description of what the class computes, not from its code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TERMS = ("confidence", "effectiveness", "consistency", "collaboration")


class SlowSMDL:
    """The set function and both searches.

    `semantic` [C,d]: probabilities are softmax(f T^t); None: the model's outputs are logits, or probabilities.
    `pending`: None for greedy, else the number of regions that the back end of the bidirectional search scores exactly.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        preprocess: Callable[[Any], Tensor],
        semantic: Tensor | None = None,
        k: int = 40,
        weights: dict[str, float] | None = None,
        pending: int | None = None,
        probabilities: bool = False,
        arrays: bool = False,
    ) -> None:
        self.model, self.preprocess, self.semantic = model, preprocess, semantic
        self.k, self.pending, self.probabilities, self.arrays = k, pending, probabilities, arrays
        self.weights = dict.fromkeys(TERMS, 1.0) | (weights or {})
        self.images = 0
        self.gaps: list[float] = []

    # The model

    def prepared(self, merged: np.ndarray) -> Tensor:
        picture = merged.astype(np.uint8)
        return self.preprocess(picture if self.arrays else Image.fromarray(picture))

    def features(self, pictures: list[np.ndarray]) -> Tensor:
        self.images += len(pictures)
        with torch.no_grad():
            return self.model(torch.stack([self.prepared(each) for each in pictures])).double()

    def softmax(self, features: Tensor) -> Tensor:
        if self.semantic is not None:
            return (features @ self.semantic.double().T).softmax(1)
        return features if self.probabilities else features.softmax(1)

    # The set function

    def merge(self, chosen: list[int]) -> np.ndarray:
        merged = np.zeros(self.regions[0].shape, dtype=np.uint64)
        for region in chosen:
            merged = merged + self.regions[region]
        return merged

    def distances(self) -> np.ndarray:
        """Between the features of single regions, arccos(cos) / pi; infinite on the diagonal."""
        alone = torch.cat([self.features([each]) for each in self.regions]).cpu().numpy()
        found = np.full((len(alone), len(alone)), math.inf)
        for i, one in enumerate(alone):
            for j, other in enumerate(alone):
                size = math.sqrt(float(one @ one) * float(other @ other))
                if i != j:
                    found[i, j] = math.acos(min(1.0, max(-1.0, float(one @ other) / size if size else 0.0))) / math.pi
        return found

    def effectiveness(self, chosen: list[int]) -> float:
        return float(self.between[np.ix_(chosen, chosen)].min(1).sum()) if len(chosen) > 1 else 0.0

    def terms(self, before: list[int], candidates: list[int]) -> list[dict[str, float]]:
        """The four terms of `before` with each candidate added."""
        merged = self.merge(before)
        kept = [merged + self.regions[c] for c in candidates]
        removed = [self.whole - each for each in kept]
        p = self.softmax(self.features(kept + removed)).cpu().numpy()
        entropy = (p * np.log(p + 1e-7)).sum(1)
        return [
            {
                "confidence": float(1 + entropy[i] / math.log(p.shape[1])),
                "effectiveness": self.effectiveness([*before, c]),
                "consistency": float(p[i, self.target]),
                "collaboration": float(1 - p[len(candidates) + i, self.target]),
            }
            for i, c in enumerate(candidates)
        ]

    def score(self, terms: dict[str, float]) -> float:
        return sum(self.weights[name] * terms[name] for name in TERMS)

    # The searches

    def step(self, chosen: list[int], rest: list[int]) -> tuple[int, list[dict[str, float]]]:
        """The candidate of the largest score, the first of equal ones, and the terms of all."""
        terms = self.terms(chosen, rest)
        scores = [self.score(each) for each in terms]
        falling = sorted(scores, reverse=True)
        self.gaps.append(falling[0] - falling[1] if len(falling) > 1 else math.inf)
        return rest[scores.index(falling[0])], terms

    def greedy(self) -> list[int]:
        chosen: list[int] = []
        rest = list(range(len(self.regions)))
        while rest and len(chosen) < self.k:
            best, _ = self.step(chosen, rest)
            chosen.append(best)
            rest.remove(best)
        return chosen

    def bidirectional(self, pending: int) -> list[int]:
        front: list[int] = []
        back: list[int] = []
        rest = list(range(len(self.regions)))
        while rest:
            scored = list(rest)
            best, terms = self.step(front, scored)
            front.append(best)
            rest.remove(best)
            if len(rest) > pending:
                surrogate = {}
                for c, own in zip(scored, terms, strict=True):
                    if c != best:
                        surrogate[c] = self.score({**own, "effectiveness": self.effectiveness([*back, c])})
                ranked = sorted(rest, key=lambda c: (surrogate[c], c))
                lowest = sorted(ranked[:pending])
                exact = [self.score(each) for each in self.terms(back, lowest)]
                rising = sorted(exact)
                edges = [rising[1] - rising[0]] if pending > 1 else []
                edges.append(surrogate[ranked[pending]] - surrogate[ranked[pending - 1]])
                self.gaps.append(min(edges))
                worst = lowest[exact.index(rising[0])]
                back.append(worst)
                rest.remove(worst)
        return (front + back[::-1])[: self.k]

    def __call__(
        self, images: list[np.ndarray], id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        self.start(images, id)
        order = self.greedy() if self.pending is None else self.bidirectional(self.pending)
        self.order = order
        along = [self.terms(order[:i], [order[i]])[0] for i in range(len(order))]
        scores: dict[str, Any] = {f"{name}_score": [each[name] for each in along] for name in TERMS}
        total = scores["smdl_score"] = [self.score(each) for each in along]
        scores["sub-k"] = len(order)
        for number, name in enumerate(TERMS, 1):
            scores[f"lambda{number}"] = self.weights[name]
        best = total.index(max(total)) + 1
        return self.merge(order[:best]).astype(np.uint8), np.stack([images[region] for region in order]), scores

    def start(self, images: list[np.ndarray], id: int | None) -> None:
        """What all steps need: the whole image, the class, and the distances between regions."""
        self.regions = images
        self.whole = self.merge(list(range(len(images))))
        self.gaps = []
        self.target = int(self.softmax(self.features([self.whole]))[0].argmax()) if id is None else id
        self.between = self.distances()


def pictures_of(image: Tensor, labels: Tensor) -> list[np.ndarray]:
    """The uint8 region images [H,W,3] of an image [3,H,W] in 0..1."""
    whole = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    parts = labels.cpu().numpy()
    return [np.where((parts == region)[:, :, None], whole, 0).astype(np.uint8) for region in range(parts.max() + 1)]


def seconds_of_greedy(clf: Any, image: Tensor, labels: Tensor, result: Any, steps: int = 2) -> float:
    """Seconds for the ranking `result` of an image [3,H,W] in 0..1, scaled up from its first steps.

    Every candidate of every step costs the same here: merging adds one region to what was merged for the step.
    """
    slow = SlowSMDL(clf.logits, lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
    slow.images = 0
    started = time.perf_counter()
    slow.start(pictures_of(image, labels), result.target)
    fixed = time.perf_counter() - started
    m, chosen, scored = len(slow.regions), [], 0
    steps = min(steps, m)
    started = time.perf_counter()
    for region in result.order[:steps]:
        rest = [other for other in range(m) if other not in chosen]
        slow.step(chosen, rest)
        chosen.append(region)
        scored += len(rest)
    return fixed + (time.perf_counter() - started) * (m * (m + 1) // 2) / scored
