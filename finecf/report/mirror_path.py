"""The images of a Mirror-CFE explanation, along k, as its figure and its animation show them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from finecf.explainers import MirrorExplanation
from finecf.report.drawing import MARK, RIGHT, WRONG

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAME: Final = 1e-9
"""Two k that differ by less are the same place."""
SIDES: Final = {
    "semifactual": ("semifactual (k < 0.5)", WRONG),
    "boundary": ("boundary (k = 0.5)", MARK),
    "counterfactual": ("counterfactual (k > 0.5)", RIGHT),
}
"""What each part of the path is called, and the colour of its frames."""

Shown = Callable[[Tensor], "NDArray[np.float32]"]


@dataclass(frozen=True, eq=False)
class Place:
    """One image of the path.

    Attributes:
        k: where it lies.
        picture: RGB [H,W,3] in [0,1].
        target: the target's probability.
        named: whether the classifier calls it the target.
        first: whether it is the first counterfactual image.
    """

    k: float
    picture: NDArray[np.float32]
    target: float
    named: bool
    first: bool = False

    @property
    def side(self) -> str:
        """A key of `SIDES`."""
        if abs(self.k - 0.5) < SAME:
            return "boundary"
        return "semifactual" if self.k < 0.5 else "counterfactual"


def places(explanation: MirrorExplanation, most: int | None = None) -> list[Place]:
    """The path by rising k, the first counterfactual image among it; `most`: of the others at most so many, evenly."""
    shown = shown_as(explanation)
    rising = explanation.k.argsort(stable=True)
    if most is not None and most < len(rising):
        rising = rising[torch.linspace(0, len(rising) - 1, most, dtype=torch.float64).round().long()]
    said = explanation.image_logits.softmax(1)[:, explanation.target]
    named = explanation.image_logits.argmax(1) == explanation.target
    path = [
        Place(float(explanation.k[i]), shown(explanation.images[i]), float(said[i]), bool(named[i]))
        for i in rising.tolist()
    ]
    first, k = explanation.first_image, explanation.first_k
    if first is not None and k is not None:
        path = [place for place in path if abs(place.k - k) >= SAME]
        path.append(Place(k, shown(first), explanation.probabilities_after.target, True, first=True))
    return sorted(path, key=lambda place: place.k)


def shown_as(explanation: MirrorExplanation) -> Shown:
    """How images in the space of the model become RGB: all images of one explanation in the same way.

    Where the model's preprocessing was one scaling for each channel it is taken back. Images that then still leave
    [0,1] have the range of the explained image and its path stretched to it.
    """
    prepared = explanation.prepared.detach().float().cpu()
    scale, offset = _taken_back(prepared, explanation.image.detach().float().cpu())
    own = prepared * scale + offset
    low, high = float(own.amin()), float(own.amax())
    if low < -0.01 or high > 1.01:
        path = explanation.images.detach().float().cpu() * scale + offset
        low, high = min(low, float(path.amin())), max(high, float(path.amax()))
        scale, offset = scale / max(high - low, 1e-12), (offset - low) / max(high - low, 1e-12)

    def shown(image: Tensor) -> NDArray[np.float32]:
        seen = (image.detach().float().cpu() * scale + offset).clamp(0, 1)
        if len(seen) not in (1, 3):
            seen = seen.mean(0, keepdim=True)
        return seen.permute(1, 2, 0).expand(-1, -1, 3).numpy()

    return shown


def _taken_back(prepared: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset [C,1,1] that lead from the prepared image to the given one; 1 and 0 where nothing does."""
    same = torch.ones(len(prepared), 1, 1), torch.zeros(len(prepared), 1, 1)
    if prepared.shape != image.shape or torch.equal(prepared, image):
        return same
    x, y = prepared.flatten(1).double(), image.flatten(1).double()
    across = x - x.mean(1, keepdim=True)
    spread = across.square().sum(1)
    if bool((spread <= 1e-12).any()):
        return same
    scale = (across * y).sum(1) / spread
    offset = y.mean(1) - scale * x.mean(1)
    missed = (scale[:, None] * x + offset[:, None] - y).abs().amax()
    if float(missed) > 0.01 * max(float(y.amax() - y.amin()), 1e-12) or bool((scale <= 0).any()):
        return same
    return scale.float().view(-1, 1, 1), offset.float().view(-1, 1, 1)
