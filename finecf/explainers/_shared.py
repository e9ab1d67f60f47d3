"""What the explainers share: how arguments are read, and what surrounds the work."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finecf import _native
from finecf.models import Classifier

Target = int | str | Tensor | Sequence[int | str]
"""Classes, by index or name: one for all images, or one for each."""


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """One of a few words."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def wrapped(classifier: object) -> Classifier:
    """A classifier that `finecf.wrap` returned."""
    if not isinstance(classifier, Classifier):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}; expected what finecf.wrap(model) returns: wrap it first"
        )
    return classifier


def class_indices(classifier: Classifier, target: Target, count: int) -> list[int]:
    """The class index of each of `count` images, from one class for all or one for each, by index or name."""
    if target is None:
        raise TypeError("target is None; expected a class by index or name, or one for each image")
    if hasattr(target, "tolist"):  # tensors, numpy arrays and numpy numbers
        target = target.tolist()
    names: Iterable[int | str] = [target] * count if isinstance(target, int | str) else target
    indices = [classifier.class_index(name) for name in names]
    if len(indices) != count:
        raise ValueError(f"target must be one class, or one for each of the {count} images; got {len(indices)}")
    return indices


def sources_of(classifier: Classifier, logits: Tensor, source: Target | None) -> Tensor:
    """The classes to move away from, int64 [B]: the predicted ones, unless others are given."""
    if source is None:
        return logits.argmax(1)
    own = class_indices(classifier, source, len(logits))
    return torch.tensor(own, dtype=torch.int64, device=logits.device)


def classes_of(classifier: Classifier, logits: Tensor, source: Target | None, target: Target) -> tuple[Tensor, Tensor]:
    """Source and target classes of images with these logits, int64 [B] each.

    Raises:
        ValueError: they are the same for an image.
    """
    own, device = sources_of(classifier, logits, source), logits.device
    wanted = torch.tensor(class_indices(classifier, target, len(logits)), dtype=torch.int64, device=device)
    same = (own == wanted).nonzero()[:, 0]
    if len(same):
        row = int(same[0])
        what = "predicted class" if source is None else "source"
        name = classifier.class_name(int(own[row]))
        raise ValueError(
            f"target and {what} of image {row} are the same, {name!r}: "
            "there is no boundary between them; give another target"
        )
    return own, wanted


def check_made_for(classifier: Classifier, meta: Mapping[str, Any], what: str, path: str | os.PathLike[str]) -> None:
    """Refuse a file that was made for another classifier; `what` is in it."""
    made = meta.get("classifier") or {}
    if not made or classifier.differs_from(made) is not None:
        mine = classifier.fingerprint()
        raise ValueError(
            f"the {what} in {path} was made for another classifier: {made.get('model')} with weights "
            f"{str(made.get('weights'))[:8]}, layer {made.get('layer')!r}, {made.get('classes')} classes; this one "
            f"is {mine['model']} with weights {str(mine['weights'])[:8]}, layer {mine['layer']!r}, "
            f"{classifier.num_classes} classes. Its latents mean something else: fit a {what} for this classifier"
        )


def lead_of(logits: Tensor, target: Tensor) -> Tensor:
    """By how much the logits [B,C] of targets [B] are ahead of the best other class, [B]; negative: behind."""
    chosen = target[:, None]
    return logits.gather(1, chosen)[:, 0] - logits.scatter(1, chosen, -math.inf).amax(1)


def originals(images: object, prepared: Tensor) -> Tensor:
    """The images as they were given, where that is a batch of tensors; else as the model takes them."""
    if isinstance(images, Tensor) and images.ndim in (3, 4):
        return images if images.ndim == 4 else images[None]
    return prepared


def check_range(
    images: Tensor, low: Tensor, high: Tensor, advice: str, name: str = "images", bounds: str = "image_range"
) -> None:
    """Refuse images [B,Ch,H,W] beyond bounds [1,Ch,1,1] by more than rounding; `bounds` and `advice`: words."""
    slack = 1e-3 * (high - low)
    if bool(((images < low - slack) | (images > high + slack)).any()):
        raise ValueError(
            f"the {name} reach from {float(images.min()):.3g} to {float(images.max()):.3g}, beyond {bounds} "
            f"({_few(low)} to {_few(high)}): {advice}"
        )


def _few(bound: Tensor) -> str:
    """A bound of each channel, or one that they share, to three digits."""
    values = [f"{each:.3g}" for each in bound.flatten().tolist()]
    return values[0] if len(set(values)) == 1 else f"[{', '.join(values)}]"


def versions() -> dict[str, str]:
    """The library versions and the backend that numbers depend on."""
    info = _native.build_info()
    return {
        "finecf": info["finecf"],
        "torch": info["torch"],
        "backend": info["backend"],
        "cpu_isa": str(info["cpu"].get("isa")),
    }


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """No gradients, and full precision whatever autocast says."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def progress_bar(progress: bool | None, total: int, unit: str = "image") -> Iterator[Callable[[int], object]]:
    """A progress bar's `update`; nothing is shown where progress is not asked for."""
    if not progress:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="explaining", unit=unit) as bar:
        yield bar.update
