"""Which implementation serves a call, and the arithmetic it runs under."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from finecf import _native

COPIES: Final = frozenset({"compose_regions", "rank_masks"})
"""Operators that only copy elements: their kernels take every dtype of at most 8 bytes."""

_Fake = TypeVar("_Fake", bound=Callable[..., Any])


def run(name: str, twin: Callable[..., Any], *arguments: Any) -> Any:
    """Call the compiled operator `name`, or its plain-torch `twin` where none serves the first argument's device.

    Autocast is off inside, and float32 matrix products on CUDA keep float32 precision whatever the global switch says.
    """
    first: Tensor = arguments[0]
    if name in COPIES:
        compiled = first.element_size() <= 8 and _native.has_native(first.device.type)
    else:
        compiled = _has_kernel(first.device, first.dtype)
    kernel = getattr(torch.ops.finecf, name) if compiled else twin
    with torch.autocast(first.device.type, enabled=False):
        if first.device.type != "cuda" or torch.compiler.is_compiling():
            return kernel(*arguments)
        precision = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            return kernel(*arguments)
        finally:
            torch.backends.cuda.matmul.fp32_precision = precision


def working_precision(*values: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their widest type; float16 and bfloat16 become float32 but for compiled CUDA operators."""
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    if dtype in (torch.float16, torch.bfloat16) and not _has_kernel(values[0].device, dtype):
        dtype = torch.float32
    return tuple(value.to(dtype) for value in values)


def fake(name: str) -> Callable[[_Fake], _Fake]:
    """Register what `name` returns for tensors without data, where its schema is defined."""

    def register(function: _Fake) -> _Fake:
        if hasattr(torch.ops.finecf, name):
            torch.library.register_fake(f"finecf::{name}", function)
        return function

    return register


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of an operator's floating-point results: half-precision inputs are accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    on_cuda = device.type == "cuda"
    supported = (torch.float32, torch.float16, torch.bfloat16) if on_cuda else (torch.float32, torch.float64)
    return dtype in supported and _native.has_native(device.type)
