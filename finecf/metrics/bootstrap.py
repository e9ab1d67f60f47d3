"""Bootstrap intervals over images, paired where two methods saw the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Resampled values held at a time: 32 MiB of float64."""


@dataclass(frozen=True)
class Interval:
    """A mean with a percentile interval at `level`, over `count` images."""

    mean: float
    low: float
    high: float
    level: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies strictly on one side of zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: Tensor | Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> Interval:
    """Mean of `values` [N] with its percentile bootstrap interval (Efron 1979): N draws with replacement.

    `generator` None is a fresh one with seed 0, so that the same values give the same interval; no global state is
    used. Raises ValueError on no values, NaN or inf, a level outside (0,1), or fewer than two resamples.
    """
    values = torch.as_tensor(values, dtype=torch.float64).cpu()
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one number an image, [N] with N >= 1, got {list(values.shape)}.")
    if not torch.isfinite(values).all():
        raise ValueError("values hold NaN or infinite numbers; leave those images out and count them.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}.")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}.")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    count = len(values)
    rows = max(1, _CHUNK // count)
    means = torch.cat(
        [
            values[torch.randint(count, (min(rows, resamples - start), count), generator=generator)].mean(1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high, level, count)


def paired_bootstrap(
    first: Tensor | Sequence[float],
    second: Tensor | Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    generator: torch.Generator | None = None,
) -> Interval:
    """Mean of `first - second` over the same images, [N] each, with its interval: an image keeps both its values.

    Other arguments and errors as `bootstrap_mean`; unequal lengths are refused, since pairs would be lost.
    """
    first = torch.as_tensor(first, dtype=torch.float64)
    second = torch.as_tensor(second, dtype=torch.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths: got {list(first.shape)} and {list(second.shape)}.")
    return bootstrap_mean(first - second, level=level, resamples=resamples, generator=generator)
