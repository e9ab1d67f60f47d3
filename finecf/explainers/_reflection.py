"""The mirror of Mirror-CFE: reflecting a classifier's pooled features at the boundary between two classes.

Marks: P the paper (arXiv 2509.16822), O ours. For a head `W z + b` on pooled features z, source class s and target t:

    two_class    z_r = z - 2 (W_m z + b_m) W_m / |W_m|^2,  W_m = W_t - W_s (P, eq. 1); other logits move along
    lbfgs        z_r minimises |W z_r + b - swap_st(W z + b)|^2, by one joint L-BFGS over the batch (P)
    closed_form  z_r = z + (l_s - l_t) W^+ (e_t - e_s), where that L-BFGS converges to (O)

and `z_k = z + k (z_r - z)`: k = 0 is the image, k = 1/2 lies on the boundary, k = 1 is the mirror image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

REFLECTIONS: Final = ("closed_form", "lbfgs", "two_class")
RCOND: Final = 1e-6
"""Singular values of W below this share of the largest count as zero."""
BEYOND: Final = 1e-6
"""How far beyond the boundary the first counterfactual is taken, in units of k."""

_LBFGS = {"lr": 0.1, "max_iter": 20, "history_size": 20, "tolerance_grad": 0.0, "tolerance_change": 0.0}
_OUTER_STEPS = 10
_SCAN = 256
_BISECTIONS = 40


class Reflected(NamedTuple):
    """A batch of latents and their mirror images."""

    start: Tensor
    """z, float64 [B,D]."""
    step: Tensor
    """z_r - z, float64 [B,D]."""
    logits: Tensor
    """Of z, float64 [B,C]."""
    slope: Tensor | None
    """What one unit of k adds to the logits, float64 [B,C]; None where the head is not linear."""


@dataclass(frozen=True, eq=False)
class GapHead:
    """The head behind global average pooling.

    Attributes:
        logits: pooled features float64 [N,D] to logits [N,C], differentiable.
        weight, bias: float64 [C,D] and [C]; None where the head is not linear.
        inverse: W^+, float64 [D,C]; None likewise.
        rank: of W.
    """

    logits: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    inverse: Tensor | None = None
    rank: int = 0

    @staticmethod
    def linear(weight: Tensor, bias: Tensor) -> GapHead:
        """A linear head; its pseudo-inverse is computed here, once."""
        weight, bias = weight.detach().double(), bias.detach().double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        kept = values > RCOND * values[0]
        inverse = (right[kept].T / values[kept]) @ left[:, kept].T
        return GapHead(lambda latents: latents.double() @ weight.T + bias, weight, bias, inverse, int(kept.sum()))

    def reflect(self, latents: Tensor, source: Tensor, target: Tensor, reflection: str) -> Reflected:
        """Mirror latents [B,D] at the boundaries between the classes `source` and `target`, int64 [B] each."""
        start = latents.double()
        with torch.no_grad():
            logits = self.logits(start).double()
        rows = torch.arange(len(start), device=start.device)
        gap = logits[rows, source] - logits[rows, target]
        if reflection == "lbfgs":
            step = self._lbfgs(start, logits, source, target) - start
        else:
            step = gap[:, None] * self.directions(source, target, reflection)
        return Reflected(start, step, logits, None if self.weight is None else step @ self.weight.T)

    def directions(self, source: Tensor, target: Tensor, reflection: str) -> Tensor:
        """What z_r - z is per unit of l_s - l_t, float64 [B,D], for a reflection that needs no search."""
        if self.weight is None or self.inverse is None:
            raise ValueError(
                f"reflection {reflection!r} needs a linear head behind the pooling, and this one is not linear: "
                'use reflection="lbfgs"'
            )
        if reflection == "closed_form":
            return (self.inverse[:, target] - self.inverse[:, source]).T
        normal = self.weight[target] - self.weight[source]
        # Between two classes of equal weights there is no boundary, and nothing moves.
        return 2 * normal / normal.square().sum(1, keepdim=True).clamp_min(torch.finfo(normal.dtype).tiny)

    def _lbfgs(self, start: Tensor, logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """One optimiser over the whole batch, without line search (P)."""
        if len(start) == 0:
            return start
        rows = torch.arange(len(start), device=start.device)
        swapped = logits.clone()
        swapped[rows, source], swapped[rows, target] = logits[rows, target], logits[rows, source]
        with torch.enable_grad():
            mirrored = start.clone().requires_grad_()
            optimiser = torch.optim.LBFGS([mirrored], **_LBFGS)  # type: ignore[arg-type]  # its numbers are mixed

            def loss() -> Tensor:
                value = (self.logits(mirrored) - swapped).square().sum()
                (mirrored.grad,) = torch.autograd.grad(value, mirrored)
                return value.detach()

            for _ in range(_OUTER_STEPS):
                optimiser.step(loss)
        return mirrored.detach()

    def first_flip(self, reflected: Reflected, target: Tensor) -> Tensor:
        """The smallest k in [0,1] from which the target wins, just beyond the boundary; float64 [B], NaN: nowhere.

        For a linear head every logit is linear in k, so each other class c gives one bound (`l_t > l_c` is
        `a_c + k d_c > 0`) and k* is the largest lower one; else a scan and a bisection find it.
        """
        if reflected.slope is None:
            return self._scanned_flip(reflected, target)
        return linear_flip(reflected.logits, reflected.slope, target)

    def _scanned_flip(self, reflected: Reflected, target: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, _SCAN + 1, dtype=torch.float64, device=target.device)
        flips = torch.full((len(target),), math.nan, dtype=torch.float64, device=target.device)
        with torch.no_grad():
            for b in range(len(target)):

                def wins(k: Tensor, b: int = b) -> Tensor:
                    points = reflected.start[b] + k[:, None] * reflected.step[b]
                    return self.logits(points).argmax(1) == target[b]

                won = wins(grid)
                if not bool(won.any()):
                    continue
                first = int(won.int().argmax())
                low, high = grid[max(first - 1, 0)], grid[first]
                for _ in range(_BISECTIONS if first else 0):
                    middle = (low + high) / 2
                    low, high = (low, middle) if bool(wins(middle[None])) else (middle, high)
                flips[b] = (high + BEYOND).clamp(max=1)
        return flips


def linear_flip(logits: Tensor, slope: Tensor, target: Tensor) -> Tensor:
    """`GapHead.first_flip` for logits + k slope, [...,C] each, and target [...]: float64 [...], NaN: nowhere."""
    chosen = target[..., None]
    ahead = logits.gather(-1, chosen) - logits
    gains = slope.gather(-1, chosen) - slope
    others = torch.ones_like(ahead, dtype=torch.bool).scatter_(-1, chosen, False)
    bound = -ahead / gains
    lower = torch.where(others & (gains > 0), bound, -math.inf).amax(-1)
    upper = torch.where(others & (gains < 0), bound, math.inf).amin(-1)
    never = (others & (gains == 0) & (ahead <= 0)).any(-1)
    flip = (lower + BEYOND).clamp(min=0)
    return torch.where(never | (flip > 1) | (flip >= upper), math.nan, flip)


def map_steps(
    head: GapHead,
    reflected: Reflected,
    features: Tensor,
    source: Tensor,
    target: Tensor,
    shift: str = "uniform",
    reflection: str = "closed_form",
) -> Tensor:
    """f_1 - f_0 of maps [B,D,H,W], whose mean is z_r - z: float64 [B,D,1,1] where `shift` is "uniform" and every cell
    moves by that, [B,D,H,W] where it is "per_cell" and every cell is mirrored by itself.
    """
    if shift == "uniform":
        return reflected.step[:, :, None, None]
    assert head.weight is not None
    assert head.bias is not None
    normal, offset = head.weight[source] - head.weight[target], head.bias[source] - head.bias[target]
    margins = torch.einsum("bd,bdhw->bhw", normal, features.double()) + offset[:, None, None]
    return head.directions(source, target, reflection)[:, :, None, None] * margins[:, None]


def shifted_maps(features: Tensor, steps: Tensor, k: Tensor) -> Tensor:
    """Maps f_k [B,D,H,W] whose means are z_k, for `map_steps` and one k per image [B]."""
    return features + (k[:, None, None, None] * steps).to(features.dtype)
