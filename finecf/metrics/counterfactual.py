"""Scores of counterfactual images: validity, distance, faithfulness to the latent, and the transition score COUT.

Marks: P Mirror-CFE's evaluation (arXiv 2509.16822), O ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from finecf.explainers._shared import check_range
from finecf.metrics._inputs import (
    RANGE_ADVICE,
    ImageRange,
    as_bounds,
    as_classes,
    as_counterfactuals,
    as_images,
    as_maps,
    evaluating,
    logits_of,
    rows_per_batch,
)
from finecf.metrics.curves import pixel_ranks, read_along, step_counts
from finecf.regions.baseline import gaussian_blur

DENOISING_SIGMA = 1.0
"""Of the blur before "denoised" scores, in pixels; cut at 3 sigma it has a kernel of 7 (O)."""


@dataclass(frozen=True, eq=False)
class CounterfactualScores:
    """Scores of B counterfactual images, float64 [B] on the CPU.

    Where no counterfactual was found, `valid` and `denoised_valid` are 0, `failed` is 1, and all else is NaN, so that
    `means` leaves those images out; the share of them is the mean of `failed` (O).

    Attributes:
        valid: 1 where the classifier calls the counterfactual the target, else 0 (P: "validity").
        failed: 1 where none was found; where nothing is known of the search, `1 - valid` (P: "%fail").
        l1: mean absolute difference from the image over pixels and channels, in shares of the image range (P).
        denoised_valid: as `valid`, of the counterfactual after a Gaussian blur of sigma 1, kernel 7 (P: "D.Val"; blur:
            O). What only noise achieves is lost in it.
        denoised_l1: mean absolute difference of the two images, both blurred (O); at most about `l1`.
        target_probability, source_probability: what the classifier says of the counterfactual.
        latent_error: mean over the D channels of |z - Fe(x')|, z being the wanted latent and Fe(x') the pooled features
            of the counterfactual: as `MirrorExplanation.latent_error`. None where no latents were given.
        latent_distance: the sum over the channels, |z - Fe(x')|_1, D times as much (P). None likewise.
        confidence_gap: absolute difference between the target's probability for the latent and for the image, as in
            `MirrorExplanation.confidence_gap`. None where no latent logits were given.
    """

    valid: Tensor
    failed: Tensor
    l1: Tensor
    denoised_valid: Tensor
    denoised_l1: Tensor
    target_probability: Tensor
    source_probability: Tensor
    latent_error: Tensor | None = None
    latent_distance: Tensor | None = None
    confidence_gap: Tensor | None = None

    def means(self) -> dict[str, float]:
        """Mean of every score that there is, over the images that have it; NaN where none has."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value.nanmean()) for name, value in values.items() if value is not None}


def counterfactual_scores(
    classifier: Any,
    images: Tensor,
    counterfactuals: Tensor,
    target: Tensor | int,
    source: Tensor | int | None = None,
    found: Tensor | Sequence[bool] | None = None,
    *,
    latents: Tensor | None = None,
    latent_logits: Tensor | None = None,
    image_range: ImageRange = (0.0, 1.0),
    batch_size: int = 64,
) -> CounterfactualScores:
    """Score counterfactual images one by one (Mirror-CFE's table of results; see `CounterfactualScores`).

    P reports the first counterfactual (`found`: whether there is one) and the image at k = 1 (`found` None) apart.

    Args:
        classifier: a `finecf.wrap` classifier or a callable from images to logits; the former where `latents` are
            given.
        images: floating [B,C,H,W] or [C,H,W], as the classifier takes them.
        counterfactuals: [B,C,H,W], of the same size and range; rows without one may hold anything.
        target: class wanted, an int or int64 [B].
        source: class moved away from, likewise; None: what the classifier predicts for the images.
        found: bool [B], whether there is a counterfactual; None: everywhere.
        latents: pooled features [B,D] that the counterfactuals were drawn from, such as z_k of `MirrorCFE.latent_path`.
        latent_logits: [B,K], what the head says of them (`LatentPath.logits`).
        image_range: least and largest value of the images, numbers or one a channel; L1 is measured in shares of it.
        batch_size: images in one forward.

    Raises:
        TypeError: an argument is of a wrong kind, or `latents` are given and the classifier has no features.
        ValueError: wrong shapes, NaN or inf, images beyond the range, or a class out of range.
    """
    images = as_images(images)
    batch = len(images)
    counterfactuals, has = as_counterfactuals(counterfactuals, images, found)
    target = as_classes(target, batch, images.device)
    origin = None if source is None else as_classes(source, batch, images.device, "source")
    low, span = as_bounds(image_range, images)
    for name, shown in (("images", images), ("counterfactuals", counterfactuals[has])):
        check_range(shown, low, low + span, RANGE_ADVICE, name)
    rows = rows_per_batch(images, batch_size, None)
    if latents is not None:
        if not hasattr(classifier, "features"):
            raise TypeError(
                f"latents are compared with the classifier's own features, and a {type(classifier).__name__} has none: "
                "give a finecf.wrap classifier."
            )
        latents = _rows("latents", latents, batch)
    if latent_logits is not None:
        latent_logits = _rows("latent_logits", latent_logits, batch)
    columns: dict[str, list[Tensor]] = {}
    with evaluating(classifier) as classify:
        for start in range(0, batch, rows):
            own = slice(start, start + rows)
            x, drawn, wanted = images[own], counterfactuals[own], target[own]
            logits = logits_of(classify, drawn, wanted)
            if origin is None:
                left = logits_of(classify, x, wanted).argmax(1)
            else:
                left = origin[own]
                _check_class("source", left, logits.shape[1])
            blurred = gaussian_blur(drawn, DENOISING_SIGMA)
            denoised = logits_of(classify, blurred, wanted)
            shares = logits.softmax(1)
            scores = {
                "valid": (logits.argmax(1) == wanted).double(),
                "l1": _distance(drawn, x, span),
                "denoised_valid": (denoised.argmax(1) == wanted).double(),
                "denoised_l1": _distance(blurred, gaussian_blur(x, DENOISING_SIGMA), span),
                "target_probability": shares.gather(1, wanted[:, None])[:, 0],
                "source_probability": shares.gather(1, left[:, None])[:, 0],
            }
            if latents is not None:
                pooled = classifier.features(drawn).mean((2, 3)).double().cpu()
                if pooled.shape[1] != latents.shape[1]:
                    raise ValueError(
                        f"latents must be [{batch},{pooled.shape[1]}] as the classifier's pooled features are, got "
                        f"{list(latents.shape)}."
                    )
                difference = (pooled - latents[own]).abs()
                scores |= {"latent_error": difference.mean(1), "latent_distance": difference.sum(1)}
            if latent_logits is not None:
                if latent_logits.shape[1] != logits.shape[1]:
                    raise ValueError(
                        f"latent_logits must be [{batch},{logits.shape[1]}], got {list(latent_logits.shape)}."
                    )
                said = latent_logits[own].softmax(1).gather(1, wanted[:, None].cpu())[:, 0]
                scores["confidence_gap"] = (said - scores["target_probability"].cpu()).abs()
            for name, value in scores.items():
                columns.setdefault(name, []).append(value.cpu())
    return _assemble(columns, has.cpu(), found is not None, latents is not None, latent_logits is not None)


def _assemble(
    columns: dict[str, list[Tensor]], has: Tensor, searched: bool, latents: bool, latent_logits: bool
) -> CounterfactualScores:
    optional = {"latent_error": latents, "latent_distance": latents, "confidence_gap": latent_logits}
    empty = [torch.empty(0, dtype=torch.float64)]
    values = {}
    for field in fields(CounterfactualScores):
        if field.name == "failed" or not optional.get(field.name, True):
            continue
        value = torch.cat(columns.get(field.name, empty))
        values[field.name] = torch.where(has, value, 0.0 if field.name.endswith("valid") else torch.nan)
    failed = (~has).double() if searched else 1 - values["valid"]
    return CounterfactualScores(failed=failed, **values)


def _rows(name: str, values: Tensor, batch: int) -> Tensor:
    """Floating [B,n] as float64 on the CPU."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(values, 'dtype', type(values).__name__)}.")
    if values.ndim != 2 or len(values) != batch:
        raise ValueError(f"{name} must be one row an image, [{batch},n], got {list(values.shape)}.")
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinite values.")
    return values.detach().double().cpu()


def _distance(first: Tensor, second: Tensor, span: Tensor) -> Tensor:
    """Mean absolute difference over pixels and channels in shares of the range, float64 [B]."""
    return ((first - second).abs() / span).double().mean((1, 2, 3))


def _check_class(name: str, classes: Tensor, count: int) -> None:
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        raise ValueError(f"{name} classes must lie in 0..{count - 1}, got {int(classes.min())}..{int(classes.max())}.")


@dataclass(frozen=True, eq=False)
class CoutCurves:
    """How source and target fare while the counterfactual's pixels replace the image's; float64 on the CPU.

    Attributes:
        share: [S], share of the pixels replaced, from 0 to 1.
        source, target: [B,S], probabilities of the two classes.
        source_auc, target_auc: [B], the trapezoid over `share`, in [0,1].
    """

    share: Tensor
    source: Tensor
    target: Tensor
    source_auc: Tensor
    target_auc: Tensor

    @property
    def score(self) -> Tensor:
        """COUT, `target_auc - source_auc`, float64 [B] in [-1,1]."""
        return self.target_auc - self.source_auc


def cout(
    classifier: Any,
    images: Tensor,
    counterfactuals: Tensor,
    target: Tensor | int,
    source: Tensor | int | None = None,
    *,
    maps: Tensor | None = None,
    steps: int = 50,
    batch_size: int = 64,
    memory_budget: int | None = None,
) -> CoutCurves:
    """COUT, the counterfactual transition score (Khorram and Fuxin, CVPR 2022, section 4).

    x_0 is the image, x_T its counterfactual. In between, the pixels of the counterfactual, all channels of a pixel at
    once, replace those of the image in falling order of the difference |x_T - x_0| (summed over channels; ties in
    reading order), 1/T of the image at a time. With p the softmax probability

        AUPC(c) = 1/T sum_{t=0}^{T-1} (p_c(x_t) + p_c(x_{t+1})) / 2       COUT = AUPC(target) - AUPC(source) in [-1,1]

    High where the few pixels that change most take the image from source to target; p_target - p_source of the image
    where nothing changes.

    The released code (khorrams/c3lt) is the same for grey images whose number of pixels is a multiple of T; elsewhere
    it moves `pixels // T` pixels at a time and gives the last, shorter step the weight of a whole one. Here each step's
    share is exact (O). The sum over channels is the usual extension to colour (O). Where T is more than the number of
    pixels, there is one step a pixel.

    Args:
        classifier: a `finecf.wrap` classifier or a callable from images to logits.
        images: floating [B,C,H,W] or [C,H,W], as the classifier takes them.
        counterfactuals: [B,C,H,W]; images without one are the caller's to leave out and count.
        target: class wanted, an int or int64 [B].
        source: class moved away from, likewise; None: what the classifier predicts for the images.
        maps: [B,H,W] (or [H,W], [B,1,H,W]), another order of the pixels; None: the difference.
        steps: T.
        batch_size: composed images in one forward; fewer where `memory_budget` bytes hold fewer.
        memory_budget: bytes for composed images.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: wrong shapes, NaN or inf, a class out of range, steps below 1, or a budget below one image.
    """
    images = as_images(images)
    batch = len(images)
    counterfactuals, _ = as_counterfactuals(counterfactuals, images, None)
    target = as_classes(target, batch, images.device)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    if maps is None:
        maps = (counterfactuals - images).abs().sum(1)
    else:
        maps = as_maps(maps).to(images.device)
        if maps.shape != (batch, *images.shape[2:]):
            raise ValueError(
                f"maps must be one order an image, {[batch, *images.shape[2:]]}, got {list(maps.shape)}; bring them to "
                "image size with finecf.metrics.resize_maps."
            )
    rows = rows_per_batch(images, batch_size, memory_budget)
    rank, _ = pixel_ranks(maps, "falling", None)
    pixels = maps[0].numel() if batch else images.shape[2] * images.shape[3]
    counts = step_counts(pixels, 1 / steps)
    with evaluating(classifier) as classify:
        if source is None:
            predicted = [logits_of(classify, x, target[:0]).argmax(1) for x in images.split(rows) if len(x)]
            origin = torch.cat([target[:0], *predicted])
        else:
            origin = as_classes(source, batch, images.device, "source")
            if batch:
                _check_class("source", origin, logits_of(classify, images[:1], target[:1]).shape[1])
        pair = torch.stack([origin, target], 1)
        jobs = [(b, count) for b in range(batch) for count in counts]
        values = read_along(classify, counterfactuals, rank, images, jobs, pair, rows).view(batch, len(counts), 2)
    share = torch.tensor(counts, dtype=torch.float64) / pixels
    auc = torch.trapezoid(values, share[:, None].expand(-1, 2), dim=1)
    return CoutCurves(share, values[..., 0], values[..., 1], auc[:, 0], auc[:, 1])
