"""SMDL behind the call signatures of the released torch classes.

Chen et al., "Less is More: Fewer Interpretable Region via Submodular Subset Selection", ICLR 2024 (arXiv 2402.09164).
The searches, the set function and the batching are those of `finecf.SMDL`. Marks: P the paper, R what the released
classes compute, as a description of them says (their code was not read), O ours, where that description is silent.

The set function F(S) of a set of regions, f being the model's output for a preprocessed image (R):

    confidence     1 + sum_k P_k ln(P_k + 1e-7) / ln C
    effectiveness  sum_{i in S} min_{j in S, j != i} arccos(cos(f_i, f_j)) / pi, f_i of region i alone; 0 for one region
    consistency    P_id with the regions of S kept, all others black in uint8, before the preprocessing
    collaboration  1 - P_id with the regions of S black

Probabilities P are softmax(f T^t), with no temperature, where there is a semantic matrix T [C,d] (R). The `BlackBox...`
classes have none: their model's outputs are logits or probabilities, and serve as the features f too (O).

`lambda1` to `lambda4` weigh, in this order and in every class here, confidence, effectiveness, consistency and
collaboration: the order in which the sum is written (P). The released classes number them in an order that differs from
class to class (R), so four numbers that are not all equal raise a warning that says which is which; `weights=` takes
them by name and raises none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from finecf import ops
from finecf.explainers import _subset
from finecf.explainers._evaluation import Evaluation, Group, Terms
from finecf.explainers._memory import checked_micro_batch
from finecf.explainers._shared import one_of, plain
from finecf.explainers._subset import Problem, Search, Trace
from finecf.explainers.smdl import checked_weights
from finecf.models.layers import plain_eval
from finecf.ops.submodular import TERMS

__all__ = [
    "BlackBoxSingleModalSubModularExplanation",
    "BlackBoxSingleModalSubModularExplanationEfficient",
    "MultiModalSubModularExplanation",
    "MultiModalSubModularExplanationEfficientV2",
    "Report",
]

Picture = NDArray[np.uint8]
"""[H,W,3]."""
Result = tuple[Picture, NDArray[np.uint8], dict[str, Any]]
"""The merged image, the ranked region images [k,H,W,3], and the scores along the order."""

OUTPUTS: Final = ("auto", "logits", "probabilities")

_MICRO_BATCH: Final = {"cpu": 16, "cuda": 128}
_PROBES: Final = 4
"""Random sets of regions for which masking before and behind the preprocessing are compared, with their complements."""


@dataclass(frozen=True)
class Report:
    """What the released triple has no room for (O); `explainer.report` after a call.

    Attributes:
        order: the places of the ranked regions in the list that was given.
        target: the class explained.
        tied_steps: steps (from 1) at which another region scored the same within ten times the noise; from there on
            the order may be another than a released class's.
        noise: how far a score moves when an image goes through the model in another company.
        evaluations: images through the model.
        preprocessed_once: whether masked images were put together behind the preprocessing.
    """

    order: list[int]
    target: int
    tied_steps: list[int]
    noise: float
    evaluations: int
    preprocessed_once: bool


class _SubModularExplanation:
    """What the four classes share: how a list of region images is ranked."""

    _pending: int | None = None
    """Regions that the back end scores exactly; None: there is no back end."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        preproccessing_function: Callable[[Any], Tensor],
        k: int,
        numbers: tuple[float, float, float, float],
        device: torch.device | str | None,
        weights: Mapping[str, float] | None,
        micro_batch: int | None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1: the number of regions to rank; got {k}")
        self.model = model
        self.preproccessing_function = preproccessing_function
        self.k = k
        self.device = _device(device, model)
        depth = type(self).__mro__.index(_SubModularExplanation)
        self.weights = _weights(numbers, weights, stacklevel=3 + depth)
        self.micro_batch = checked_micro_batch(micro_batch) or _MICRO_BATCH.get(self.device.type, 16)
        self.report: Report | None = None

    def __call__(self, image_set: Sequence[Picture], id: int | None = None) -> Result:
        """Rank regions by what they contribute to a class.

        Args:
            image_set: m images, uint8 [H,W,3], each black outside its region; no pixel may be other than black in two
                of them. Their sum is the image. A pixel that is black in all of them is black whatever is kept.
            id: the class, in 0..C-1; None: the one of the largest probability for the whole image (O).

        Returns:
            The sum of the first regions of the order, as many as make F largest (the first of equal ones), uint8
            [H,W,3]; the images of the min(k, m) best regions in rank order, uint8 [min(k,m),H,W,3]; and a dictionary
            that json can write: "consistency_score", "collaboration_score", "confidence_score", "effectiveness_score"
            and "smdl_score" (F) of the first 1..min(k,m) regions, lists of floats; "lambda1" to "lambda4", the weights;
            "sub-k", min(k, m) (O).

        Raises:
            TypeError: images that are not uint8, or a model or preprocessing that does not give a tensor.
            ValueError: no image, images of other shapes, two regions that overlap, a class out of range, outputs of the
                wrong shape, NaN or infinity.
        """
        pictures = _pictures(image_set)
        labels, whole = _label_map(pictures)
        context: AbstractContextManager[None] = (
            plain_eval(self.model, self.device.type) if isinstance(self.model, nn.Module) else plain(self.device)
        )
        with context:
            trace, group, once = self._rank(pictures, labels, whole, id)
        self.report = Report(
            trace.order, int(group.target[0]), trace.ties, trace.problem.noise, group.forwards[0], once
        )
        steps = [step for step in trace.steps if step is not None]
        total = [step.total for step in steps]
        merged = np.zeros_like(whole)
        for region in trace.order[: total.index(max(total)) + 1]:
            merged |= pictures[region]  # disjoint: the sum
        scores: dict[str, Any] = {
            f"{name}_score": [step.scores[TERMS.index(name)] for step in steps]
            for name in ("consistency", "collaboration", "confidence", "effectiveness")
        }
        scores |= {"smdl_score": total, "sub-k": len(trace.order)}
        scores |= {f"lambda{number}": self.weights[name] for number, name in enumerate(TERMS, 1)}
        return merged, np.stack([pictures[region] for region in trace.order]), scores

    def _rank(
        self, pictures: list[Picture], labels: Tensor, whole: Picture, target: int | None
    ) -> tuple[Trace, Group, bool]:
        """The search; and whether its images were put together behind the preprocessing."""
        preprocess = _preprocessor(self.preproccessing_function, whole)
        after = _behind(preprocess, pictures, labels, whole)
        if after is None:
            pixels = torch.from_numpy(whole).permute(2, 0, 1)[None]
            images, baseline, maps = pixels, torch.zeros(3, dtype=torch.uint8), labels[None]
        else:
            images, baseline, maps = (each[None] for each in after)
        forward = _Forward(self.model, preprocess if after is None else None, self.device)
        images = images.to(self.device)
        outputs = forward.features(images)
        forward.logits = self._logits(outputs)
        logits = forward.logits(outputs)
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model gives NaN or inf for the whole image; check the model or the image")
        m, classes = len(pictures), logits.shape[1]
        if classes < 2:
            raise ValueError("the model and semantic_feature give one class; a softmax over it says nothing")
        if target is None:
            target = int(logits.argmax(1))
        elif not 0 <= int(target) < classes:
            raise ValueError(f"id must be a class in 0..{classes - 1}, or None for the predicted one; got {target}")
        weights = torch.tensor([self.weights[name] for name in TERMS], dtype=torch.float64)
        group = Group(
            images=images,
            baseline=baseline.to(self.device),
            labels=maps.to(self.device),
            regions=[m],
            target=torch.tensor([int(target)], device=self.device),
            whole=logits,
            whole_features=None,
            numbers=[0],
        )
        terms = Terms(weights, "entropy", "probability", "probability", None, report_all=True)
        evaluation = Evaluation(forward, terms, self.micro_batch)
        noise = evaluation.start(group)
        problem = Problem(
            distance=group.distance[0].cpu(),
            weights=weights,
            sizes=[1] * m,  # no share of the area is asked for, and a region may be all black
            empty_score=evaluation.empty_scores(group)[0],
            noise=noise,
            max_regions=self.k,
        )
        trace = Trace(problem)
        evaluation.run(group, [self._search(trace)])
        evaluation.run(group, [_subset.prefixes(trace)], removed=True)
        return trace, group, after is not None

    def _search(self, trace: Trace) -> Search:
        return _subset.greedy(trace) if self._pending is None else _subset.bidirectional(trace, self._pending)

    def _logits(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        """How the model's outputs give logits [n,C], told from its outputs for the whole image."""
        raise NotImplementedError


class MultiModalSubModularExplanation(_SubModularExplanation):
    """Ranks regions for a model whose features are compared with a semantic matrix (CLIP, ImageBind); greedy.

    Args:
        model: maps preprocessed images [n,...] to features [n,d]; an `nn.Module` is run in eval mode and put back.
        semantic_feature: [C,d], one row for each class.
        preproccessing_function: maps an RGB PIL image, or a uint8 array [H,W,3], to a tensor [channels,h,w]: a
            torchvision transform, or a function of one's own. PIL is tried first, then the array (O). It must not be
            random.
        k: how many regions are ranked; all of them where there are fewer.
        lambda1, lambda2, lambda3, lambda4: weights, at least 0, of confidence, effectiveness, consistency and
            collaboration (see the module's docstring on their order).
        device: where images are sent and scores are computed; None: where the model's parameters are.
        weights: the weights by name instead of by number, e.g. `{"consistency": 20, "collaboration": 5}`; terms that
            are not named keep weight 1 (O).
        micro_batch: images through the model at a time; None: 16, or 128 on CUDA (O).

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of range.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        semantic_feature: Tensor,
        preproccessing_function: Callable[[Any], Tensor],
        k: int = 40,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda3: float = 1.0,
        lambda4: float = 1.0,
        device: torch.device | str | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        semantic = torch.as_tensor(semantic_feature).detach()
        if semantic.ndim != 2 or not semantic.is_floating_point():
            raise ValueError(
                f"semantic_feature must be a matrix [classes,features] of real numbers; got {list(semantic.shape)} of "
                f"{semantic.dtype}"
            )
        numbers = (lambda1, lambda2, lambda3, lambda4)
        super().__init__(model, preproccessing_function, k, numbers, device, weights, micro_batch)
        self.semantic_feature = semantic.to(self.device)

    def _logits(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        semantic = self.semantic_feature.to(outputs.dtype)
        if outputs.shape[1] != semantic.shape[1]:
            raise ValueError(
                f"semantic_feature [{semantic.shape[0]},{semantic.shape[1]}] does not fit the model's features, which "
                f"are [n,{outputs.shape[1]}]: both must have the same number of columns"
            )
        return lambda features: features @ semantic.T


class MultiModalSubModularExplanationEfficientV2(MultiModalSubModularExplanation):
    """As `MultiModalSubModularExplanation`, searched from both ends (LiMA, arXiv 2504.00470): a third fewer images.

    Args:
        model, semantic_feature, preproccessing_function, k, lambda1, lambda2, lambda3, lambda4, device: as there.
        pending_samples: regions that the back end scores exactly at each step, at least 1.
        weights, micro_batch: as there.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        semantic_feature: Tensor,
        preproccessing_function: Callable[[Any], Tensor],
        k: int = 40,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda3: float = 1.0,
        lambda4: float = 1.0,
        device: torch.device | str | None = None,
        pending_samples: int = _subset.PENDING,
        *,
        weights: Mapping[str, float] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        numbers = (lambda1, lambda2, lambda3, lambda4)
        super().__init__(
            model,
            semantic_feature,
            preproccessing_function,
            k,
            *numbers,
            device=device,
            weights=weights,
            micro_batch=micro_batch,
        )
        self._pending = _pending(pending_samples)


class BlackBoxSingleModalSubModularExplanation(_SubModularExplanation):
    """Ranks regions for a classifier of which only the outputs are seen; greedy.

    Its outputs, as they come, are also the features between which the effectiveness term measures angles (O).

    Args:
        model: maps preprocessed images [n,...] to logits or probabilities [n,C].
        preproccessing_function, k, lambda1, lambda2, lambda3, lambda4, device: as of `MultiModalSubModularExplanation`.
        outputs: whether the model gives "logits" or "probabilities"; "auto": probabilities where the outputs for the
            whole image are not negative and their sum is 1 within 1e-3 (O).
        weights, micro_batch: as of `MultiModalSubModularExplanation`.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        preproccessing_function: Callable[[Any], Tensor],
        k: int = 40,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda3: float = 1.0,
        lambda4: float = 1.0,
        device: torch.device | str | None = None,
        *,
        outputs: str = "auto",
        weights: Mapping[str, float] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        numbers = (lambda1, lambda2, lambda3, lambda4)
        super().__init__(model, preproccessing_function, k, numbers, device, weights, micro_batch)
        self.outputs = one_of("outputs", outputs, OUTPUTS)

    def _logits(self, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        looks = bool((outputs >= 0).all()) and bool((outputs.sum(1) - 1).abs().max() <= 1e-3)
        if self.outputs == "logits" or (self.outputs == "auto" and not looks):
            return lambda values: values
        # The softmax of logarithms gives the probabilities back.
        return lambda values: values.double().clamp_min(torch.finfo(torch.float64).tiny).log()


class BlackBoxSingleModalSubModularExplanationEfficient(BlackBoxSingleModalSubModularExplanation):
    """As `BlackBoxSingleModalSubModularExplanation`, searched from both ends (LiMA, arXiv 2504.00470).

    Args:
        model, preproccessing_function, k, lambda1, lambda2, lambda3, lambda4, device: as there.
        pending_samples: regions that the back end scores exactly at each step, at least 1.
        outputs, weights, micro_batch: as there.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        preproccessing_function: Callable[[Any], Tensor],
        k: int = 40,
        lambda1: float = 1.0,
        lambda2: float = 1.0,
        lambda3: float = 1.0,
        lambda4: float = 1.0,
        device: torch.device | str | None = None,
        pending_samples: int = _subset.PENDING,
        *,
        outputs: str = "auto",
        weights: Mapping[str, float] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        numbers = (lambda1, lambda2, lambda3, lambda4)
        super().__init__(
            model,
            preproccessing_function,
            k,
            *numbers,
            device=device,
            outputs=outputs,
            weights=weights,
            micro_batch=micro_batch,
        )
        self._pending = _pending(pending_samples)


# Settings


def _device(device: torch.device | str | None, model: object) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    first = next(parameters, None)
    return torch.device("cpu") if first is None else first.device


def _pending(samples: int) -> int:
    if samples < 1:
        raise ValueError(f"pending_samples must be at least 1, got {samples}")
    return samples


def _weights(numbers: tuple[float, ...], named: Mapping[str, float] | None, stacklevel: int) -> dict[str, float]:
    """The weights by name, from the four numbers or from names."""
    if named is None:
        if len(set(numbers)) > 1:
            meaning = ", ".join(
                f"lambda{i} = {value} weighs {term}"
                for i, (term, value) in enumerate(zip(TERMS, numbers, strict=True), 1)
            )
            warnings.warn(
                f"{meaning}. The released classes number the weights in an order that differs from class to class: "
                "check that this is what you mean, or name them, weights={'consistency': ...}",
                stacklevel=stacklevel,
            )
        return checked_weights(dict(zip(TERMS, numbers, strict=True)))
    if set(numbers) != {1.0}:
        raise ValueError("give the weights by number (lambda1 to lambda4) or by name (weights=), not both")
    return checked_weights(named)


# Images


def _pictures(image_set: Sequence[Picture]) -> list[Picture]:
    """The region images as uint8 arrays of one shape [H,W,3]."""
    pictures = [np.asarray(each) for each in image_set]
    if not pictures:
        raise ValueError("image_set is empty: expected a list of images, one for each region")
    for place, each in enumerate(pictures):
        if each.dtype != np.uint8:
            raise TypeError(f"image_set must hold uint8 images in 0..255; image {place} is {each.dtype}")
        if each.ndim != 3 or each.shape[2] != 3 or not each.size or each.shape != pictures[0].shape:
            raise ValueError(
                f"image_set must hold RGB images [H,W,3] of one size; image {place} is {list(each.shape)}"
                + (f", image 0 is {list(pictures[0].shape)}" if place else "")
            )
    return pictures


def _label_map(pictures: list[Picture]) -> tuple[Tensor, Picture]:
    """Which region each pixel belongs to, int32 [H,W], and the whole image.

    A pixel that is black in every image goes to region 0: it is black whether that region is kept or not.
    """
    labels = np.full(pictures[0].shape[:2], -1, dtype=np.int32)
    whole = np.zeros_like(pictures[0])
    for place, each in enumerate(pictures):
        own = each.any(2)
        twice = labels[own]
        twice = twice[twice >= 0]
        if twice.size:
            other = int(twice[0])
            raise ValueError(
                f"regions {other} and {place} overlap: {int((twice == other).sum())} pixels are other than black in "
                "both, and their sum would not be the image; divide it into disjoint regions "
                "(finecf.regions.from_masks resolves overlaps)"
            )
        labels[own] = place
        whole |= each
    return torch.from_numpy(labels.clip(0)), whole


# Preprocessing and the model

Preprocess = Callable[[Picture], Tensor]


def _preprocessor(function: Callable[[Any], Tensor], picture: Picture) -> Preprocess:
    """The user's function as one of arrays: it is given PIL images where it takes them, else the arrays."""
    converters: tuple[tuple[str, Callable[[Picture], Any]], ...] = (
        ("a PIL image", Image.fromarray),
        ("an array", np.ascontiguousarray),
    )
    failures, last = [], None
    for kind, convert in converters:

        def preprocess(picture: Picture, convert: Callable[[Picture], Any] = convert) -> Tensor:
            return _single(function(convert(picture)))

        try:
            preprocess(picture.copy())
        except Exception as error:  # whatever the user's function raises: it is told below
            failures.append(f"given {kind} it raised {type(error).__name__}: {error}")
            last = error
        else:
            return preprocess
    raise TypeError(
        "preproccessing_function must map an RGB PIL image, or a uint8 array [H,W,3], to a tensor [channels,h,w]; "
        + "; ".join(failures)
    ) from last


def _single(result: object) -> Tensor:
    """One preprocessed image [channels,h,w]."""
    if not isinstance(result, Tensor):
        raise TypeError(f"it gave a {type(result).__name__}, not a tensor")
    image = result.as_subclass(Tensor).detach()
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3:
        raise ValueError(f"it gave a tensor {list(image.shape)}, not [channels,h,w]")
    return image


def _behind(
    preprocess: Preprocess, pictures: list[Picture], labels: Tensor, whole: Picture
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The image and black as preprocessed [channels,h,w], and the label map there; None: masking has to come first.

    Where every preprocessed pixel depends on one pixel of the image (scaling and normalising, cropping, mirroring, but
    no interpolation and no statistics of the image), masked images can be put together behind the preprocessing. That
    holds if no preprocessed pixel changes with two regions; and then it is tried on sets of regions, to the last bit.
    """
    full, black = preprocess(whole).cpu(), preprocess(np.zeros_like(whole)).cpu()
    if full.shape != black.shape:
        return None
    owner = torch.full(full.shape[1:], -1, dtype=torch.int32)
    for place, each in enumerate(pictures):
        alone = preprocess(each).cpu()
        if alone.shape != black.shape:
            return None
        changed = (alone != black).any(0)
        if bool((owner[changed] >= 0).any()):
            return None
        owner[changed] = place
    owner = owner.clamp_min_(0)
    m = len(pictures)
    half = torch.rand(_PROBES, m, generator=torch.Generator().manual_seed(0)) < 0.5
    keep = torch.cat([half, ~half, torch.ones(1, m, dtype=torch.bool)])
    first = torch.zeros(len(keep), dtype=torch.int64)
    pixels = torch.from_numpy(whole).permute(2, 0, 1)[None]
    before = ops.compose_regions(
        pixels, labels[None], first, keep, torch.zeros(3, dtype=torch.uint8), channels_last=True
    )
    after = ops.compose_regions(full[None], owner[None], first, keep, black[None])
    for masked, composed in zip(before, after, strict=True):
        if not torch.equal(preprocess(masked.permute(1, 2, 0).numpy()).cpu(), composed):
            return None
    return full, black, owner


class _Forward:
    """The model, and the preprocessing where that comes after the masking, as `Evaluation` calls them."""

    def __init__(self, model: Callable[[Tensor], Tensor], preprocess: Preprocess | None, device: torch.device) -> None:
        self.model = model
        self.preprocess = preprocess
        self.device = device
        self.channels_last = preprocess is not None  # as arrays [H,W,3] are
        self.logits: Callable[[Tensor], Tensor] = lambda outputs: outputs

    def features(self, x: Tensor) -> Tensor:
        """What the model gives, [n,d]."""
        if self.preprocess is not None:
            pixels = x.permute(0, 2, 3, 1).cpu().numpy()
            x = torch.stack([self.preprocess(each) for each in pixels]).to(self.device)
        outputs = self.model(x)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the model must give a tensor [n,d]; it gave a {type(outputs).__name__}")
        if outputs.ndim != 2 or len(outputs) != len(x):
            raise ValueError(f"the model must give a tensor [n,d] for n images; it gave {list(outputs.shape)}")
        return outputs.detach()

    def with_features(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Logits [n,C] and features [n,d]."""
        outputs = self.features(x)
        return self.logits(outputs), outputs

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits [n,C]."""
        return self.logits(self.features(x))
