"""Counterfactual images to compare Mirror-CFE with: adversarial ones, plain interpolation between latents, and the
nearest real image of the target class.

An adversarial image shows what validity and L1 are worth without faithfulness; the interpolation, decoded by the same
decoder, what the reflection adds to it; the real image, how far away the other class is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._mirror_draw import Canvas, places_of
from finecf.explainers._reflection import shifted_maps
from finecf.explainers._shared import check_range, lead_of
from finecf.metrics._inputs import (
    RANGE_ADVICE,
    ImageRange,
    as_bounds,
    as_classes,
    as_images,
    checked_logits,
    rows_per_batch,
)
from finecf.models import Classifier
from finecf.regions.baseline import gaussian_blur

if TYPE_CHECKING:
    from finecf.explainers import MirrorCFE

NORMS = ("linf", "l2")
_RADIUS = {"linf": 0.3, "l2": 3.0}


@dataclass(frozen=True, eq=False)
class Attack:
    """What `pgd` found.

    Attributes:
        images: [B,C,H,W], as the classifier takes them; where the target was not reached, the last one tried.
        found: bool [B], whether the classifier calls the image (with `blur`, the blurred one too) the target.
        steps: int64 [B], steps taken; 0 where the image was the target's before.
        margin: float64 [B], by how much the target's logit is above the largest other one; of the image and the blurred
            one the smaller.
    """

    images: Tensor
    found: Tensor
    steps: Tensor
    margin: Tensor


@torch.inference_mode(False)  # it needs gradients, which the user's own inference mode would not give
def pgd(
    classifier: Classifier,
    images: Tensor,
    target: Tensor | int,
    *,
    norm: str = "linf",
    radius: float | None = None,
    step: float | None = None,
    steps: int = 40,
    margin: float = 0.0,
    stop: bool = True,
    blur: float = 0.0,
    image_range: ImageRange = (0.0, 1.0),
    batch_size: int = 64,
) -> Attack:
    """Targeted projected gradient descent (Madry et al., ICLR 2018, section 2.1): adversarial images of the target.

    With images scaled to [0,1], from the image itself (no random start, O) `x <- clip(P(x - step d))`: d is the sign
    ("linf") or the direction ("l2", over the whole image) of the gradient of the target's cross-entropy, P projects on
    the ball around the image, clip on [0,1].

    Args:
        classifier: what `finecf.wrap` returned. Its weights get no gradient, and its mode is put back.
        images: floating [B,C,H,W] or [C,H,W], as the classifier takes them, inside `image_range`.
        target: class wanted, an int or int64 [B]. An image that is of it already stays as it is, with `stop`.
        norm: "linf" or "l2".
        radius: of the ball, in shares of the range ("l2": norm over all pixels and channels); None: 0.3 for "linf"
            (Madry et al. for MNIST), 3 for "l2" (O).
        step: of one step; None: `2.5 radius / steps`.
        steps: the most steps.
        margin: how far the target's logit must be above all others for an image to be done.
        stop: whether an image is left alone once it is done (the smaller change); False: all steps are taken.
        blur: standard deviation, in pixels, of a Gaussian blur, cut at 3 deviations, that the attack must stand: the
            gradient is of the image's and the blurred image's cross-entropies together, and both must be the target's
            (expectation over transformations; Athalye et al., ICML 2018). 1 is what `denoised_valid` asks for. 0: none.
        image_range: least and largest value of the images, numbers or one a channel.
        batch_size: images at a time.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: wrong shapes, NaN or inf, images beyond the range, a class or a setting out of range.
    """
    if not hasattr(classifier, "frozen"):
        raise TypeError(f"pgd needs a finecf.wrap classifier for its gradients, got {type(classifier).__name__}.")
    images = as_images(images).to(classifier.device)
    wanted = as_classes(target, len(images), images.device)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}.")
    radius = _RADIUS[norm] if radius is None else radius
    if steps < 1 or not radius > 0 or not margin >= 0:
        raise ValueError(
            f"pgd needs steps >= 1, radius > 0 and margin >= 0, got {steps}, {radius} and {margin} in that order."
        )
    step = 2.5 * radius / steps if step is None else step
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}.")
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur is a standard deviation in pixels, at least 0; got {blur}.")
    low, span = as_bounds(image_range, images)
    check_range(images, low, low + span, RANGE_ADVICE)
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    attack = Attack(images.clone(), found, found.long(), found.double())
    rows = rows_per_batch(images, batch_size, None)
    for start in range(0, len(images), rows):
        own = slice(start, start + rows)
        _descend(
            classifier, attack, own, wanted[own], low, span, _Way(norm, radius, step, steps, margin, stop, float(blur))
        )
    return attack


class _Way(NamedTuple):
    """How an attack goes: arguments of `pgd`."""

    norm: str
    radius: float
    step: float
    steps: int
    margin: float
    stop: bool
    blur: float


def _descend(
    classifier: Classifier, attack: Attack, own: slice, wanted: Tensor, low: Tensor, span: Tensor, way: _Way
) -> None:
    """Attack the rows `own`, in place."""
    norm, radius, step, steps, margin, stop, blur = way
    views = 2 if blur else 1
    image = attack.images[own].clone()
    start = (image - low) / span
    moved, rows = start.clone(), torch.arange(len(image), device=image.device)
    for number in range(steps + 1):
        with classifier.frozen():
            image.requires_grad_()
            seen = torch.cat([image, gaussian_blur(image, blur)]) if blur else image
            _, logits = classifier.encode(seen)
            asked = wanted[rows].repeat(views)
            checked = checked_logits(logits, len(seen), asked)
            loss = F.cross_entropy(checked, asked, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, image)
        said = checked.detach()
        gap = lead_of(said, asked).view(views, -1).amin(0)
        won = (said.argmax(1) == asked).view(views, -1).all(0)
        at = rows + own.start
        attack.images[at], attack.found[at] = image.detach(), won
        attack.steps[at], attack.margin[at] = number, gap
        left = ~(won & (gap >= margin)) if stop else torch.ones_like(won)
        if number == steps or not bool(left.any()):
            return
        rows, gradient = rows[left], gradient[left] * span
        if norm == "linf":
            change = moved[rows] - step * gradient.sign() - start[rows]
            change = change.clamp(-radius, radius)
        else:
            change = moved[rows] - step * _unit(gradient) - start[rows]
            change = change * (radius / _norm(change).clamp_min(radius))
        moved[rows] = (start[rows] + change).clamp(0, 1)
        image = low + span * moved[rows]


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)[:, None, None, None]


def _unit(values: Tensor) -> Tensor:
    """Each row of [B,C,H,W] at norm 1; zeros stay zeros."""
    largest = values.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    scaled = values / largest  # gradients may be too small to be squared
    return scaled / _norm(scaled).clamp_min(torch.finfo(values.dtype).eps)


@dataclass(frozen=True, eq=False)
class Neighbour:
    """What `nearest_unlike_neighbour` found.

    Attributes:
        images: [B,C,H,W], real images of the target.
        reference: int64 [B], their numbers in `references`.
        distance: float64 [B], mean absolute difference of a pixel and channel.
    """

    images: Tensor
    reference: Tensor
    distance: Tensor


def nearest_unlike_neighbour(
    classifier: Classifier,
    images: Tensor,
    target: Tensor | int,
    references: Tensor,
    *,
    labels: Tensor | None = None,
    batch_size: int = 64,
) -> Neighbour:
    """The real image of the target class that is nearest in pixels, by L1 (ties: the first).

    A counterfactual that is a real image by construction (nearest unlike neighbour: Nugent and Cunningham, 2005). Its
    distance tells what an L1 is worth: how much must change until one sees the other class in pictures that exist.

    Args:
        classifier: what `finecf.wrap` returned.
        images: floating [B,C,H,W] or [C,H,W], as the classifier takes them.
        target: class wanted, an int or int64 [B].
        references: [N,C,H,W], real images of the same size, of any classes. Those count whose predicted class (and
            label, where there are `labels`) is the target.
        labels: int64 [N].
        batch_size: images at a time in the classifier.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: wrong shapes, NaN or inf, or no reference is of a target class.
    """
    images, references = (
        as_images(each, name).to(classifier.device) for each, name in ((images, "images"), (references, "references"))
    )
    if images.shape[1:] != references.shape[1:]:
        raise ValueError(f"references are {list(references.shape[1:])}, the images {list(images.shape[1:])}.")
    wanted = as_classes(target, len(images), images.device)
    rows = rows_per_batch(references, batch_size, None)
    _some(references)
    predicted = torch.cat([classifier.logits(x).argmax(1) for x in references.split(rows)])
    members = _members(_agreed(predicted, labels), wanted)
    nearest = torch.empty_like(wanted)
    distance = torch.empty(len(images), dtype=torch.float64, device=images.device)
    for b, number in enumerate(wanted.tolist()):
        # One image at a time, chunk by chunk: the differences of all would be as large as all pairs of images.
        parts = [
            (references[own] - images[b]).abs().flatten(1).mean(1, dtype=torch.float64)
            for own in members[number].split(rows)
        ]
        distance[b], place = torch.cat(parts).min(0)
        nearest[b] = members[number][place]
    return Neighbour(references[nearest], nearest, distance)


@dataclass(frozen=True, eq=False)
class Interpolation:
    """What `latent_interpolation` found.

    Attributes:
        images: [B,C,H,W], the first image on the path that the classifier calls the target, else that of k = 1.
        found: bool [B], whether there is one.
        k: float64 [B], where; NaN: nowhere.
        places: float64 [K], the k of the strip.
        strip: [B,K,C,H,W], the images there.
        strip_logits: float64 [B,K,classes], what the classifier says of them.
        reference: int64 [B], the real image that the path leads to, by its number in `references`.
        distance: float64 [B], to it in latent space.
    """

    images: Tensor
    found: Tensor
    k: Tensor
    places: Tensor
    strip: Tensor
    strip_logits: Tensor
    reference: Tensor
    distance: Tensor


def latent_interpolation(
    mirror: MirrorCFE,
    images: Tensor,
    target: Tensor | int,
    references: Tensor,
    k: int | Sequence[float] | Tensor = 11,
    *,
    labels: Tensor | None = None,
    space: str = "latent",
    resolution: float | None = None,
) -> Interpolation:
    """Straight lines from each image's latent to that of the nearest real image of the target, decoded (O).

    The nearest is that of least Euclidean distance between pooled features (ties: the first). With z the image's and
    z_r its, the map drawn is `f + k (z_r - z)` in every cell ("latent": Mirror-CFE's uniform shift to another end), or
    `f + k (f_r - f)` ("map", which also takes over where things are). Decoder, skips, spatial prior (source: the
    predicted class), softening and classifier are Mirror-CFE's. The first flip is looked for in (0, 1], since no
    boundary is known to lie at 1/2.

    Args:
        mirror: a `MirrorCFE` with a decoder.
        images: floating [B,C,H,W] or [C,H,W], as the classifier takes them (`Classifier.prepare`).
        target: class wanted, an int or int64 [B].
        references: [N,C,H,W], real images of the same size, of any classes. Those count whose predicted class (and
            label, where there are `labels`) is the target.
        k: places of the strip: how many from 0 to 1, or the k themselves.
        labels: int64 [N].
        space: "latent" or "map".
        resolution: steps of k in which the first flip is looked for; None: those of `mirror`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: there is no decoder, wrong shapes, NaN or inf, a class or setting out of range, the target is the
            predicted class of an image, or no reference is of a target class.
    """
    decoder, classifier = mirror.decoder, mirror.classifier
    if decoder is None:
        raise ValueError("latent_interpolation draws with the decoder of `mirror`, and there is none: fit or load one.")
    if space not in ("latent", "map"):
        raise ValueError(f'space must be "latent" or "map"; got {space!r}.')
    resolution = mirror.resolution if resolution is None else resolution
    if not 0 < resolution <= 1:
        raise ValueError(f"resolution is a step of k and must lie in (0, 1], got {resolution}.")
    images, references = (
        as_images(each, name).to(classifier.device) for each, name in ((images, "images"), (references, "references"))
    )
    for name, each in (("images", images), ("references", references)):
        if tuple(each.shape[1:]) != decoder.shape.image:
            raise ValueError(f"{name} are {list(each.shape[1:])}; the decoder draws {list(decoder.shape.image)}.")
    wanted = as_classes(target, len(images), images.device)
    places = places_of("k", k, images.device)
    known = _Known.of(classifier, references, labels, mirror.micro_batch)
    parts = []
    with classifier.eval_mode():
        for x, goals in zip(images.split(mirror.micro_batch), wanted.split(mirror.micro_batch), strict=True):
            line = _Line.between(mirror, x, goals, known, references, space)
            parts.append((*line.first(resolution), *line.strip(places), line.reference, line.distance))
    drawn, first, strip, logits, reference, distance = (torch.cat(each) for each in zip(*parts, strict=True))
    return Interpolation(drawn, ~first.isnan(), first, places, strip, logits, reference, distance)


@dataclass(frozen=True, eq=False)
class _Known:
    """The latents of the references, float64 [N,D], and which class each counts for, -1 for none."""

    latents: Tensor
    classes: Tensor

    @staticmethod
    def of(classifier: Classifier, references: Tensor, labels: Tensor | None, rows: int) -> _Known:
        _some(references)
        latents, predicted = [], []
        for x in references.split(rows):
            features, logits = classifier.features_and_logits(x)
            latents.append(features.mean((2, 3)).double())
            predicted.append(logits.argmax(1))
        return _Known(torch.cat(latents), _agreed(torch.cat(predicted), labels))

    def nearest(self, latents: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Number and distance of the nearest reference of each target class, int64 and float64 [B]."""
        chosen = torch.empty_like(target)
        distance = torch.empty(len(target), dtype=torch.float64, device=target.device)
        for number, members in _members(self.classes, target).items():
            rows = (target == number).nonzero()[:, 0]
            apart = torch.stack([(self.latents[members] - latents[row]).norm(dim=1) for row in rows])
            distance[rows], place = apart.min(1)
            chosen[rows] = members[place]
        return chosen, distance


def _some(references: Tensor) -> None:
    if len(references) == 0:
        raise ValueError("references is empty; give real images of the target classes.")


def _agreed(predicted: Tensor, labels: Tensor | None) -> Tensor:
    """The class each reference counts for: the predicted one, -1 where its label is another."""
    if labels is None:
        return predicted
    return torch.where(as_classes(labels, len(predicted), predicted.device, "labels") == predicted, predicted, -1)


def _members(classes: Tensor, target: Tensor) -> dict[int, Tensor]:
    """For each class that is a target, the numbers of the references that count for it."""
    counted = classes >= 0
    members = {number: (counted & (classes == number)).nonzero()[:, 0] for number in target.unique().tolist()}
    for number, own in members.items():
        if len(own) == 0:
            raise ValueError(
                f"no reference is recognised as class {number}, the target; give real images of that class."
            )
    return members


@dataclass(frozen=True, eq=False)
class _Line:
    """The path of a batch of images: maps f + k delta, and what drawing them needs."""

    canvas: Canvas
    delta: Tensor
    reference: Tensor
    distance: Tensor

    @staticmethod
    def between(
        mirror: MirrorCFE,
        x: Tensor,
        target: Tensor,
        known: _Known,
        references: Tensor,
        space: str,
    ) -> _Line:
        classifier, decoder = mirror.classifier, mirror.decoder
        assert decoder is not None  # the caller has looked
        features, logits = classifier.features_and_logits(x)
        if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
            raise ValueError(
                f"target classes must lie in 0..{logits.shape[1] - 1}, got {int(target.min())}..{int(target.max())}."
            )
        source = logits.argmax(1)
        if bool((source == target).any()):
            name = classifier.class_name(int(target[source == target][0]))
            raise ValueError(f"target and predicted class of an image are the same, {name!r}; give another target.")
        skips = classifier.pyramid(x)[:-1] if decoder.shape.skips else []
        latents = features.mean((2, 3)).double()
        reference, distance = known.nearest(latents, target)
        if space == "latent":
            delta = (known.latents[reference] - latents)[:, :, None, None]
        else:
            delta = (classifier.features(references[reference]) - features).double()
        canvas = Canvas.of(classifier, decoder, x, features, source, target, skips, mirror.soften)
        return _Line(canvas, delta, reference, distance)

    def at(self, rows: Tensor, k: float) -> tuple[Tensor, Tensor]:
        """Images of some rows, and their logits."""
        features = self.canvas.features[rows]
        places = torch.full((len(rows),), k, dtype=torch.float64, device=features.device)
        maps = shifted_maps(features, self.delta[rows], places)
        images = self.canvas.draw(rows, maps, self.canvas.prior(rows, maps, places))
        return images, self.canvas.classifier.logits(images).double()

    def first(self, resolution: float) -> tuple[Tensor, Tensor]:
        """The first images that are of the target (else those of k = 1), and their k (else NaN)."""
        count = len(self.canvas.source)
        found = torch.full((count,), math.nan, dtype=torch.float64, device=self.canvas.source.device)
        images: Tensor | None = None  # in the dtype that the decoder draws in
        rows = torch.arange(count, device=self.canvas.source.device)
        number = max(1, round(1 / resolution))
        for place in range(1, number + 1):
            if len(rows) == 0:
                break
            drawn, logits = self.at(rows, place / number)
            won = logits.argmax(1) == self.canvas.target[rows]
            images = drawn.clone() if images is None else images
            images[rows] = drawn
            found[rows[won]] = place / number
            rows = rows[~won]
        return self.canvas.images.clone() if images is None else images, found

    def strip(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B,K,C,H,W] at all places, and their logits [B,K,classes]."""
        rows = torch.arange(len(self.canvas.source), device=self.canvas.source.device)
        several = [self.at(rows, float(k)) for k in places]
        return torch.stack([images for images, _ in several], 1), torch.stack([logits for _, logits in several], 1)
