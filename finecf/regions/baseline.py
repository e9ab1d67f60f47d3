"""What stands where nothing of the image is shown."""

from __future__ import annotations

import torch
from torch import Tensor


def baseline_images(baseline: str | Tensor, images: Tensor, mean_colour: Tensor | None = None) -> Tensor:
    """The image that stands for "nothing there", as [B,C,H,W] (expanded, not copied, where it is one colour).

    `baseline`: "mean" (`mean_colour` [C], or the mean colour of `images`), "black" (zeros), "blur" (each image under a
    Gaussian of sigma = 1/10 of its shorter side), or a tensor: a colour [C], an image [C,H,W], or one a row [B,C,H,W].
    """
    channels = images.shape[1]
    if isinstance(baseline, Tensor):
        chosen = baseline.to(images)
    elif baseline == "mean" and mean_colour is not None:
        chosen = torch.as_tensor(mean_colour).to(images)
    elif baseline == "mean" and len(images):
        chosen = images.mean((0, 2, 3))
    elif baseline in ("mean", "black"):
        chosen = images.new_zeros(channels)
    elif baseline == "blur":
        chosen = gaussian_blur(images, min(images.shape[2:]) / 10)
    else:
        raise ValueError(f'baseline must be "mean", "black", "blur" or a tensor, got {baseline!r}.')
    if chosen.ndim == 1 and chosen.shape[0] == channels:
        chosen = chosen[:, None, None]
    elif chosen.ndim not in (3, 4) or chosen.shape[-3:] != images.shape[1:]:
        raise ValueError(
            f"a baseline must be a colour [{channels}], an image {list(images.shape[1:])} or a batch "
            f"{list(images.shape)}, got {list(chosen.shape)}."
        )
    if chosen.ndim == 4 and chosen.shape[0] not in (1, images.shape[0]):
        raise ValueError(f"a batch of baselines must have {images.shape[0]} images, got {chosen.shape[0]}.")
    if not torch.isfinite(chosen).all():
        raise ValueError("the baseline holds NaN or infinite values; it must be finite.")
    return chosen.expand_as(images)


def blur_every_second(images: Tensor, sigma: float, first: int) -> Tensor:
    """Images [B,C,H,W], of which number `first` and every second one after it is blurred."""
    found = images.clone()
    found[first::2] = gaussian_blur(images[first::2], sigma)
    return found


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian over the last two axes of floating [B,C,H,W], cut at 3 sigma, borders replicated."""
    if not images.is_floating_point():
        raise TypeError(f"a blur needs floating images, got {images.dtype}")
    across, along = (_blur_matrix(side, sigma, images) for side in images.shape[-2:])
    # As products of matrices: convolutions of one channel run far slower on CPUs, their gradients slower still.
    return across @ images @ along.T


def _blur_matrix(side: int, sigma: float, like: Tensor) -> Tensor:
    """What each of `side` pixels takes from each, [side,side]."""
    radius = max(1, round(3 * sigma))
    exact = torch.promote_types(like.dtype, torch.float32)  # half precision does not count so far
    places = torch.arange(-radius, side + radius, dtype=exact, device=like.device)
    away = places - places[radius : side + radius, None]
    wide = torch.exp(-0.5 * (away / sigma) ** 2)  # a very small sigma squared would be 0
    wide = torch.where(away.abs() <= radius, wide, 0.0)
    wide = wide / wide.sum(1, keepdim=True)
    matrix = wide[:, radius : side + radius].clone()
    matrix[:, 0] += wide[:, :radius].sum(1)
    matrix[:, -1] += wide[:, side + radius :].sum(1)
    return matrix.to(like.dtype)
