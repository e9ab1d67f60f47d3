"""What trainings share: draws that hang on the step's number alone, and states that a training goes on from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from finecf.models.checkpoints import load_tensors

WEIGHTS: Final = "weights"

T = TypeVar("T")


class TrainingStopped(FloatingPointError):
    """A loss became NaN or infinite; the last good state is kept.

    Attributes:
        loss: its name; "weights" where the last step made a weight so.
        step: the step, from 0.
        value: what the loss was.
    """

    def __init__(self, loss: str, step: int, value: float, where: str = "") -> None:
        self.loss, self.step, self.value = loss, step, value
        what = "a weight" if loss == WEIGHTS else f"the {loss} loss"
        super().__init__(
            f"{what} became {value} at step {step}: training stopped{where}. Try a smaller learning_rate, "
            'or precision="float32": a state may be gone on from with these two changed'
        )


CHANGEABLE: Final = ("learning_rate", "precision")
"""Settings with which a state may go on that were others when it was written."""


def check_finite(net: nn.Module, step: int) -> None:
    """Stop where a net holds NaN or infinity after a step: the losses of a step are those of the weights before it."""
    for value in net.state_dict().values():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise TrainingStopped(WEIGHTS, step, float(value[~value.isfinite()][0]))


def seeded(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each number of a seed."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % (1 << 63))


def choice(values: Sequence[T], generator: torch.Generator) -> T:
    """One of the values."""
    return values[int(torch.randint(len(values), (), generator=generator))]


def moments_of(optimiser: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimiser's state as named tensors."""
    return {
        f"{prefix}{number}/{key}": value
        for number, moments in optimiser.state_dict()["state"].items()
        for key, value in moments.items()
    }


def set_moments(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give an optimiser the state that `moments_of` gave."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in under(tensors, prefix).items():
        number, what = key.split("/")
        moments.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def fingerprint_of(recipe: Mapping[str, Any], **more: object) -> str:
    """What a state must be the state of; a training that diverged may go on more slowly, or in another precision."""
    kept = {name: value for name, value in recipe.items() if name not in CHANGEABLE}
    return json.dumps({"recipe": kept, **more}, sort_keys=True)


def state_of(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description of a state, which must be of this training.

    Raises:
        ValueError: it is of another one, or broken.
    """
    try:
        tensors, meta = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; to start from nothing delete it, or pass resume=False") from error
    if meta.get("of") != fingerprint:
        raise ValueError(
            f"{path} is the state of a training with other settings, data or classifier"
            f"{_apart(str(meta.get('of')), fingerprint)}; delete it, or pass resume=False"
        )
    return tensors, meta


def said_of(logits: Tensor) -> dict[str, Tensor]:
    """What a classifier says of images, on the CPU: classes `predicted`, int64 [N], and the probability of each,
    `confidence`, float64 [N].
    """
    confidence, predicted = logits.cpu().double().softmax(1).max(1)
    return {"predicted": predicted, "confidence": confidence}


def joined(said: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was said of batches of images, of all."""
    return {name: torch.cat([each[name] for each in said]) for name in said[0]}


def check_same_images(path: Path, then: Mapping[str, Tensor], now: Mapping[str, Tensor], what: str) -> None:
    """Warn where the classifier says something else of the training images than of those of a state.

    Called by a trainer's `load`, which a `fit` under one decorator calls.
    """
    apart = [(then[name] - now[name]).abs() > 1e-3 for name in now]
    if any(float(each.double().mean()) > 0.01 for each in apart):  # a few may lie on a boundary
        warnings.warn(
            f"{path} is the state of a training on other images (or they are drawn at random each time they are "
            f"read): the {what} will have learned from both. Pass resume=False, or delete the state, to start from "
            "nothing",
            UserWarning,
            stacklevel=5,
        )


def _apart(there: str, here: str) -> str:
    """In which settings two fingerprints differ, as words."""
    try:
        two = [json.loads(each) for each in (there, here)]
        then, now = ({**each.pop("recipe"), **each} for each in two)
    except (ValueError, TypeError, KeyError, AttributeError):
        return ""
    names = [name for name in now if then.get(name) != now[name]]
    return f" ({', '.join(f'{name}: {then.get(name)} there, {now[name]} here' for name in names)})"
