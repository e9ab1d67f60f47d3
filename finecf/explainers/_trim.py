"""How little of the change from an image to its counterfactual is enough."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._memory import budget_for, checked_micro_batch, graph_bytes
from finecf.explainers._shared import class_indices, lead_of, plain, wrapped
from finecf.models import Classifier
from finecf.regions.baseline import gaussian_blur

ROUNDS: Final = 20
"""How often the model's gradient is asked for, unless another number is given."""
BLUR: Final = 1.0
"""Standard deviation, in pixels, of the blur that what is kept must stand."""
MARGIN: Final = 0.1
"""The share of its lead that the target must keep."""
JUST_ACROSS: Final[Mapping[str, Any]] = MappingProxyType({"margin": 0.0, "blur": 0.0, "rounds": 60})
"""Settings of `trim` that ask for no more than the boundary crossed, as a first counterfactual image does; how many
rounds was settled on validation birds.
"""
_CELLS: Final = 4
_PIXELS: Final = 2
"""A mask has so many cells along a cell of the classifier's map, and none of fewer pixels a side."""
_FIRST_REACH: Final = 0.5
_LAST_REACH: Final = 0.02
"""By how much a cell may change in the first round, and in the last."""
_HALVINGS: Final = 20
_MICRO_BATCH: Final = 32


@dataclass(frozen=True, eq=False)
class Trimmed:
    """Counterfactuals of which only a part that suffices was kept, for B images.

    Attributes:
        images: [B,Ch,H,W], every pixel between the image's and the counterfactual's; the counterfactual itself where
            that is not called the target.
        mask: [B,h,w] in [0,1]: how much of the change is kept at the middle of each cell, and bilinearly between them.
        found: bool [B], whether the counterfactual is called the target; so are then the trimmed images.
        stands: bool [B], whether these are called the target blurred as well; that was asked for where the blurred
            counterfactual is. False without a blur.
        evaluations: int64 [B], images that the classifier has seen for each, but for a few that tell sizes.
    """

    images: Tensor
    mask: Tensor
    found: Tensor
    stands: Tensor
    evaluations: Tensor

    def __repr__(self) -> str:
        return f"Trimmed({int(self.found.sum())} of {len(self.found)} images, {int(self.stands.sum())} stand the blur)"


@torch.inference_mode(False)  # it needs gradients, which the user's own inference mode would not give
def trim(
    classifier: Classifier,
    images: Tensor,
    counterfactuals: Tensor,
    target: int | str | Tensor | Sequence[int | str],
    *,
    grid: tuple[int, int] | None = None,
    margin: float = MARGIN,
    blur: float = BLUR,
    rounds: int = ROUNDS,
    micro_batch: int | None = None,
    memory_budget: int | None = None,
) -> Trimmed:
    """Keep a part of the change from images to counterfactuals that suffices, as small a one as is found (O).

    A mask over the cells of a grid, enlarged bilinearly, says how much of the change each pixel keeps. Its mean over
    pixels and channels, which is linear in the mask, is made small while the target keeps a share of its lead over the
    best other class, in the image and in the blurred image. What the classifier says is taken as linear around the last
    mask; the cheapest mask within a reach of it is then a linear programme with two constraints, which is solved
    exactly. The reach shrinks from round to round, and the cheapest mask that was seen to suffice is kept: sequential
    linear programming in a shrinking box. Nothing shows that there is no cheaper one.

    The result is a blend of two pictures and nothing that a decoder drew. It is where the classifier is moved most for
    the least change: the finer the grid, the nearer that is to an attack on single pixels.

    Args:
        classifier: what `finecf.wrap` returned.
        images: float [B,Ch,H,W], as the model takes them.
        counterfactuals: [B,Ch,H,W], whoever made them.
        target: the class wanted, by index or name, for all images or one for each.
        grid: rows and columns of cells; None: four along each cell of the classifier's map, or fewer, so that
            each has at least two pixels a side.
        margin: the share of its lead in the counterfactual that the target must keep, in [0,1).
        blur: standard deviation in pixels; 0: blurred images are not looked at.
        rounds: how often the classifier's gradient is asked for: a forward and a backward of it, two with a blur.
        micro_batch: images at a time at most; None: 32.
        memory_budget: bytes for the graphs of the gradients (one image's is taken at least); None: a quarter of what is
            free, at most 1 GiB.

    Raises:
        TypeError: images that are no floating tensors.
        ValueError: shapes that do not fit, NaN or inf (also of the model), an unknown class or setting, or a model that
            gives no gradients.
    """
    classifier = wrapped(classifier)
    for name, each in (("images", images), ("counterfactuals", counterfactuals)):
        if not isinstance(each, Tensor) or not each.is_floating_point():
            what = each.dtype if isinstance(each, Tensor) else type(each).__name__
            raise TypeError(f"{name} must be a floating tensor as the model takes it, got {what}")
    _check_settings(margin, blur, rounds)
    if images.ndim != 4 or images.shape != counterfactuals.shape:
        raise ValueError(
            "images and their counterfactuals are [B,Ch,H,W] both, as the model takes them; got "
            f"{list(images.shape)} and {list(counterfactuals.shape)}"
        )
    if not bool(images.isfinite().all() and counterfactuals.isfinite().all()):
        raise ValueError("images and counterfactuals hold NaN or inf: leave out those that were not found")
    device, dtype = classifier.device, classifier.dtype
    x, ends = (each.to(device, dtype).clone() for each in (images, counterfactuals))  # they may be of inference mode
    wanted = torch.tensor(class_indices(classifier, target, len(x)), dtype=torch.int64, device=device)
    size = checked_micro_batch(micro_batch) or _MICRO_BATCH
    budget = budget_for(device, memory_budget)
    with plain(device):
        if grid is None:
            features = classifier.features(x[:1] if len(x) else x.new_zeros(1, *x.shape[1:]))
            grid = mask_grid(features.shape[2:], x.shape[2:])
        grid = _checked_grid(grid, x.shape[2:])
        if len(x) == 0:
            none = torch.zeros(0, dtype=torch.bool, device=device)
            return Trimmed(x, x.new_zeros(0, *grid), none, none, none.long())
        change = _Change.of(x, ends, grid)
        check_gradients(classifier, x[:1])
        if len(x) > 1:  # the first one tells how large a graph is
            with graph_bytes(classifier.model) as held:
                _leads(classifier, change.rows(slice(1)), wanted[:1], x.new_ones(1, *grid), blur)
            size = max(1, min(size, budget // max(1, sum(held.values()))))
        starts = range(0, len(x), size)
        parts = [
            _trim_at_once(
                classifier, change.rows(slice(at, at + size)), wanted[at : at + size], margin, blur, int(rounds), at
            )
            for at in starts
        ]
    return Trimmed(*(torch.cat(each) for each in zip(*parts, strict=True)))


def mask_grid(cells: Sequence[int], size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a mask, unless others are asked for: of a map of so many cells, for images of this size."""
    height, width = (max(1, min(_CELLS * own, side // _PIXELS)) for own, side in zip(cells, size, strict=True))
    return height, width


def trim_settings(asked: object, cells: Sequence[int], size: Sequence[int]) -> dict[str, Any]:
    """Arguments of `trim` from what `explain(..., trim=asked)` was told: True, or some of them by name.

    Raises:
        TypeError: neither a bool nor a mapping.
        ValueError: an unknown name, or a setting that `trim` refuses.
    """
    if not isinstance(asked, bool | Mapping):
        raise TypeError(f"trim is True, False or settings of finecf.explainers.trim by name; got {asked!r}")
    settings: dict[str, Any] = {"grid": None, "margin": MARGIN, "blur": BLUR, "rounds": ROUNDS}
    given = dict(asked) if isinstance(asked, Mapping) else {}
    if unknown := set(given) - set(settings):
        raise ValueError(f"trim has no setting {', '.join(sorted(map(str, unknown)))}; it has {', '.join(settings)}")
    settings |= given
    _check_settings(settings["margin"], settings["blur"], settings["rounds"])
    grid = settings["grid"]
    settings["grid"] = mask_grid(cells, size) if grid is None else _checked_grid(grid, size)
    return settings


def _check_settings(margin: float, blur: float, rounds: object) -> None:
    if not isinstance(rounds, SupportsIndex) or operator.index(rounds) < 1:
        raise ValueError(f"rounds is a whole number of at least 1; got {rounds}")
    if not 0 <= blur < math.inf:
        raise ValueError(f"blur is a standard deviation in pixels, at least 0; got {blur}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin is a share of the lead, at least 0 and less than 1; got {margin}")


def _checked_grid(grid: object, size: Sequence[int]) -> tuple[int, int]:
    numbers = list(grid) if isinstance(grid, tuple | list) else []
    if (
        len(numbers) != 2
        or not all(isinstance(each, SupportsIndex) for each in numbers)
        or not all(1 <= operator.index(each) <= side for each, side in zip(numbers, size, strict=True))
    ):
        raise ValueError(
            f"grid is (rows, columns), at least one of each and at most the images' {list(size)} pixels; got {grid}"
        )
    return operator.index(numbers[0]), operator.index(numbers[1])


def check_gradients(classifier: Classifier, images: Tensor) -> None:
    """Refuse a model that gives no gradients, seen on images [n,Ch,H,W].

    Raises:
        ValueError: it gives none.
    """
    with classifier.frozen():
        said = classifier.encode(images.detach().clone().requires_grad_())[1]
    if not said.requires_grad:
        raise ValueError(
            "what suffices of a change is found by the classifier's gradient, and this model gives none (frozen by "
            "torch.jit, quantised, or run without gradients): it cannot be trimmed"
        )


@dataclass(frozen=True, eq=False)
class _Change:
    """Images and counterfactuals [n,Ch,H,W], and what enlarges masks [n,h,w]: [H,h] and [W,w].

    As products of matrices: the gradient of an interpolation is not the same from run to run on CUDA.
    """

    images: Tensor
    ends: Tensor
    down: Tensor
    across: Tensor

    @staticmethod
    def of(images: Tensor, ends: Tensor, grid: tuple[int, int]) -> _Change:
        own = torch.promote_types(images.dtype, torch.float32)
        down, across = (
            F.interpolate(
                torch.eye(cells, dtype=own, device=images.device)[None], side, mode="linear", align_corners=False
            )[0].T.to(images.dtype)
            for side, cells in zip(images.shape[2:], grid, strict=True)
        )
        return _Change(images, ends, down, across)

    def rows(self, chosen: Tensor | slice) -> _Change:
        """Of some of the images."""
        return _Change(self.images[chosen], self.ends[chosen], self.down, self.across)

    def kept(self, mask: Tensor) -> Tensor:
        """The images [n,Ch,H,W] with so much of their change.

        The enlarged mask leaves [0,1] by rounding at most; a clamp has no gradient at 0 and 1 in newer torch.
        """
        return self.images.lerp(self.ends, (self.down @ mask @ self.across.T)[:, None])

    def costs(self) -> Tensor:
        """What a whole cell adds to the mean change, float64 [n,cells]."""
        size = (self.ends.double() - self.images.double()).abs().mean(1)
        spread = self.down.double().T @ size @ self.across.double()
        return spread.flatten(1) / size[0].numel()


def _leads(classifier: Classifier, change: _Change, target: Tensor, mask: Tensor, blur: float) -> tuple[Tensor, ...]:
    """By how much the target leads in the images, and in the blurred ones if there is a blur, float64 [n,views], and
    the gradients by the mask, float64 [n,views,cells], and whether the target is the class that is called, bool
    [n,views]: of equal logits it may be another. All on the CPU, where the search is.
    """
    with classifier.frozen():
        views = [mask.to(change.images, copy=True).requires_grad_() for _ in range(1 + (blur > 0))]
        shown = [change.kept(each) for each in views]
        if blur:
            shown[1] = gaussian_blur(shown[1], blur)
        said = classifier.encode(torch.cat(shown))[1].double()
        classes = target.repeat(len(views))
        ahead = lead_of(said, classes)
        slopes = torch.autograd.grad(ahead.sum(), views, allow_unused=True, materialize_grads=True)
    leads, called = (
        torch.stack(each.detach().chunk(len(views)), 1).cpu() for each in (ahead, said.argmax(1) == classes)
    )
    return leads, torch.stack(slopes, 1).double().flatten(2).cpu(), called


def _trim_at_once(
    classifier: Classifier, change: _Change, target: Tensor, margin: float, blur: float, rounds: int, before: int
) -> tuple[Tensor, ...]:
    """The fields of `Trimmed`, for images that fit into memory together, and have so many before them."""
    mask = torch.ones(len(target), change.down.shape[1], change.across.shape[1], dtype=torch.float64)
    leads, slopes, called = _leads(classifier, change, target, mask, blur)
    if not bool(leads.isfinite().all()):
        row = before + int((~leads.isfinite()).any(1).nonzero()[0, 0])
        raise ValueError(f"the model gives NaN or inf for counterfactual {row} of those that are trimmed together")
    found, standing = called[:, 0], called.all(1) & (blur > 0)
    evaluations = torch.full((len(target),), leads.shape[1])
    stands = standing.clone()
    rows = found.nonzero()[:, 0]
    if len(rows):
        on_device = rows.to(target.device)
        own_change, own_target, single = change.rows(on_device), target[on_device], ~standing[rows]
        cost, whole = own_change.costs().cpu(), _binding(leads[rows], single)
        needed = margin * whole
        best = own = torch.where(cost > 0, mask[rows].flatten(1), 0.0)  # what does not change needs no mask
        least = (own * cost).sum(1)
        kept_stands = stands[rows]
        lead, slope = whole, _binding(slopes[rows].nan_to_num(0, 0, 0), single)
        beyond = torch.zeros_like(needed)  # how far leads fell short of what was linear, of late
        for number in range(rounds):
            reach = _FIRST_REACH * (_LAST_REACH / _FIRST_REACH) ** (number / max(1, rounds - 1))
            last = own
            own = cheapest_mask(own, lead, slope, cost, reach, needed + beyond)
            hoped = lead + (slope * (own - last)[:, None]).sum(2)
            seen, slopes, called = _leads(classifier, own_change, own_target, own.view(-1, *mask.shape[1:]), blur)
            evaluations[rows] += seen.shape[1]
            lead, slope, spent = _binding(seen, single), _binding(slopes, single), (own * cost).sum(1)
            # More than nothing: without a margin an image may stand on the boundary, where rounding decides.
            better = (lead >= needed).all(1) & (lead > 0).all(1) & (spent < least)
            best, least = torch.where(better[:, None], own, best), torch.where(better, spent, least)
            kept_stands = torch.where(better, called.all(1) & (blur > 0), kept_stands)
            known = lead.isfinite().all(1) & slope.isfinite().flatten(1).all(1)
            beyond = torch.where(known[:, None], (beyond + (hoped - lead).clamp_min(0)) / 2, beyond)
            if not bool(known.all()):  # from there no round leads on
                own = torch.where(known[:, None], own, best)
                lead = torch.where(known[:, None], lead, needed)
                slope = torch.where(known[:, None, None], slope, 0.0)
        mask[rows], stands[rows] = best.view(-1, *mask.shape[1:]), kept_stands
    shown = mask.to(change.images)
    images = torch.where(found.to(shown.device)[:, None, None, None], change.kept(shown), change.ends)
    return images, shown, *(each.to(shown.device) for each in (found, stands, evaluations))


def _binding(values: Tensor, single: Tensor) -> Tensor:
    """Of values [n,views,...]: the first view's in the place of the others where it alone counts."""
    first = values[:, :1].expand_as(values)
    return torch.where(single.view(-1, *[1] * (values.ndim - 1)), first, values)


def cheapest_mask(mask: Tensor, lead: Tensor, slope: Tensor, cost: Tensor, reach: float, wanted: Tensor) -> Tensor:
    """The cheapest mask in [0,1], nowhere further than `reach` from this one, with the leads wanted: [n,cells].

    Leads are taken as linear. With one of them that is a fractional knapsack; of two, the weighted sum that asks for
    most is found by halving an interval, which is the dual of the linear programme. Where no mask reaches so far,
    the weighted leads go as far as they do.

    Args:
        mask: [n,cells], where it is.
        lead: [n,views] there, one or two.
        slope: [n,views,cells], of the leads.
        cost: [n,cells], at least 0.
        reach: by how much a cell may change.
        wanted: [n,views].
    """
    low, high = (mask - reach).clamp_min(0), (mask + reach).clamp_max(1)
    size = slope.abs().sum(2)
    size = torch.where(size > 0, size, 1.0)  # views in one measure, so that halving their weights leads to both
    slope, short = slope / size[:, :, None], (wanted - lead) / size

    def filled(weight: Tensor) -> Tensor:
        own_slope, own_short = (weight[:, :, None] * slope).sum(1), (weight * short).sum(1)
        own_short = own_short - (own_slope * (low - mask)).sum(1)
        return _knapsack(low, high, own_short, own_slope, cost)

    if short.shape[1] == 1:
        return filled(torch.ones_like(short))

    def uneven(tried: Tensor) -> Tensor:
        """How much more of the first lead is missing than of the second."""
        missing = short - (slope * (tried - mask)[:, None]).sum(2)
        return missing[:, 0] - missing[:, 1]

    bottom, top = torch.zeros_like(short[:, 0]), torch.ones_like(short[:, 0])
    under, over = (filled(torch.stack([first, 1 - first], 1)) for first in (bottom, top))
    for _ in range(_HALVINGS):
        first = (bottom + top) / 2
        tried = filled(torch.stack([first, 1 - first], 1))
        more = uneven(tried) > 0
        bottom, top = torch.where(more, first, bottom), torch.where(more, top, first)
        under, over = torch.where(more[:, None], tried, under), torch.where(more[:, None], over, tried)
    # Both solve the same weighted sum to rounding, and between them neither lead is short of more than the other.
    left, right = uneven(under).clamp_min(0), (-uneven(over)).clamp_min(0)
    part = torch.where(left + right > 0, left / (left + right), 0.5)
    part = torch.where(uneven(over) > 0, 1.0, part)
    return under.lerp(over, part[:, None])


def _knapsack(low: Tensor, high: Tensor, short: Tensor, slope: Tensor, cost: Tensor) -> Tensor:
    """Between low and high [n,cells], what makes up for `short` [n] above `low` at the least cost: the cells that lead
    most for their cost are raised first.
    """
    room = high - low
    gain = (slope * room).clamp_min(0)
    order = (slope / cost.clamp_min(torch.finfo(cost.dtype).tiny)).argsort(dim=1, descending=True, stable=True)
    gain = gain.gather(1, order)
    before = gain.cumsum(1) - gain
    raised = torch.where(gain > 0, ((short[:, None] - before) / gain).clamp(0, 1), 0.0)
    return low + room * torch.zeros_like(room).scatter(1, order, raised)
