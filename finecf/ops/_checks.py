"""What the public operators ask of their arguments, in sentences: who, what was expected, what came, what to do."""

from __future__ import annotations

import math
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_LARGEST_SUM = 1e30
"""Far beyond any logit, and far below the largest float32 (3e38)."""

_Number = TypeVar("_Number", int, float)


class Arguments:
    """The tensors of one call of `operator`, checked one after the other.

    A shape is written as a word, one letter an axis ("BPC"). The first tensor with a letter fixes its size, and the
    first tensor its device; those after it must agree. Looking at values would break a traced graph in two, so under
    torch.compile only shapes, types and devices are checked.
    """

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.sizes: dict[str, int] = {}
        self._first: dict[str, str] = {}
        self._device: tuple[torch.device, str] | None = None

    def refuse(self, message: str) -> NoReturn:
        raise ValueError(f"finecf.ops.{self.operator}: {message}")

    def real(self, name: str, value: Tensor, axes: str) -> Tensor:
        """A tensor of floating-point numbers."""
        self._tensor(name, value, axes)
        if not value.is_floating_point():
            raise TypeError(
                f"finecf.ops.{self.operator}: {name} must hold floating-point numbers, got {value.dtype}; "
                f"use {name}.float()"
            )
        if value.requires_grad:
            self.refuse(f"{name} requires grad, but no gradient flows through this operator; use {name}.detach()")
        return value

    def integer(self, name: str, value: Tensor, axes: str, dtype: torch.dtype = torch.int64) -> Tensor:
        """A tensor of integers of any width, returned as `dtype`."""
        self._tensor(name, value, axes)
        if value.dtype not in _INTEGERS:
            raise TypeError(
                f"finecf.ops.{self.operator}: {name} must hold integers, got {value.dtype}; use {name}.long()"
            )
        limits = torch.iinfo(dtype)
        if torch.iinfo(value.dtype).max > limits.max and values_visible() and value.numel():
            low, high = (int(bound) for bound in torch.aminmax(value))
            if low < limits.min or high > limits.max:
                self.refuse(f"{name} must fit {dtype}, got values from {low} to {high}; check what made them")
        return value.to(dtype)

    def boolean(self, name: str, value: Tensor, axes: str) -> Tensor:
        """A tensor of booleans."""
        self._tensor(name, value, axes)
        if value.dtype != torch.bool:
            raise TypeError(
                f"finecf.ops.{self.operator}: {name} must hold booleans, got {value.dtype}; use {name}.bool()"
            )
        return value

    def pixels(self, name: str, value: Tensor, axes: str, like: Tensor | None = None) -> Tensor:
        """A tensor that is only copied: of any dtype, that of `like` where given."""
        self._tensor(name, value, axes)
        if value.requires_grad:
            self.refuse(f"{name} requires grad, but no gradient flows through this operator; use {name}.detach()")
        if like is not None and value.dtype != like.dtype:
            raise TypeError(
                f"finecf.ops.{self.operator}: {name} must be {like.dtype} like the images, got {value.dtype}; "
                f"use {name}.to(images.dtype)"
            )
        return value

    def below(self, name: str, value: Tensor, axis: str, what: str, advice: str = "check what made it") -> Tensor:
        """Demand values in [0, size of `axis`)."""
        size = self.sizes[axis]
        if values_visible() and value.numel():
            low, high = (int(bound) for bound in torch.aminmax(value))
            if low < 0 or high >= size:
                self.refuse(
                    f"{name} must lie in 0..{size - 1} ({size} {what}), got {low if low < 0 else high}; {advice}"
                )
        return value

    def target(self, value: Tensor) -> Tensor:
        """The class of each image, int64 [B] in [0, C)."""
        value = self.integer("target", value, "B")
        return self.below("target", value, "C", "classes", "pass the index of the class's column in the logits")

    def candidate_range(self, value: Tensor) -> Tensor:
        """The bank rows of each image, int64 [B,2]: first and past-the-last, 0 <= first <= last <= N."""
        value = self.integer("candidate_range", value, "B2")
        rows = self.sizes["N"]
        if values_visible():
            start, stop = value.unbind(dim=1)
            wrong = (start < 0) | (stop < start) | (stop > rows)
            if bool(wrong.any()):
                image = int(wrong.nonzero()[0])
                self.refuse(
                    f"candidate_range must hold pairs 0 <= start <= stop <= {rows} (rows of candidate_logits), "
                    f"got {value[image].tolist()} for image {image}; pass the bank's half-open row range of the class"
                )
        return value

    def number(
        self, name: str, value: _Number, kind: type[_Number], least: _Number, most: _Number | None = None
    ) -> _Number:
        """A finite number of at least `least` and at most `most`."""
        span = f"at least {least}" if most is None else f"from {least} to {most}"
        noun = "a whole number" if kind is int else "a number"
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt) if kind is int else (int, float)):
            raise TypeError(
                f"finecf.ops.{self.operator}: {name} must be {noun} {span}, got {type(value).__name__}; "
                "pass a plain Python number"
            )
        if value != value or value < least or value == math.inf or (most is not None and value > most):
            self.refuse(f"{name} must be {noun} {span}, got {value}; choose a value in that range")
        return value

    def choice(self, name: str, value: str, allowed: tuple[str, ...]) -> str:
        """One of a few words."""
        if value not in allowed:
            self.refuse(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}; choose one of these")
        return value

    def at_least(self, axis: str, least: int, what: str) -> None:
        """Demand a least size of an axis."""
        if self.sizes[axis] < least:
            self.refuse(
                f"{self._first[axis]} must hold at least {least} {what}, got {self.sizes[axis]}; check the axis order"
            )

    def finite(self, name: str, value: Tensor) -> float:
        """Refuse NaN and infinity; return the largest magnitude (0 where values cannot be looked at)."""
        if not values_visible() or value.numel() == 0:
            return 0.0
        low, high = (float(bound) for bound in torch.aminmax(value))
        if not (math.isfinite(low) and math.isfinite(high)):
            wrong = (~value.isfinite()).nonzero()
            self.refuse(
                f"{name} must be finite, got NaN or infinity in {wrong.shape[0]} of {value.numel()} places, the first "
                f"at {wrong[0].tolist()}; check what computed it"
            )
        return max(-low, high)

    def headroom(self, reach: float, what: str) -> None:
        """Refuse inputs whose sums may come near the largest float32, after which inf - inf would make NaN."""
        if not reach <= _LARGEST_SUM:
            self.refuse(
                f"{what} must stay below {_LARGEST_SUM:.0e} in every sum over cells, but may reach {reach:.1e}; "
                "rescale the logits"
            )

    def _tensor(self, name: str, value: Tensor, axes: str) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(
                f"finecf.ops.{self.operator}: {name} must be a tensor, got {type(value).__name__}; "
                "convert it with torch.as_tensor"
            )
        if self._device is None:
            self._device = value.device, name
        elif value.device != self._device[0]:
            device, first = self._device
            self.refuse(
                f"{name} must be on {device} like {first}, got {value.device}; move it with {name}.to({first}.device)"
            )
        written = "[" + ", ".join(axes) + "]"
        if value.layout != torch.strided:
            self.refuse(f"{name} must be a dense tensor {written}, got {value.layout}; use {name}.to_dense()")
        if value.ndim != len(axes):
            advice = f"add the missing axis with {name}[None]" if value.ndim == len(axes) - 1 else "reshape it"
            self.refuse(f"{name} must have shape {written}, got {list(value.shape)}; {advice}")
        for axis, size in zip(axes, value.shape, strict=True):
            expected = int(axis) if axis.isdigit() else self.sizes.setdefault(axis, size)
            if size != expected:
                origin = f" ({axis} as in {self._first[axis]})" if axis in self._first else ""
                self.refuse(
                    f"{name} must have shape {written} with {axis} = {expected}{origin}, got {list(value.shape)}; "
                    "pass tensors of the same images, cells, classes and bank"
                )
            self._first.setdefault(axis, name)


def values_visible() -> bool:
    """Whether values may be looked at: not while torch.compile traces."""
    return not torch.compiler.is_compiling()
