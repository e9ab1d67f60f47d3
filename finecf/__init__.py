"""finecf: why was a fine-grained image classifier wrong, and what would have made it right.

`import finecf` needs torch and numpy alone; every public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from finecf import _native
from finecf._native import build_info
from finecf._version import __version__

if TYPE_CHECKING:
    from finecf import compat, data, explainers, metrics, models, ops, reference, regions, report, training
    from finecf.explainers import (
        FGVCE,
        SMDL,
        FGVCEExplanation,
        Interrupted,
        MirrorCFE,
        MirrorExplanation,
        SMDLExplanation,
        load,
    )
    from finecf.models import CandidateBank, Classifier, HeadFold, wrap

# Public name -> module that defines it; a name that is itself a module maps to None.
_PUBLIC: dict[str, str | None] = {
    "CandidateBank": "finecf.models",
    "Classifier": "finecf.models",
    "FGVCE": "finecf.explainers",
    "FGVCEExplanation": "finecf.explainers",
    "HeadFold": "finecf.models",
    "Interrupted": "finecf.explainers",
    "MirrorCFE": "finecf.explainers",
    "MirrorExplanation": "finecf.explainers",
    "SMDL": "finecf.explainers",
    "SMDLExplanation": "finecf.explainers",
    "compat": None,
    "data": None,
    "explainers": None,
    "load": "finecf.explainers",
    "metrics": None,
    "models": None,
    "ops": None,
    "reference": None,
    "regions": None,
    "report": None,
    "training": None,
    "wrap": "finecf.models",
}

__all__ = [
    "FGVCE",
    "SMDL",
    "CandidateBank",
    "Classifier",
    "FGVCEExplanation",
    "HeadFold",
    "Interrupted",
    "MirrorCFE",
    "MirrorExplanation",
    "SMDLExplanation",
    "__version__",
    "build_info",
    "compat",
    "data",
    "explainers",
    "load",
    "metrics",
    "models",
    "ops",
    "reference",
    "regions",
    "report",
    "training",
    "wrap",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'finecf' has no attribute {name!r}")
    module = _PUBLIC[name]
    value: object = (
        importlib.import_module(f"finecf.{name}") if module is None else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


_native.load()
